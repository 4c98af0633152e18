"""Few steps: latent consistency distillation (Luo et al. 2023a, arXiv:2310.04378) of a finished model into a LoRA on
its U-Net (LCM-LoRA: Luo et al. 2023b, arXiv:2311.05556).

Guided sampling goes along paths of an ODE from noise to pictures. A consistency function says of any point x at time t
where its path ends, so f(x, 0) = x (Song et al. 2023, arXiv:2303.01469). It is taught by neighbours: the frozen model
walks one step of DDIM down the path, and f of where it begins is drawn to f of where it ends.

- The guidance scale is fixed (the model's own): the network is not told one, as LCM's w-embedding would, so that with
  scales drawn at random it could only learn their mean. Pictures are then drawn without guidance, in half the work.
- The target is f itself without gradients, not an average of it: no decay of the target is the right limit (Song &
  Dhariwal 2023, arXiv:2310.14189, sec. 3.2), LCM-LoRA's code does so too, and it spares a second adapter. The result is
  the running average of the adapter, as in every stage.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.adapters.names import book_of
from ldm.adapters.writing import write_adapter
from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import GENERATION
from ldm.checkpoints.safe import atomic_folder, atomic_json
from ldm.conditioning import encoder_of
from ldm.data.cache import of_networks
from ldm.data.emoji import CorpusConfig, EmojiScenes
from ldm.diffusion.losses import LOSSES, Network, rates_at
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UsageError
from ldm.fast import LORA, refuse_no_model, write_fast
from ldm.lora import TARGETS, LoRA
from ldm.loras import architecture
from ldm.pipeline import Pipeline
from ldm.schedulers import network_of
from ldm.sources import open_model
from ldm.staging import FALLBACKS
from ldm.text.encoder import TextEncoder
from ldm.training.config import LoopConfig
from ldm.training.denoiser import LatentBatches, cached, encode, sample_prompts, words_of
from ldm.training.first_stage import HELD_OUT_SEED, tile
from ldm.training.loop import RESULT, Batch, Stage, device_of, generator

HELD_OUT_SCENES = 64
SCALING, DATA = 10.0, 0.5  # LCMScheduler's timestep_scaling, and the deviation of the data in eq. 9


@dataclass(frozen=True)
class DistillConfig:
    """`ldm train distill`: a LoRA with which a finished model draws in few steps."""

    loop: LoopConfig
    model: str  # the finished model: a folder, a file or a name of the hub
    weights: str = ""  # model folder whose fast mode the result becomes when the run ends; "" = only in `out`
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    latents: int = 40000  # scenes encoded once and drawn from in every epoch
    rank: int = 14  # all targets of a U-Net of 16 M parameters: 2.8 MB in float16
    lora_alpha: float | None = None  # alpha / rank multiplies the change; absent = the rank
    targets: tuple[str, ...] = tuple(TARGETS)  # LCM-LoRA's: all of attention and of the blocks' convolutions
    guidance_scale: float | None = None  # of the teacher; absent = the model's own
    points: int = 50  # times of the DDIM run that is distilled; those of 50 are where LCMScheduler looks
    skip: int = 1  # how many of its steps the teacher leaps at once; more are learned sooner, and less exactly
    huber_c: float = 1e-3  # where the pseudo-Huber loss turns from square to straight
    num_inference_steps: int = 4  # of sample pictures, and the fast mode's default


@dataclass(frozen=True, eq=False)
class Paths:
    """The probability-flow paths of a model, and the times at which they are learned.

    prediction: a name of PREDICTIONS. points, skip: as of DistillConfig. x is in the network's frame, alpha x0 + beta
    noise; t are whole times [B] of the schedule, and time 0, not yet without noise, is where a path ends (as in LCM's
    code). UsageError: more points than the schedule has times, or a skip beyond them.
    """

    schedule: NoiseSchedule
    prediction: str
    points: int = 50
    skip: int = 1

    def __post_init__(self) -> None:
        for name, most in (("points", self.schedule.num_train_timesteps), ("skip", self.points)):
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be from 1 to {most}")

    @property
    def stride(self) -> int:
        """Times from one point to the next."""
        return self.schedule.num_train_timesteps // self.points

    @property
    def times(self) -> Tensor:
        """The times of the points, rising [points]: those that diffusers' LCMScheduler visits some of."""
        return torch.arange(1, self.points + 1) * self.stride - 1

    def below(self, t: Tensor) -> Tensor:
        """Where the teacher's step from t ends."""
        return (t - self.skip * self.stride).clamp(min=0)

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A point of q(x_t | x0)."""
        alpha, beta = rates_at(self.schedule, t, x0)
        return alpha * x0 + beta * noise

    def estimates(self, x: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The x0 and the noise that a network's output at x stands for: (x, output) solved for them, by Cramer's rule.
        Of v it is a rotation, exact at SNR 0 too, where x is the noise and -output x0.
        """
        kind, (alpha, beta) = PREDICTIONS[self.prediction], rates_at(self.schedule, t, x)
        of_x0, of_noise, determinant = (f(alpha, beta) for f in (kind.of_x0, kind.of_noise, kind.determinant))
        return (of_noise * x - beta * output) / determinant, (alpha * output - of_x0 * x) / determinant

    def step(self, x: Tensor, t: Tensor, until: Tensor, output: Tensor) -> Tensor:
        """DDIM's step down from t to `until`: the same x0 and noise, mixed as they are there (Song et al. 2021,
        arXiv:2010.02502, eq. 12 without fresh noise).
        """
        x0, noise = self.estimates(x, t, output)
        return self.noised(x0, until, noise)

    def consistent(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """f(x, t) = c_skip(t) x + c_out(t) x0, which at time 0 is x itself whatever the output: Luo et al. 2023a, eq.
        9, with the scalings of `ldm.diffusion.guidance.bounded`, which draws with it.
        """
        s = (SCALING * t.to(x.dtype)).view(-1, *[1] * (x.ndim - 1))
        whole = s.square() + DATA**2
        return DATA**2 / whole * x + s / whole.sqrt() * self.estimates(x, t, output)[0]


def consistency_loss(
    paths: Paths, student: Network, teacher: Network, x: Tensor, t: Tensor, huber_c: float = 1e-3
) -> Tensor:
    """The distance [B] of f at x from f where the teacher's step from x ends: Luo et al. 2023a, algorithm 1, with the
    pseudo-Huber distance of each value, 2 (sqrt((a - b)^2 + c^2) - c). x [B, ...], t [B]. Only the student's answer at
    x is given gradients.
    """
    with torch.no_grad():
        until = paths.below(t)
        lower = paths.step(x, t, until, teacher(x, t).to(x.dtype))
        wanted = paths.consistent(lower, until, student(lower, until).to(x.dtype))
    said = paths.consistent(x, t, student(x, t).to(x.dtype))
    return LOSSES["smooth_l1"]((said - wanted).square(), torch.tensor(huber_c)).flatten(1).mean(1)


class Distillation(nn.Module):
    """The loss of a batch of latents: posterior sample, a point of the run, guided teacher, U-Net with the LoRA."""

    def __init__(self, config: DistillConfig, frozen: Components, paths: Paths, lora: LoRA) -> None:
        super().__init__()
        words = words_of(frozen)
        self.config, self.paths, self.lora = config, paths, lora
        self.unet, self.text = frozen.unet.requires_grad_(False), words.model.requires_grad_(False)
        self.factor = frozen.vae.config.scaling_factor
        own = {**FALLBACKS, **frozen.generation}["guidance_scale"]
        self.scale = float(own if config.guidance_scale is None else config.guidance_scale)
        self.empty: Tensor
        self.register_buffer("empty", words.tokenizer([""]).ids)

    def forward(self, batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        mean, std, ids = batch
        draws = generator(self.config.loop.seed, number)
        t = self.paths.times[torch.randint(self.paths.points, (len(mean),), generator=draws)]
        sample, noise = (torch.randn(mean.shape, generator=draws).to(mean.device) for _ in range(2))
        x0 = (mean.float() + std.float() * sample) * self.factor
        return self.losses(self.lora, x0, ids.long(), t.to(mean.device), noise).mean(), {}

    def losses(self, lora: LoRA, x0: Tensor, ids: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of each sample [B] with this adapter. ids: of the captions [B, T]."""
        with torch.no_grad():
            context = self.text(torch.cat([self.empty.expand_as(ids), ids]))[0]
        x = self.paths.noised(x0, t, noise).contiguous(memory_format=torch.channels_last)

        def student(x: Tensor, t: Tensor) -> Tensor:
            with lora.attached({"unet": self.unet}):
                said: Tensor = self.unet(x, t, context[len(ids) :])
            return said

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            if self.scale == 1:
                plain: Tensor = self.unet(x, t, context[len(ids) :])
                return plain
            negative, positive = self.unet(torch.cat([x, x]), torch.cat([t, t]), context).float().chunk(2)
            return torch.lerp(negative, positive, self.scale)

        return consistency_loss(self.paths, student, teacher, x, t, self.config.huber_c)


def fast_defaults(steps: int) -> dict[str, Any]:
    """What a fast mode's generation_config.json says."""
    return {"num_inference_steps": steps, "guidance_scale": 1.0, "scheduler": "lcm"}


def distill(config: DistillConfig) -> Stage:
    """The stage of a configuration. Its result is a folder with the adapter, in diffusers' names, and the request
    fields that go with it; `weights` names a model whose fast mode that becomes. Errors as of `open_model`; UsageError:
    a model that does not draw from texts of one CLIP encoder.
    """
    c = config
    if c.latents < c.loop.batch_size:
        raise UsageError(f"latents is {c.latents}; it must be at least loop.batch_size, {c.loop.batch_size}")
    if c.weights:
        refuse_no_model(c.weights)
    frozen = open_model(c.model, torch.float32, torch.device("cpu"))
    if frozen.task != "text-to-image" or not isinstance(encoder_of(frozen), TextEncoder):
        raise UsageError(f"{frozen.name} does not draw from texts of one CLIP encoder; distil a model that does")
    frozen.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    frozen.vae.to(device_of(c.loop.device, c.loop.threads))
    torch.manual_seed(c.loop.seed)
    networks, base = {"unet": frozen.unet}, of_networks(frozen.networks)
    paths = Paths(*network_of(frozen.scheduler_config), c.points, c.skip)
    objective = Distillation(c, frozen, paths, LoRA.for_model(networks, c.rank, c.lora_alpha, c.targets))
    scenes, unseen = (EmojiScenes(c.corpus, seed) for seed in (c.loop.seed, HELD_OUT_SEED))
    mean, _, ids = encode(frozen.vae, words_of(frozen).tokenizer, unseen, HELD_OUT_SCENES)
    noise = torch.randn(mean.shape, generator=generator(HELD_OUT_SEED, 0))
    t = paths.times[torch.linspace(0, c.points - 1, HELD_OUT_SCENES).round().long()]
    defaults = fast_defaults(c.num_inference_steps)

    @torch.inference_mode()
    def held_out(averaged: nn.Module) -> dict[str, float]:
        assert isinstance(averaged, LoRA)
        device = objective.empty.device
        parts = zip(*(part.split(16) for part in (mean.float() * objective.factor, ids.long(), t, noise)), strict=True)
        losses = [objective.losses(averaged, *(one.to(device) for one in part)) for part in parts]
        return {"loss": float(torch.cat(losses).mean())}

    def picture(averaged: nn.Module) -> Image.Image:
        assert isinstance(averaged, LoRA)
        pipeline = Pipeline(frozen).to(objective.empty.device)  # the autoencoder is no part of the objective
        with averaged.attached(networks):
            drawn = pipeline(sample_prompts(scenes), seed=0, output_type="pt", **defaults).images
        assert isinstance(drawn, Tensor)
        return tile(drawn.cpu() * 2 - 1, 8)

    def export(averaged: nn.Module, folder: Path) -> None:
        assert isinstance(averaged, LoRA)
        with atomic_folder(folder / RESULT) as staging:
            write_adapter(
                averaged.adapter(), staging / LORA, book_of(frozen.networks), dtype=torch.float16,
                architecture=architecture(frozen), metadata={"modelspec.title": f"few steps of {frozen.name}"},
            )  # fmt: skip
            atomic_json(staging / GENERATION, defaults)
        if c.weights:
            write_fast(c.weights, distilled=folder / RESULT)

    batches = LatentBatches(cached(c.loop, c.latents, frozen, scenes), c.loop.batch_size, c.loop.seed)
    return Stage(objective, objective.lora, batches, held_out, picture, export, base=base)
