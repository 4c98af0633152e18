"""Stage two: the denoiser on the first stage's latents, told what the frozen text encoder says (Rombach et al. 2022,
sec. 3.3).
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checkpoints.components import DIFFUSION, Components
from ldm.checkpoints.folder import refuse_other_folder
from ldm.checkpoints.load import load_into
from ldm.checkpoints.safe import atomic_json, atomic_save_safetensors, write_manifest
from ldm.conditioning import encoder_of
from ldm.data.cache import of_networks
from ldm.data.emoji import EmojiScenes
from ldm.diffusion.losses import DiffusionLoss
from ldm.errors import UsageError
from ldm.models.tiny_vae import AutoencoderTiny
from ldm.models.unet import UNet, init_for_training
from ldm.models.vae import AutoencoderKL
from ldm.pipeline import Pipeline
from ldm.schedulers import trained_on
from ldm.text.encoder import TextEncoder
from ldm.text.tokenizer import CLIPTokenizer
from ldm.training.clip import CaptionedBatches
from ldm.training.config import DenoiserConfig, LoopConfig
from ldm.training.first_stage import HELD_OUT_SEED, tile, to_signal, trained
from ldm.training.loop import RESULT, Batch, Stage, ahead, device_of, generator

TELLING = 64  # scenes that tell whether all are rendered as they were
HELD_OUT_SCENES = 256
ENCODED_AT_ONCE = 64
log = logging.getLogger(__name__)


class LatentBatches(Dataset[Batch]):
    """Batch i of encoded scenes: means and deviations of the posterior [B, C, H, W] and caption ids [B, T]; every
    scene once an epoch, in an order that depends on (seed, epoch) alone.
    """

    def __init__(self, encoded: Batch, batch_size: int, seed: int) -> None:
        self.encoded, self.batch_size, self.seed = encoded, batch_size, seed
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __getitem__(self, index: int) -> Batch:
        per_epoch = len(self.encoded[0]) // self.batch_size
        epoch, place = divmod(index, per_epoch)
        if self.order[0] != epoch:
            self.order = (epoch, torch.randperm(len(self.encoded[0]), generator=generator(self.seed, epoch)))
        chosen = self.order[1][place * self.batch_size : (place + 1) * self.batch_size]
        return tuple(part[chosen] for part in self.encoded)


class LatentDiffusion(nn.Module):
    """The diffusion loss of a batch of latents: posterior sample, random level, caption (or none), U-Net."""

    def __init__(self, config: DenoiserConfig, frozen: Components, loss: DiffusionLoss) -> None:
        super().__init__()
        self.config, self.loss = config, loss
        self.unet = frozen.unet
        words = words_of(frozen)
        self.text = words.model.requires_grad_(False)
        self.scale = frozen.vae.config.scaling_factor
        self.empty: Tensor
        self.register_buffer("empty", words.tokenizer([""]).ids)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        mean, std, ids = batch
        noises = generator(self.config.loop.seed, step)
        kept = torch.rand(len(mean), generator=noises) >= self.config.caption_dropout
        t = self.timesteps(len(mean), noises)
        sample, noise = (torch.randn(mean.shape, generator=noises).to(mean.device) for _ in range(2))
        x0 = (mean.float() + std.float() * sample) * self.scale
        ids = torch.where(kept.to(ids.device)[:, None], ids.long(), self.empty)
        losses = self.losses(self.unet, x0, ids, t.to(mean.device), noise)
        return losses.mean(), {}

    def timesteps(self, n: int, noises: torch.Generator) -> Tensor:
        """n random timesteps: evenly, or more often where most of the picture is decided (logit-normal)."""
        total, c = self.loss.schedule.num_train_timesteps, self.config
        if not c.timestep_std:
            return torch.randint(total, (n,), generator=noises)
        place = torch.sigmoid(c.timestep_mean + c.timestep_std * torch.randn(n, generator=noises))
        return (place * total).long().clamp(max=total - 1)

    def losses(self, unet: nn.Module, x0: Tensor, ids: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Weighted loss of each sample [B]."""
        with torch.no_grad():
            context = self.text(ids)[0]
        x0, noise = (v.contiguous(memory_format=torch.channels_last) for v in (x0, noise))
        return self.loss(lambda x, t: unet(x, t, context), x0, t, noise)


def scheduler_config(config: DenoiserConfig) -> dict[str, object]:
    """The scheduler_config.json of the trained model; a scheduler that takes zero terminal SNR starts at the very end
    ("trailing").
    """
    if config.prediction_type == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # only "leading" heeds it; diffusers warns of any other
    }


def components(config: DenoiserConfig) -> Components:
    """The frozen parts of the finished stages and a fresh U-Net. UsageError when a stage was not trained yet."""
    torch.manual_seed(config.loop.seed)
    text_encoder = trained(Path(config.clip) / "text_encoder", "CLIPTextModel")
    unet = UNet(config.unet)
    init_for_training(unet)
    if config.start:
        load_into(unet, Path(config.start) / "unet" / f"{DIFFUSION}.safetensors", torch.float32)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    tokenizer = CLIPTokenizer.from_folder(Path(config.clip) / "tokenizer", config_window(text_encoder))
    defaults = {
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "scheduler": config.scheduler,
    }
    return Components(
        unet=unet,
        vae=trained(Path(config.first_stage), "AutoencoderKL"),  # type: ignore[arg-type]  # an AutoencoderKL
        text_encoder=text_encoder,  # type: ignore[arg-type]  # a CLIPTextModel
        tokenizer=tokenizer,
        scheduler_config=scheduler_config(config),
        generation=defaults,
    )


def words_of(frozen: Components) -> TextEncoder:
    """The one text encoder of a model that is trained here."""
    encoder = encoder_of(frozen)
    assert isinstance(encoder, TextEncoder)
    return encoder


