"""Text to image: prompt -> embeddings -> latents -> image. Read this file first.

B images, C latent channels, H W latent height and width, T tokens, D text width.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ldm.checkpoints.folder import Components, open_folder, save_folder
from ldm.diffusion.guidance import guided, guided_rescaled
from ldm.diffusion.prediction import PREDICTIONS, Denoiser, Estimate, c_in
from ldm.diffusion.spacing import Levels
from ldm.errors import ModelError, NumericalError, UsageError
from ldm.images import to_numpy, to_pil
from ldm.models.unet import UNet
from ldm.models.vae import AutoencoderKL
from ldm.request import MOST_IMAGES, Request, make_request
from ldm.runtime import refuse_if_too_large, resolve_device, resolve_dtype, short_name
from ldm.schedulers import Option, Sampling, Step, from_config
from ldm.text.encoder import Conditioning, TextEncoder

THE_BOX = "the model in the box"
FALLBACKS = {"num_inference_steps": 25, "guidance_scale": 7.5}  # of a model without generation_config.json


@dataclass(frozen=True)
class Result:
    """What a request gave. `request` is the one carried out, with every choice that was left open filled in."""

    images: list[Image.Image] | Tensor | NDArray[np.float32]  # by output_type
    seeds: tuple[int, ...]  # of each picture; () where the noise came from `generator`
    request: Request
    latents: Tensor  # [B, C, H, W] float32, in the network's frame (scaled, as the VAE's decode takes them)


class Noise:
    """Unit noise [B, C, H, W] float32, from one CPU generator per image: image i gets the same numbers in any batch,
    order and on any device.
    """

    dtype = torch.float32

    def __init__(
        self, generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self.generators, self.shape, self.device = generators, shape, device

    def __call__(self) -> Tensor:
        """The next numbers of every image's sequence."""
        drawn = torch.stack([torch.randn(self.shape, generator=g, device=g.device).cpu() for g in self.generators])
        return drawn.to(self.device, non_blocking=True)


