"""The batches of a LoRA run: each a function of its number, whatever is cached and however many processes there are."""

import json
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ldm.checkpoints.components import Components
from ldm.conditioning import encoder_of
from ldm.data.buckets import Buckets, Placement, Size, assign, coverage, pixels, place
from ldm.data.cache import digest, kept, latents_key, posterior, text_key
from ldm.data.captions import CaptionOptions, spoken
from ldm.data.order import Order, dice, interleaved
from ldm.data.pictures import Digest, Picture
from ldm.diffusion.noising import training_noise
from ldm.errors import LdmError, NumericalError, UsageError
from ldm.text.transformers_text import TransformersText
from ldm.training.lora_config import LoRAConfig
from ldm.training.lora_data import CLASS_KEYS, Material, bucketing, whole

LEVELS = 4  # noise levels at which each held-out picture is looked at
STAND_INS = 16  # pictures that the held-out loss is of, where none is held out
HELD_OUT_SEED = 2**64 - 1  # its noise is that of no run
MEMO = 2**28  # bytes of latents, masks and text states that a process keeps in memory


class LoRABatch(NamedTuple):
    """What one pass through the networks needs: B pictures of one size, latents [C, h, w] of pixels [3, H, W]. All that
    is random was thrown by each sample's own dice, on the CPU.
    """

    mean: Tensor  # [B, C, h, w] of the posterior, unscaled; where latents are not kept the pictures [B, 3, H, W]
    std: Tensor  # [B, C, h, w]; empty [0] where latents are not kept
    sample: Tensor  # [B, C, h, w] standard normal: x0 = (mean + std * sample) * scaling_factor
    noise: Tensor  # [B, C, h, w]: standard normal, shifted by noise_offset
    extra: Tensor  # [B, C, h, w] standard normal, of input perturbation; empty [0] without
    t: Tensor  # [B] int64 in [min_timestep, max_timestep), even or logit-normal
    weight: Tensor  # [B]: 1, and of class pictures prior_loss_weight
    mask: Tensor  # [B, 1, h, w] in [0, 1]; empty [0] where no picture of the run has one
    sizes: Tensor  # [B, 6] as SDXL is told them (Placement.time_ids)
    context: Tensor  # [B, T, D] text states; empty [0] where captions are encoded as they come
    pooled: Tensor  # [B, P]; empty [0] likewise, and where the U-Net does not hear it
    captions: list[str]  # as they are said this time


class Shot(NamedTuple):
    """A picture as the batches take it."""

    picture: Picture
    size: Size
    digest: Digest


class Thrown(NamedTuple):
    """What a sample's noise dice gave. All of it, always, in this order: no option changes what another one gets."""

    sample: Tensor  # [C, h, w] standard normal
    shift: Tensor  # [C]
    noise: Tensor  # [C, h, w]
    extra: Tensor  # [C, h, w]
    level: float  # uniform in [0, 1)


def thrown(generator: np.random.Generator, shape: tuple[int, int, int]) -> Thrown:
    """Throw the noise dice of a sample whose latents are of this shape [C, h, w]."""

    def normal(*sizes: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal(sizes, np.float32))

    return Thrown(normal(*shape), normal(shape[0]), normal(*shape), normal(*shape), generator.random())


def logit_normal(level: float, mean: float, std: float) -> float:
    """A level in [0, 1) of a uniform one: the sigmoid of a normal number, Esser et al. 2024 (arXiv:2403.03206), eq. 19;
    with a std of 0 the level itself.
    """
    if not std:
        return level
    normal = NormalDist(mean, std).inv_cdf(min(max(level, 2**-53), 1 - 2**-53))
    return min(1 / (1 + math.exp(-normal)), 1 - 2**-53)


