"""Text to image: prompt -> embeddings -> latents -> image. Read this file first.

B images, C latent channels, H W latent height and width, T tokens, D text width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import loras
from ldm.adapters.strength import Strength
from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import save_folder
from ldm.checkpoints.safe import file_sha256
from ldm.checkpoints.single_file import open_single_file, save_single_file
from ldm.conditioning import AnyEncoder, encoder_of, unheard
from ldm.decoding import decoded
from ldm.editing import Ground, mask_remarks, pasted, pictures_of, settled, source_of_edit
from ldm.errors import ModelError, UsageError
from ldm.images import Pictures, of_type, to_pil
from ldm.models.seamless import seamless
from ldm.models.tiny_vae import AutoencoderTiny
from ldm.models.unet import UNet
from ldm.models.vae import AutoencoderKL
from ldm.noise import Generator, generators
from ldm.prompts import untagged
from ldm.request import MOST_IMAGES, Request, make_request
from ldm.runtime import decoding_types, resolve_device, resolve_dtype
from ldm.safety import flagged
from ldm.schedulers import Sampling, Step
from ldm.schedulers.laps import total
from ldm.sources import open_model
from ldm.staging import resolved, run_of
from ldm.text.encoder import Conditioning
from ldm.text.inversion import attach, read_embedding
from ldm.walk import Run, sampling_of


@dataclass(frozen=True)
class Result:
    """What a request gave. `request` is the one carried out, with every choice that was left open filled in."""

    images: Pictures  # by output_type
    seeds: tuple[int, ...]  # of each picture; () where the noise came from `generator`
    request: Request
    latents: Tensor  # [B, C, H, W] float32, in the network's frame (scaled, as the VAE's decode takes them)
    flagged: tuple[bool, ...] = ()  # verdicts of the safety checker, where there is one; such pictures are black
    notes: tuple[str, ...] = ()  # what the user should know of how these pictures were made


class Pipeline:
    """A latent diffusion model, ready to draw. `unet`, `vae`, `text_encoder` and `schedule` are plain attributes.

    refiner: a second model that ends every run, from the request's refiner_start on (SDXL: Podell et al. 2023, sec.
    2.5).
    """

    def __init__(self, components: Components, refiner: "Pipeline | None" = None) -> None:
        self.components, self.refiner = components, refiner
        self.embeddings: tuple[dict[str, Any], ...] = ()  # the learned words that were loaded, for recipes
        self.lora_dir: Path | None = None  # where <lora:NAME> in a prompt finds NAME.safetensors
        self.vae: AutoencoderKL | AutoencoderTiny = components.vae
        self._encoder: AnyEncoder = encoder_of(components)
        self.sampler: Callable[[Request], Sampling | None] | None = None  # of ldm.interop: asked first how to sample
        self.schedule = self.sampling().schedule
        if refiner and refiner.vae.config.latent_channels != self.vae.config.latent_channels:
            raise ModelError(
                f"the refiner's latents have {refiner.vae.config.latent_channels} channels and the model's "
                f"{self.vae.config.latent_channels}; take the refiner of this family"
            )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        variant: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        vae: str | Path | None = None,
        refiner: str | Path | None = None,
        allow_pickle: bool = False,
        safety_checker: bool = True,
        fast: bool = False,
    ) -> "Pipeline":
        """Open a model folder (diffusers layout), a checkpoint in one file, or the hub's model of this name; no path
        opens the model in the box.

        dtype: "fp32", "bf16", "fp16" or a torch.dtype; default float32 on the CPU, bfloat16 on CUDA. device: "cpu",
        "cuda", "cuda:1"; default CUDA if there is one. variant: "fp16" prefers `*.fp16.safetensors`. revision: of the
        hub's model, a branch, tag or commit. local_files_only: what was fetched before, without a network (as
        HF_HUB_OFFLINE=1). vae: another autoencoder, a file or folder, also a TAESD. refiner: SDXL's second model, which
        ends every run. allow_pickle: take `*.bin` where there are no safetensors; they are read by a child process
        that runs nothing of them. safety_checker: open the model's own, if it has one. fast: in the fast mode that its
        folder has (ldm.fast). ModelError: missing, incomplete, damaged or of another kind. UsageError: an unknown dtype
        or device, CUDA asked and absent, no fast mode.
        """
        where = resolve_device(device)
        opened = partial(
            open_model, dtype=resolve_dtype(dtype, where), device=where, variant=variant, revision=revision, vae=vae,
            local_files_only=local_files_only, allow_pickle=allow_pickle, safety_checker=safety_checker,
        )  # fmt: skip
        return cls(opened(path, fast=fast), cls(opened(refiner)) if refiner else None)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        prediction_type: str | None = None,
        ema: bool = False,
        vae: str | Path | None = None,
        allow_pickle: bool = False,
    ) -> "Pipeline":
        """Open a checkpoint in one file (`.safetensors`; `.ckpt` and `.pt` with allow_pickle) of SD1, SD2, SDXL or its
        refiner. Its family is known by its keys and shapes; nothing is fetched.

        prediction_type: "epsilon" or "v_prediction", where the file does not say. ema: take the averaged weights that
        it also holds. vae: another autoencoder, a file or folder, also a TAESD. Others and errors as `from_pretrained`.
        """
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        return cls(open_single_file(
            path, kind, where, prediction_type=prediction_type, ema=ema, allow_pickle=allow_pickle, vae=vae
        ))  # fmt: skip

    def load_textual_inversion(self, path: str | Path, token: str | None = None, *, allow_pickle: bool = False) -> str:
        """Teach the model a learned word (Gal et al. 2022) from the file of diffusers, A1111 or kohya; returns it.

        token: the word, in place of what the file or its name says. Errors as of `read_embedding` and `attach` of
        ldm.text.inversion; nothing has then changed.
        """
        embedding = read_embedding(path, allow_pickle)
        self.components.weights.bare()
        attach(self.components, embedding, token)
        self._encoder = encoder_of(self.components)
        word = token or embedding.name
        self.embeddings += ({"type": "textual_inversion", "name": word, "sha256": file_sha256(Path(path))},)
        return word

    def load_lora(
        self,
        path: str | Path,
        scale: float | str | Mapping[str, float | str] | Strength = 1.0,
        name: str | None = None,
        *,
        partial: bool = False,
        allow_pickle: bool = False,
    ) -> str:
        """Load a LoRA, or another adapter, of any tool; returns its name, by default the file's without its ending.

        scale: how strong it is, everywhere, or by place and time as ldm.adapters.strength writes it: "0.8",
        "te=0.5:unet=1", "0@0,1@0.5", "mid_block=0", {"text": 0.5, "down_blocks.2": 0}. Several add up; one of the same
        name is replaced. In a prompt, <lora:NAME:SCALE> says another scale. partial: take what fits of one that does
        not fit as a whole. ModelError: it is no adapter, damaged, or for another model; nothing has then changed.
        """
        return loras.load(self.components, Path(path), Strength.of(scale), name, partial, allow_pickle)

    def set_lora(self, name: str, scale: float | str | Mapping[str, float | str] | Strength) -> None:
        """Say how strong a loaded adapter is from now on. scale: as in `load_lora`. UsageError: none of that name."""
        self.components.weights.set(name, Strength.of(scale))

    def unload_lora(self, name: str | None = None) -> None:
        """Take an adapter out, or all of them; the weights are then, to the last bit, as if it had never been there.
        UsageError: none of that name.
        """
        self.components.weights.unload(name)

    def adapters_of(self, request: Request) -> tuple[dict[str, Any], ...]:
        """What a recipe says of the learned words and adapters that a request is drawn with."""
        return (*self.embeddings, *loras.rows(self.components, request))

    def save_pretrained(
        self, path: str | Path, *, dtype: str | torch.dtype | None = None, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write a model folder, whole or not at all, that this class and stock diffusers open. What adapters add is in
        it. dtype: of the files; default the model's. max_shard_size: of one weights file, in bytes or as "300MB".
        """
        self.components.weights.rest()
        kind = None if dtype is None else resolve_dtype(dtype, self.device)
        save_folder(self.components, path, kind, max_shard_size=max_shard_size)

    def save_single_file(self, path: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Write a checkpoint in one file with the keys that other tools expect. What adapters add is in it. dtype: of
        the file; default the model's.
        """
        self.components.weights.rest()
        save_single_file(self.components, path, None if dtype is None else resolve_dtype(dtype, self.device))

    @property
    def unet(self) -> UNet:
        """The denoiser, with the adapters that are loaded."""
        self.components.weights.rest()
        return self.components.unet

    @property
    def text_encoder(self) -> AnyEncoder:
        """The text encoder with its tokenizer, with the adapters that are loaded."""
        self.components.weights.rest()
        return self._encoder

    @text_encoder.setter
    def text_encoder(self, encoder: AnyEncoder) -> None:
        self._encoder = encoder

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.components.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's type; the state of a run is float32 in any case."""
        return self.components.unet.conv_in.weight.dtype

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the model was opened and is sampled."""
        return (*self.components.notes, *filter(None, [self.sampling().note]))

    def sampling(self, request: Request | None = None) -> Sampling:
        """How a request (None: one that leaves all open) is sampled on the model's noise schedule."""
        order, c = request or Request(), self.components
        if self.sampler and (chosen := self.sampler(order)):
            return chosen
        return sampling_of(c.scheduler_config, order, order.scheduler or c.generation.get("scheduler"), c.is_xl)

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> "Pipeline":
        """Move the networks, or change their type; returns self."""
        where = self.device if device is None else resolve_device(device)
        self.components.weights.bare()
        for model in self.components.networks.values():
            model.to(where, self.dtype if dtype is None else resolve_dtype(dtype, where))
        if self.refiner:
            self.refiner.to(device, dtype)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str] | Request | None = None,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        **fields: Any,
    ) -> Result:
        """Draw. `prompt` is text, several texts, or a Request; `fields` are the Request's fields by name.

        generator: where noise comes from in place of the seeds; one for all images (as in diffusers, then image i
        depends on the ones before it), or one each. latents: unit noise [B, C, H, W] to begin with; with a
        denoising_start the latents of the model that ended there. prompt_embeds, negative_prompt_embeds: [N, T, D] in
        place of the prompts, for SDXL with the pooled ones, [N, D']. UsageError: a value out of range, or a request
        that does not fit the model or the memory. NumericalError: a latent or picture that is not finite; no picture
        is made of it.
        """
        given = None if prompt_embeds is None else Conditioning(prompt_embeds, pooled_prompt_embeds)
        other = negative_prompt_embeds
        negative = None if other is None else Conditioning(other, negative_pooled_prompt_embeds)
        order = self.resolve(make_request(prompt, fields), given)
        step = None
        for step in self.sample(order, generator, latents, given, negative):  # noqa: B007  # the last is wanted
            pass
        assert step is not None  # a request has at least one step
        final = step.latents
        seeds = order.seed if isinstance(order.seed, tuple) and generator is None else ()
        said = self.remarks(order)
        if order.output_type == "latent":
            return Result(final, seeds, order, final, notes=said)
        images, flags, notes = self.finished(final, order)
        return Result(pictures_of(order, images, order.output_type), seeds, order, final, flags, (*said, *notes))

    def resolve(self, request: Request, given: Conditioning | None = None) -> Request:
        """The request with every open choice made: the model's defaults, the size, the seeds (drawn if there are
        none). UsageError where it cannot be drawn.
        """
        order, count = settled(self.components, request), self.count(request, given)
        loras.fetch(self.components, order, self.lora_dir)
        return resolved(self.components, self.sampling(order), order, count)

    def remarks(self, request: Request) -> tuple[str, ...]:
        """What a resolved request asks that will not be heeded, or otherwise than it may seem; a sentence each."""
        said = unheard(self._encoder, request) if request.prompts else ()
        return (*filter(None, [self.sampling(request).note]), *said, *mask_remarks(self.components, request))

    def count(self, request: Request, given: Conditioning | None = None) -> int:
        """How many pictures a request asks for. UsageError: none, too many, or both prompts and embeddings."""
        if (given is None) == (not request.prompts):
            raise UsageError("give a prompt or prompt_embeds (one of them), for example 'a taco on a red background'")
        count = request.num_images_per_prompt * (len(request.prompts) if given is None else len(given))
        if count > MOST_IMAGES:
            raise UsageError(f"{count} pictures were asked for; ask for at most {MOST_IMAGES} at once")
        return count

    @torch.inference_mode()
    def sample(
        self,
        request: Request,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        given: Conditioning | None = None,
        negative: Conditioning | None = None,
        resume: Step | None = None,
    ) -> Iterator[Step]:
        """Draw step by step: yields a Step after each, whose x0 is the estimate of the latents so far.

        Stop whenever you like: `pictures(step.x0)` is the best there is. resume: a Step of the same request (it can be
        pickled) after which to go on, with the same bits as if it had never stopped. given, negative: embeddings in
        place of the prompts; otherwise as in `__call__`.
        """
        order = self.resolve(request, given)
        assert isinstance(order.seed, tuple)
        draws = generators(generator, order.seed, order.noise_source or "cpu")
        count, step = 0, resume
        for walk, length in self._parts(order, draws, given, negative):
            if resume is None or resume.index < count + length:
                later = replace(resume, index=resume.index - count) if resume and resume.index >= count else None
                for step in walk(latents, later):
                    yield replace(step, index=count + step.index)
            assert step is not None
            latents, count = step.latents, count + length

    def _parts(
        self, order: Request, draws: Sequence[Generator], given: Conditioning | None, negative: Conditioning | None
    ) -> Iterator[tuple[Callable[[Tensor | None, Step | None], Iterator[Step]], int]]:
        """What a resolved request is carried out in, in order: a walk and how many steps it has."""
        split = bool(self.refiner and not order.denoising_start and order.denoising_end == 1 != order.refiner_start)
        if split and (given or negative):
            raise UsageError("embeddings were given and the model has a refiner, which reads others; give prompts")
        run = self.run(replace(order, denoising_end=order.refiner_start) if split else order, draws, given, negative)
        if order.source_prompt is not None:
            back = self.run(source_of_edit(order), draws, ground=run.ground)
            yield back.inverted, len(back.levels.timesteps)
        yield run.steps, total(run.laps)
        if split and self.refiner:
            rest = replace(untagged(order), denoising_start=order.refiner_start, clip_skip=None)
            run = self.refiner.run(self.refiner.resolve(rest), draws)  # the noise reads on
            yield run.steps, total(run.laps)

    def run(
        self,
        order: Request,
        draws: Sequence[Generator],
        given: Conditioning | None = None,
        negative: Conditioning | None = None,
        ground: Ground | None = None,
    ) -> Run:
        """A run of a resolved request by this model alone: prompt -> embeddings, and what else it is made of. ground:
        its picture, if that is encoded already.
        """
        sampling, at_once = self.sampling(order), len(draws) if self.device.type == "cuda" else 1
        return run_of(
            self.components, self.vae, self._encoder, sampling, order, draws, at_once, given, negative, ground
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 3, fH, fW], about [-1, 1], float32. size: (height, width) in pixels of
        the upper left part that is kept. NumericalError: images that are not finite in any type.
        """
        return decoded(self.vae, latents, decoding_types(self.components.unet, self.vae), size)[0]

    @torch.inference_mode()
    def shown(
        self, latents: Tensor, size: tuple[int, int] | None = None, axes: str = ""
    ) -> tuple[Tensor, tuple[bool, ...], tuple[str, ...]]:
        """Latents -> images [B, 3, H, W] as `decode`, but black where the model's safety checker flags them, its
        verdicts (none where there is no checker), and notes for the user. axes: along which they are seamless.
        """
        with seamless(axes):
            images, notes = decoded(self.vae, latents, decoding_types(self.components.unet, self.vae), size)
        checker = self.components.safety_checker
        flags = flagged(checker, to_pil(images)) if checker else ()
        for i in (i for i, flag in enumerate(flags) if flag):
            images[i] = -1
        return images, flags, notes

    def finished(self, latents: Tensor, request: Request) -> tuple[Tensor, tuple[bool, ...], tuple[str, ...]]:
        """As `shown`, of a resolved request: at its size, and where it edits a picture, put into that [B, 3, H, W], or
        [B, 4, H, W] where that is transparent somewhere.
        """
        images, flags, notes = self.shown(latents, (request.height or 0, request.width or 0), request.seamless or "")
        return pasted(self.components, request, images), flags, notes

    def pictures(self, latents: Tensor, output_type: str = "pil", size: tuple[int, int] | None = None) -> Pictures:
        """Latents -> images -> PIL pictures, a tensor [B, 3, H, W] or an array [B, H, W, 3] in 0..1. A picture that the
        model's safety checker flags is black. size: as of `decode`.
        """
        return of_type(self.shown(latents, size)[0], output_type)