class Pipeline:
    """A latent diffusion model, ready to draw. `unet`, `vae`, `text_encoder` and `schedule` are plain attributes."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self.unet: UNet = components.unet
        self.vae: AutoencoderKL = components.vae
        self.text_encoder = TextEncoder(components.tokenizer, components.text_encoder)
        self.schedule = self.sampling(None).schedule

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        variant: str | None = None,
    ) -> "Pipeline":
        """Open a model folder (diffusers layout); no path opens the model in the box.

        dtype: "fp32", "bf16", "fp16" or a torch.dtype; default float32 on the CPU, bfloat16 on CUDA. device: "cpu",
        "cuda", "cuda:1"; default CUDA if there is one. variant: "fp16" prefers `*.fp16.safetensors`. ModelError:
        missing, incomplete, damaged or of another kind. UsageError: an unknown dtype or device, CUDA asked and absent.
        """
        where = resolve_device(device)
        folder = model_in_the_box() if path is None else Path(path)
        components = open_folder(folder, resolve_dtype(dtype, where), where, variant)
        return cls(replace(components, name=THE_BOX) if path is None else components)

    def save_pretrained(self, path: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Write a model folder, whole or not at all, that this class and stock diffusers open. dtype: of the files;
        default the model's.
        """
        save_folder(self.components, path, None if dtype is None else resolve_dtype(dtype, self.device))

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's type; the state of a run is float32 in any case."""
        return self.unet.conv_in.weight.dtype

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the model was opened and is sampled."""
        return (*self.components.notes, *filter(None, [self.sampling(None).note]))

    def sampling(self, scheduler: str | None) -> Sampling:
        """The scheduler of a name (None: the model's own) on the model's noise schedule."""
        return from_config(self.components.scheduler_config, scheduler or self.components.generation.get("scheduler"))

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> "Pipeline":
        """Move the networks, or change their type; returns self."""
        where = self.device if device is None else resolve_device(device)
        for model in (self.unet, self.vae, self.text_encoder.model):
            model.to(where, self.dtype if dtype is None else resolve_dtype(dtype, where))
        return self

    def __call__(
        self,
        prompt: str | Sequence[str] | Request | None = None,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **fields: Any,
    ) -> Result:
        """Draw. `prompt` is text, several texts, or a Request; `fields` are the Request's fields by name.

        generator: where noise comes from in place of the seeds; one for all images (as in diffusers, then image i
        depends on the ones before it), or one each. latents: unit noise [B, C, H, W] to begin with. prompt_embeds,
        negative_prompt_embeds: [N, T, D] in place of the prompts. UsageError: a value out of range, or a request that
        does not fit the model or the memory. NumericalError: a latent or picture that is not finite; no picture is
        made of it.
        """
        order = self.resolve(make_request(prompt, fields), prompt_embeds)
        step = None
        for step in self.sample(order, generator, latents, prompt_embeds, negative_prompt_embeds):  # noqa: B007  # the last is wanted
            pass
        assert step is not None  # a request has at least one step
        final = step.latents
        seeds = order.seed if isinstance(order.seed, tuple) and generator is None else ()
        if order.output_type == "latent":
            return Result(final, seeds, order, final)
        return Result(self.pictures(final, order.output_type), seeds, order, final)

    def resolve(self, request: Request, prompt_embeds: Tensor | None = None) -> Request:
        """The request with every open choice made: the model's defaults, the size, the seeds (drawn if there are
        none). UsageError where it cannot be drawn.
        """
        side = self.unet.config.sample_size * self.vae.config.factor
        scheduler = self.sampling(request.scheduler).scheduler.name
        known: dict[str, Any] = {"height": side, "width": side, "scheduler": scheduler} | FALLBACKS
        known |= self.components.generation
        chosen = {name: value for name, value in known.items() if getattr(request, name) is None}
        count = self.count(request, prompt_embeds)
        drawn = ("seed", "variation_seed") if request.variation_strength else ("seed",)
        chosen |= {name: secrets.randbelow(2**32) for name in drawn if getattr(request, name) is None}
        order = replace(request, **chosen)
        self._refuse_unfit(order)
        return replace(order, seed=order.seeds(count), variation_seed=order.variation_seeds(count))

    def _refuse_unfit(self, order: Request) -> None:
        """UsageError for what this model, scheduler or machine cannot draw, be it one picture."""
        assert order.height and order.width
        factor = self.vae.config.factor
        if order.height % factor or order.width % factor:
            raise UsageError(
                f"size {order.width}x{order.height}; width and height must be multiples of {factor} for this model"
            )
        solver_options(self.sampling(order.scheduler), order)
        refuse_if_too_large(self.unet, self.vae, order.height, order.width, 1, 1)

    def count(self, request: Request, prompt_embeds: Tensor | None = None) -> int:
        """How many pictures a request asks for. UsageError: none, too many, or both prompts and embeddings."""
        if (prompt_embeds is None) == (not request.prompts):
            raise UsageError("give a prompt or prompt_embeds (one of them), for example 'a taco on a red background'")
        count = request.num_images_per_prompt * (len(request.prompts) if prompt_embeds is None else len(prompt_embeds))
        if count > MOST_IMAGES:
            raise UsageError(f"{count} pictures were asked for; ask for at most {MOST_IMAGES} at once")
        return count

    @torch.inference_mode()
    def sample(
        self,
        request: Request,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Iterator[Step]:
        """Draw step by step: yields a Step after each, whose x0 is the estimate of the latents so far. Arguments as
        in `__call__`.
        """
        order = self.resolve(request, prompt_embeds)
        assert order.height and order.width and order.num_inference_steps and order.guidance_scale is not None
        assert isinstance(order.seed, tuple)
        images, factor = len(order.seed), self.vae.config.factor
        at_once = images if self.device.type == "cuda" else 1
        refuse_if_too_large(self.unet, self.vae, order.height, order.width, at_once, images)

        guiding = order.guidance_scale != 1
        text = self.conditioning(order, guiding, prompt_embeds, negative_prompt_embeds)  # prompt -> embeddings

        sampling = self.sampling(order.scheduler)
        levels = sampling.scheduler.levels(sampling.schedule, order.num_inference_steps, sampling.spacing)
        denoise = self.denoiser(sampling, levels, text, images)
        if guiding and order.guidance_rescale:
            denoise = guided_rescaled(denoise, order.guidance_scale, order.guidance_rescale, sampling.prediction)
        elif guiding:
            denoise = guided(denoise, order.guidance_scale)

        shape = (
            self.vae.config.latent_channels,
            order.height // factor,
            order.width // factor,
        )  # embeddings -> latents
        noise = Noise(generators(generator, order.seed), shape, self.device)
        start = noise() if latents is None else checked_latents(latents, (images, *shape)).to(noise.device, noise.dtype)
        if isinstance(order.variation_seed, tuple):
            other = Noise(generators(None, order.variation_seed), shape, torch.device("cpu"))()
            start = slerp(start.cpu(), other, order.variation_strength).to(noise.device)
        solver = sampling.scheduler.bound(solver_options(sampling, order))
        finite = []
        for step in solver(denoise, start * levels.start, levels.sigmas, noise):
            finite.append(torch.isfinite(step.x).all())
            if self.device.type == "cpu":  # elsewhere reading it would wait for the device: it is asked at the end
                self.refuse_infinite(finite, sampling)
            yield step
        self.refuse_infinite(finite, sampling)

    def conditioning(
        self, order: Request, guiding: bool, prompt_embeds: Tensor | None, negative_embeds: Tensor | None
    ) -> Conditioning:
        """What the network is told: [B, T, D], or [2 B, T, D] with the negative half first when guiding."""
        n, positive, negative = order.num_images_per_prompt, order.prompts, order.negative_prompts or ("",)
        total = len(positive) if prompt_embeds is None else len(prompt_embeds)
        negative = negative * total if len(negative) == 1 else negative
        if len(negative) != total:
            raise UsageError(f"{len(negative)} negative prompts for {total} prompts; give one, or one for each")
        parts = [self.encode(positive, order.clip_skip, prompt_embeds)]
        if guiding:
            parts.insert(0, self.encode(negative, None, negative_embeds))  # diffusers' clip_skip is the prompt's alone
            shapes = [list(part.context.shape) for part in parts]
            if shapes[0] != shapes[1]:
                raise UsageError(
                    f"negative_prompt_embeds of shape {shapes[0]} with a prompt's {shapes[1]}; give equal ones"
                )
        return Conditioning.cat([part.repeat(n) for part in parts])

    def encode(self, prompts: Sequence[str], clip_skip: int | None, embeds: Tensor | None = None) -> Conditioning:
        """Prompts or ready embeddings -> Conditioning. UsageError names the words that do not fit the encoder's
        window.
        """
        if embeds is not None:
            width = self.unet.config.cross_attention_dim
            if embeds.ndim != 3 or embeds.shape[-1] != width:
                raise UsageError(
                    f"embeddings of shape {list(embeds.shape)}; this model takes [prompts, tokens, {width}]"
                )
            return Conditioning(embeds.to(self.device, self.dtype))
        for dropped in self.text_encoder.dropped(prompts):
            if dropped:
                window = self.text_encoder.tokenizer.max_length - 2
                raise UsageError(
                    f"the prompt is longer than the encoder's {window} tokens: {' '.join(dropped)!r} would be "
                    f"lost; shorten it"
                )
        # The pooled vectors are SDXL's business; ready embeddings, which may stand beside these, have none.
        return Conditioning(self.text_encoder(prompts, clip_skip).context.to(self.device, self.dtype))

    def denoiser(self, sampling: Sampling, levels: Levels, text: Conditioning, images: int) -> Denoiser:
        """The U-Net as a function of the noise level: the one bridge between solvers, which know sigmas, and
        networks, which know timesteps.

        On the CPU each image is a network call of its own (with the other half of its guidance pair), so that its
        pixels do not depend on the images drawn beside it; on CUDA all go at once.
        """
        kind = PREDICTIONS[sampling.prediction]
        timesteps = dict(zip(levels.sigmas, levels.timesteps, strict=False))
        alone = [slice(i, None, images) for i in range(images)]  # image i, and image i of the other half
        rows = [slice(None)] if self.device.type == "cuda" else alone
        prepared = [(r, self.unet.prepare(text.context[r])) for r in rows]

        def denoise(x: Tensor, sigma: float) -> Estimate:
            scaled = (x * c_in(sigma)).to(self.dtype)
            known = timesteps.get(sigma)
            t = torch.full((len(x),), sampling.schedule.t(sigma) if known is None else known, device=x.device)
            output = torch.empty_like(scaled)
            for r, said in prepared:
                output[r] = self.unet(scaled[r], t[r], said)
            return Estimate(kind.to_x0(x, sigma, output.float()))

        return denoise

    def refuse_infinite(self, finite: Sequence[Tensor], sampling: Sampling) -> None:
        """NumericalError for the first step whose latents were not finite."""
        flags = torch.stack(list(finite)).tolist()
        if not all(flags):
            raise NumericalError(
                f"the latents are not finite after step {flags.index(False) + 1} of {sampling.scheduler.name} "
                f"in {short_name(self.dtype)}; "
                "use dtype fp32, another scheduler or a lower guidance_scale"
            )

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 3, fH, fW], about [-1, 1], float32. One at a time on the CPU, for the
        same reason as above.
        """
        scaled = latents.to(self.device, self.vae.quant_conv.weight.dtype)
        parts = [scaled] if self.device.type == "cuda" else scaled.split(1)
        return torch.cat([self.vae.decode(part).float() for part in parts])

    def pictures(self, latents: Tensor, output_type: str = "pil") -> list[Image.Image] | Tensor | NDArray[np.float32]:
        """Latents -> images -> PIL pictures, a tensor [B, 3, H, W] or an array [B, H, W, 3] in 0..1."""
        images = self.decode(latents)
        if output_type == "pil":
            return to_pil(images)
        array = to_numpy(images)
        return torch.from_numpy(array).permute(0, 3, 1, 2) if output_type == "pt" else array