class LoRABatches(Dataset[LoRABatch]):
    """The endless stream of a run's batches; batches[m] is a function of m, the settled configuration and the data.

    Made before anything is adapted, for the cache knows the networks by the digest of their weights. After `fill`
    nothing but files is read, and no network is asked: it may be sent to worker processes, and the networks stay here.
    UsageError while class pictures are missing.
    """

    def __init__(self, config: LoRAConfig, components: Components, material: Material) -> None:
        if material.missing:
            raise UsageError(f"{material.missing} class pictures are missing; draw them first (draw_class, with_class)")
        assert config.cache_dir and config.train_batch_size
        self.config, self.material, self.components = config, material, components
        self.folder = Path(config.cache_dir)
        self.keeps_latents = not (config.no_cache or config.random_crop)
        self.keeps_texts = not (config.no_cache or config.trains_text or config.captions.by_tags)
        vae, self.options = components.vae, config.captions
        self.factor, self.channels = vae.config.factor, vae.config.latent_channels
        self.is_pooled = bool(components.unet.config.projection_class_embeddings_input_dim)
        self.vae_known = _vae_known(components) if self.keeps_latents else ("", torch.float32)
        self.texts_known = _texts_known(components) if self.keeps_texts else ("", torch.float32)
        self.memo, self.room = dict[Hashable, dict[str, Tensor]](), MEMO

        shots = self._shots
        self.own, self.prior = shots(material.pictures), shots(material.class_pictures, CLASS_KEYS)
        order = partial(Order, batch_size=config.train_batch_size, seed=config.seed)
        self.own_order = order(material.buckets.members, repeats=(config.repeats,) * len(self.own))
        self.prior_order = order(material.class_buckets.members) if material.class_buckets else None
        stand_ins = material.pictures[:: -(-len(material.pictures) // STAND_INS)]
        fixed = [(shot, place(shot.size, self._bucket(shot))) for shot in shots(material.held_out or stand_ins)]
        self.fixed = sorted(fixed, key=lambda row: row[1].target)
        self.fixed_latents: list[dict[str, Tensor]] = []
        self.has_masks = any(shot.picture.mask for shot in (*self.own, *self.prior, *(shot for shot, _ in fixed)))

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process is sent: no networks, no tensors."""
        return vars(self) | {"components": None, "memo": {}, "room": MEMO, "fixed_latents": []}

    def __getitem__(self, number: int) -> LoRABatch:
        """Batch `number` of the stream. LdmError when the cache lacks what `fill` put there."""
        c, batch = self.config, interleaved(self.own_order, self.prior_order, number)
        shots, options, weight = self.own, self.options, 1.0
        buckets: Buckets | None = self.material.buckets
        if batch.prior:  # class pictures are said to be what they are
            shots, options, weight = self.prior, CaptionOptions(), c.prior_loss_weight
            buckets = self.material.class_buckets
        assert buckets
        samples = []
        for index, i in enumerate(batch.samples):
            own_dice = partial(dice, c.seed, number, index)
            cut = place(shots[i].size, buckets.sizes[batch.bucket], own_dice("crop"), c.random_crop, c.random_flip)
            said = spoken(shots[i].picture.caption, options, own_dice("caption"))
            drawn = thrown(own_dice("noise"), self._shape(cut))
            drawn = drawn._replace(level=logit_normal(drawn.level, c.logit_mean, c.logit_std))
            sample = self._sample(shots[i], cut, said, drawn, self._latents(shots[i], cut))
            samples.append(sample._replace(weight=torch.tensor(weight)))
        return together(samples)

    def fill(self) -> Iterator[tuple[int, int]]:
        """Encode what the cache lacks; yields how many are done, of how many. The networks are as they were.

        NumericalError for latents that are not finite. LdmError when the cache cannot be written.
        """
        jobs: dict[str, Callable[[], dict[str, Tensor]]] = {}
        if self.keeps_latents:
            for shot in (*self.own, *self.prior):
                plain = place(shot.size, self._bucket(shot))
                for cut in (plain, replace(plain, flipped=True))[: 1 + self.config.random_flip]:
                    jobs[self._latents_key(shot, cut)] = partial(self._encoded, shot, cut)
        if self.keeps_texts:
            jobs |= {self._text_key(text): partial(self._heard, text) for text in self._texts()}
        of = len(jobs) + len(self.fixed)
        for done, (key, make) in enumerate(jobs.items(), 1):
            self._from_cache(key, make)
            yield done, of
        fixed = []
        for done, (shot, cut) in enumerate(self.fixed, len(jobs) + 1):
            make = partial(self._encoded, shot, cut)
            fixed.append(self._from_cache(self._latents_key(shot, cut), make) if self.keeps_latents else make())
            yield done, of
        self.fixed_latents = fixed

    def held_out(self) -> list[LoRABatch]:
        """The held-out pictures (where there are none, some that are trained on), each at LEVELS evenly spread noise
        levels and with noise of its own: the same for any seed, whenever it is asked. Not mirrored, cut in the middle,
        all of the caption said, neither offset nor perturbation (`extra` is zero); always as latents. LdmError before
        `fill`.
        """
        if len(self.fixed_latents) < len(self.fixed):
            raise LdmError("the held-out pictures are not encoded yet; fill the cache first")
        samples = []
        for index, ((shot, cut), latents) in enumerate(zip(self.fixed, self.fixed_latents, strict=True)):
            for k in range(LEVELS):
                drawn = thrown(dice(HELD_OUT_SEED, index, k), self._shape(cut))
                still = drawn._replace(
                    shift=drawn.shift * 0, extra=drawn.extra * 0, level=(k + 0.5) / LEVELS
                )  # no chance in it but the noise
                samples.append(self._sample(shot, cut, whole(self.config, shot.picture.caption), still, latents))
        at_once = self.config.train_batch_size or 1
        rows = [list(same) for _, same in groupby(samples, key=lambda sample: sample.sample.shape)]
        return [together(row[i : i + at_once]) for row in rows for i in range(0, len(row), at_once)]

    # -- one sample ---------------------------------------------------------------------------------------------------

    def _sample(self, shot: Shot, cut: Placement, said: str, drawn: Thrown, latents: dict[str, Tensor]) -> LoRABatch:
        """One sample, of weight 1: a batch whose tensors lack the first axis."""
        c = self.config
        assert c.max_timestep is not None
        none = torch.empty(0)
        states = self._from_cache(self._text_key(said), self._gone) if self.keeps_texts else {}
        return LoRABatch(
            mean=latents["mean"],
            std=latents.get("std", none),
            sample=drawn.sample,
            noise=training_noise(drawn.noise, drawn.shift, c.noise_offset),
            extra=drawn.extra if c.input_perturbation else none,
            t=torch.tensor(c.min_timestep + int(drawn.level * (c.max_timestep - c.min_timestep))),
            weight=torch.tensor(1.0),
            mask=self._mask(shot, cut) if self.has_masks else none,
            sizes=torch.tensor(cut.time_ids, dtype=torch.float32),
            context=states.get("context", none),
            pooled=states.get("pooled", none),
            captions=[said],
        )

    def _shape(self, cut: Placement) -> tuple[int, int, int]:
        return self.channels, cut.target.height // self.factor, cut.target.width // self.factor

    def _latents(self, shot: Shot, cut: Placement) -> dict[str, Tensor]:
        """A picture's mean and std [C, h, w] from the cache; its pixels as "mean" where there is none."""
        if not self.keeps_latents:
            return {"mean": pixels(shot.picture.open(), cut)}
        return self._from_cache(self._latents_key(shot, cut), self._gone)

    def _mask(self, shot: Shot, cut: Placement) -> Tensor:
        """[1, h, w]: the share of each latent's pixels that counts; all of it where the picture has no mask."""

        def make() -> dict[str, Tensor]:
            mask = shot.picture.open_mask()
            whole = torch.ones(self._shape(cut))[:1] if mask is None else coverage(mask, cut)
            return {"mask": whole if mask is None else F.avg_pool2d(whole, self.factor)}

        return self._remembered(("mask", shot.digest, cut), make)["mask"]

    # -- the cache ----------------------------------------------------------------------------------------------------

    def _from_cache(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return self._remembered(key, partial(kept, self.folder, key, make))

    def _remembered(self, key: Hashable, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is made once, while there is room; what came first stays, for all come equally often."""
        if key in self.memo:
            return self.memo[key]
        made = make()
        if (size := sum(tensor.nbytes for tensor in made.values())) <= self.room:
            self.memo[key] = made
            self.room -= size
        return made

    def _gone(self) -> dict[str, Tensor]:
        raise LdmError(
            f"{self.folder} lacks what was encoded for this run, or holds it damaged; start the run again: it is "
            "encoded anew, and goes on from the last state"
        )

    def _latents_key(self, shot: Shot, cut: Placement) -> str:
        return latents_key(shot.digest.content, cut, *self.vae_known)

    def _text_key(self, text: str) -> str:
        return text_key(text, *self.texts_known, self.config.clip_skip)

    def _texts(self) -> list[str]:
        """All that is ever said, where no caption varies by its parts."""
        said = [whole(self.config, shot.picture.caption) for shot in (*self.own, *(shot for shot, _ in self.fixed))]
        silence = [""] * (self.options.caption_dropout_rate > 0)
        return list(dict.fromkeys([*said, *(shot.picture.caption for shot in self.prior), *silence]))

    def _encoded(self, shot: Shot, cut: Placement) -> dict[str, Tensor]:
        """The mean and std [C, h, w] of a picture's latents, on the CPU."""
        found = posterior(self.components.vae, pixels(shot.picture.open(), cut))
        if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
            kind = str(found["mean"].dtype).removeprefix("torch.")
            raise NumericalError(f"the latents of {shot.picture.where} are not finite in {kind}; take --dtype fp32")
        return {name: tensor.cpu() for name, tensor in found.items()}

    def _heard(self, text: str) -> dict[str, Tensor]:
        """A text's states [T, D], and its pooled vector [P] if the U-Net hears it."""
        said = encoder_of(self.components)([text], self.config.clip_skip or None)
        pooled = {"pooled": said.pooled[0]} if self.is_pooled and said.pooled is not None else {}
        return {"context": said.context[0], **pooled}

    # -- the data -----------------------------------------------------------------------------------------------------

    def _shots(self, pictures: Sequence[Picture], prefix: str = "") -> list[Shot]:
        sizes, known = self.material.sizes, self.material.manifest
        return [Shot(one, sizes[prefix + one.key], known[prefix + one.key]) for one in pictures]

    def _bucket(self, shot: Shot) -> Size:
        return assign([shot.size], bucketing(self.config)).sizes[0]


def together(samples: Sequence[LoRABatch]) -> LoRABatch:
    """Samples of one size as a batch; what is empty stays so."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in LoRABatch._fields}
    captions = [text for texts in columns.pop("captions") for text in texts]
    rows = {name: torch.stack(parts) if parts[0].numel() else parts[0] for name, parts in columns.items()}
    return LoRABatch(**rows, captions=captions)


def _vae_known(c: Components) -> tuple[str, torch.dtype]:
    """What latents depend on beside the picture: the digest of the autoencoder, and its type."""
    weight = next(c.vae.parameters())
    facts = [c.configs["vae"], weight.device.type]  # another device rounds in another way
    return digest(c.vae.state_dict(), json.dumps(facts, sort_keys=True)), weight.dtype


def _texts_known(c: Components) -> tuple[str, torch.dtype]:
    """What text states depend on beside the text: the digest of all text encoders and vocabularies, and their type."""
    models = {name: network for name, network in c.networks.items() if name.startswith("text_encoder")}
    words: list[object] = [
        [words.vocab, words.merges, words.max_length, words.pad, words.added] for words in c.tokenizers.values()
    ]
    if isinstance(c.text_encoder, TransformersText):
        words = [c.text_encoder.vocabulary, c.text_encoder.max_length]
    weight = next(next(iter(models.values())).parameters())
    facts = [{name: c.configs[name] for name in models}, words, c.is_xl, weight.device.type]
    tensors = {f"{name}.{key}": t for name, model in models.items() for key, t in model.state_dict().items()}
    return digest(tensors, json.dumps(facts, sort_keys=True)), weight.dtype