def config_window(text_encoder: nn.Module) -> int:
    """How many tokens a text encoder takes."""
    return int(text_encoder.config.max_position_embeddings)  # type: ignore[union-attr,arg-type]


@torch.inference_mode()
def encode(
    vae: AutoencoderKL | AutoencoderTiny, tokenizer: CLIPTokenizer, scenes: EmojiScenes, count: int, workers: int = 0
) -> Batch:
    """Scenes 0 ... count - 1 as (means, deviations) float16 [N, C, H, W], unscaled, and caption ids int32 [N, T].

    workers: processes that render ahead; 0 renders in this one.
    """
    device, parts = next(vae.parameters()).device, list[Batch]()
    batches = CaptionedBatches(scenes, tokenizer, ENCODED_AT_ONCE)
    for number, (images, ids) in ahead(batches, range(math.ceil(count / ENCODED_AT_ONCE)), workers):
        mean, logvar = vae.posterior(to_signal(images.to(device)))
        parts.append((mean.half().cpu(), (0.5 * logvar).exp().half().cpu(), ids.int()))
        if number % 100 == 0:
            log.info("encoded %d of %d scenes", number * ENCODED_AT_ONCE, count)
    return tuple(torch.cat(column)[:count] for column in zip(*parts, strict=True))


def cached(c: LoopConfig, count: int, frozen: Components, scenes: EmojiScenes) -> Batch:
    """`encode`, kept in the run's folder under a digest of all it depends on; how scenes are rendered, the
    first ones tell.
    """
    tokenizer = words_of(frozen).tokenizer
    first = [scenes.scene(i) for i in range(min(count, TELLING))]
    known = [asdict(scenes.config), count, scenes.seed, [scene.caption for scene in first]]
    known += [tokenizer.vocab, tokenizer.merges, tokenizer.max_length, frozen.vae.config.to_dict()]
    digest = hashlib.sha256(json.dumps([*known, of_networks({"vae": frozen.vae})]).encode())
    digest.update(np.stack([scene.image for scene in first]).tobytes())
    path = Path(c.out) / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = encode(frozen.vae, tokenizer, scenes, count, c.workers)
        atomic_save_safetensors(dict(zip(("mean", "std", "ids"), encoded, strict=True)), path)
    kept = load_file(path)
    return kept["mean"], kept["std"], kept["ids"]


def denoiser(config: DenoiserConfig) -> Stage:
    """The stage of a configuration. Its result is a whole model folder; `weights` names a second place for it."""
    if config.latents < config.loop.batch_size:
        raise UsageError(f"latents is {config.latents}; it must be at least loop.batch_size, {config.loop.batch_size}")
    if config.weights:
        refuse_other_folder(Path(config.weights))
    frozen = components(config)
    fixed_parts = ("vae", "text_encoder", *(["unet"] if config.start else []))
    base = of_networks({name: frozen.networks[name] for name in fixed_parts})
    frozen.vae.to(device_of(config.loop.device, config.loop.threads))
    scenes = EmojiScenes(config.corpus, config.loop.seed)
    sample_prompts(scenes)  # refuses a corpus without them before anything is trained
    schedule, prediction = trained_on(frozen.scheduler_config)
    objective = LatentDiffusion(config, frozen, DiffusionLoss(schedule, prediction, config.snr_gamma or None))
    unseen = EmojiScenes(config.corpus, HELD_OUT_SEED)
    mean, _, ids = encode(frozen.vae, words_of(frozen).tokenizer, unseen, HELD_OUT_SCENES)
    fixed = generator(HELD_OUT_SEED, 0)
    noise = torch.randn(mean.shape, generator=fixed)
    t = torch.linspace(0, schedule.num_train_timesteps - 1, HELD_OUT_SCENES).round().long()

    def drawing(unet: nn.Module) -> Pipeline:
        assert isinstance(unet, UNet)
        pipeline = Pipeline(replace(frozen, unet=unet))
        return pipeline.to(pipeline.device)  # the autoencoder is no part of the objective, which accelerate has moved

    @torch.inference_mode()
    def held_out(unet: nn.Module) -> dict[str, float]:
        device = next(unet.parameters()).device
        x0 = (mean.float() * objective.scale).to(device)
        parts = [
            objective.losses(unet, x0[s], ids[s].long().to(device), t[s].to(device), noise[s].to(device))
            for s in (slice(i, i + 32) for i in range(0, len(x0), 32))
        ]
        return {"loss": float(torch.cat(parts).mean())}

    def picture(unet: nn.Module) -> Image.Image:
        drawn = drawing(unet)(sample_prompts(scenes), seed=0, output_type="pt").images
        assert isinstance(drawn, Tensor)
        return tile(drawn * 2 - 1, 8)

    def export(unet: nn.Module, folder: Path) -> None:
        pipeline = drawing(unet)
        for place in filter(None, (str(folder / RESULT), config.weights)):
            pipeline.save_pretrained(place, dtype="fp16")
            atomic_json(Path(place) / "vocabulary.json", scenes.vocabulary())
            write_manifest(place)

    encoded = cached(config.loop, config.latents, frozen, scenes)
    batches = LatentBatches(encoded, config.loop.batch_size, config.loop.seed)
    return Stage(objective, objective.unet, batches, held_out, picture, export, base=base)


def sample_prompts(scenes: EmojiScenes) -> Sequence[str]:
    """Held-out combinations that sample pictures show: 16 single objects, 8 pairs in a relation."""
    specs = [*scenes.held_out_specs(16, 1, "single"), *scenes.held_out_specs(8, 1, "pair")]
    return [spec.caption() for spec in specs]