def model_in_the_box() -> Path:
    """The folder of the model that comes with the package: inside it when installed, beside it in a checkout.
    ModelError: not there.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "weights", here.parent / "weights"):
        if (folder / "model_index.json").is_file():
            return folder
    raise ModelError("the model in the box is missing from this installation; reinstall it, or name a model folder")


def generators(
    given: torch.Generator | Sequence[torch.Generator] | None, seeds: Sequence[int]
) -> list[torch.Generator]:
    """One generator per image. UsageError when a list of them has another length."""
    if given is None:
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    if isinstance(given, torch.Generator):
        return [given] * len(seeds)
    if len(given) != len(seeds):
        raise UsageError(f"{len(given)} generators for {len(seeds)} pictures; give one, or one for each")
    return list(given)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Noise [B, C, H, W] on the arc from a (share 0) to b (share 1), which keeps its length; the ends are exact.

    Image by image, in float64: the images beside it and the device change no bit of any.
    """
    return torch.stack([_on_arc(one, other, share) for one, other in zip(a, b, strict=True)])


def _on_arc(a: Tensor, b: Tensor, share: float) -> Tensor:
    p, q = a.double(), b.double()
    angle = math.acos(max(-1.0, min(1.0, float((p * q).sum() / (p.norm() * q.norm())))))
    whole = math.sin(angle)
    if whole < 1e-6:  # the same noise twice: no arc
        return torch.lerp(a, b, share)
    return math.sin((1 - share) * angle) / whole * a + math.sin(share * angle) / whole * b


def checked_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The latents, if they have this shape and are finite. UsageError otherwise."""
    if tuple(latents.shape) != shape:
        raise UsageError(f"latents of shape {list(latents.shape)}; this request takes {list(shape)}")
    if not torch.isfinite(latents).all():
        raise UsageError("the latents given are not all finite; give unit noise")
    return latents


def solver_options(sampling: Sampling, order: Request) -> dict[str, Option]:
    """The model's options of its solver, and the request's eta. UsageError when that scheduler has no eta."""
    if order.eta is None:
        return sampling.options
    if "eta" not in sampling.scheduler.options:
        raise UsageError(
            f"eta is {order.eta}, but {sampling.scheduler.name} has none; use ddim or euler_a, or leave it out"
        )
    return sampling.options | {"eta": order.eta}
