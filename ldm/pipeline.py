"""Text to image: prompt -> embeddings -> latents -> image. Read this file first.

B images, C latent channels, H W latent height and width, T tokens, D text width.
"""

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

from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import open_folder, save_folder
from ldm.conditioning import SIZES, conditioning, encoder_of, sizes
from ldm.diffusion.guidance import guided, guided_rescaled
from ldm.diffusion.prediction import PREDICTIONS, Denoiser, Estimate, c_in
from ldm.diffusion.spacing import Levels
from ldm.errors import ModelError, NumericalError, UsageError
from ldm.images import to_numpy, to_pil
from ldm.models.unet import UNet
from ldm.models.vae import AutoencoderKL
from ldm.noise import Noise, checked_latents, generators, slerp
from ldm.request import MOST_IMAGES, Request, make_request
from ldm.runtime import refuse_if_too_large, resolve_device, resolve_dtype, short_name
from ldm.schedulers import Option, Sampling, Step, from_config
from ldm.text.encoder import Conditioning, JoinedEncoders, TextEncoder

THE_BOX = "the model in the box"
FALLBACKS = {"num_inference_steps": 25, "guidance_scale": 7.5}  # of a model without generation_config.json
XL_FALLBACKS = FALLBACKS | {"guidance_scale": 5.0}
WANTS = {"inpainting": "an image and a mask", "instruct-pix2pix": "an image", "upscaling": "a small image"}


@dataclass(frozen=True)
class Result:
    """What a request gave. `request` is the one carried out, with every choice that was left open filled in."""

    images: list[Image.Image] | Tensor | NDArray[np.float32]  # by output_type
    seeds: tuple[int, ...]  # of each picture; () where the noise came from `generator`
    request: Request
    latents: Tensor  # [B, C, H, W] float32, in the network's frame (scaled, as the VAE's decode takes them)


class Pipeline:
    """A latent diffusion model, ready to draw. `unet`, `vae`, `text_encoder` and `schedule` are plain attributes."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self.unet: UNet = components.unet
        self.vae: AutoencoderKL = components.vae
        self.text_encoder: TextEncoder | JoinedEncoders = encoder_of(components)
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
        for model in self.components.networks.values():
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
        if order.output_type == "latent":
            return Result(final, seeds, order, final)
        return Result(self.pictures(final, order.output_type), seeds, order, final)

    def resolve(self, request: Request, given: Conditioning | None = None) -> Request:
        """The request with every open choice made: the model's defaults, the size, the seeds (drawn if there are
        none). UsageError where it cannot be drawn.
        """
        side = self.unet.config.sample_size * self.vae.config.factor
        scheduler = self.sampling(request.scheduler).scheduler.name
        known: dict[str, Any] = {"height": side, "width": side, "scheduler": scheduler}
        known |= XL_FALLBACKS if self.components.is_xl else FALLBACKS
        known |= self.components.generation
        chosen = {name: value for name, value in known.items() if getattr(request, name) is None}
        count = self.count(request, given)
        drawn = ("seed", "variation_seed") if request.variation_strength else ("seed",)
        chosen |= {name: secrets.randbelow(2**32) for name in drawn if getattr(request, name) is None}
        order = replace(request, **chosen)
        self._refuse_unfit(order)
        return replace(order, seed=order.seeds(count), variation_seed=order.variation_seeds(count))

    def _refuse_unfit(self, order: Request) -> None:
        """UsageError for what this model, scheduler or machine cannot draw, be it one picture."""
        assert order.height and order.width
        factor, config = self.vae.config.factor, self.unet.config
        if self.components.task != "text-to-image":
            raise UsageError(
                f"this is a model for {self.components.task} ({config.in_channels} channels): it wants "
                f"{WANTS[self.components.task]} beside the words, and cannot draw from words alone"
            )
        if not config.projection_class_embeddings_input_dim:
            for name in SIZES:
                if getattr(order, name):
                    raise UsageError(f"{name} is {getattr(order, name)}, and this model hears no sizes (SDXL does)")
        if order.height % factor or order.width % factor:
            raise UsageError(
                f"size {order.width}x{order.height}; width and height must be multiples of {factor} for this model"
            )
        solver_options(self.sampling(order.scheduler), order)
        refuse_if_too_large(self.unet, self.vae, order.height, order.width, 1, 1)

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
    ) -> Iterator[Step]:
        """Draw step by step: yields a Step after each, whose x0 is the estimate of the latents so far.

        given, negative: embeddings in place of the prompts; otherwise as in `__call__`.
        """
        order = self.resolve(request, given)
        assert order.height and order.width and order.num_inference_steps and order.guidance_scale is not None
        assert isinstance(order.seed, tuple)
        images, factor = len(order.seed), self.vae.config.factor
        at_once = images if self.device.type == "cuda" else 1
        refuse_if_too_large(self.unet, self.vae, order.height, order.width, at_once, images)

        guiding = order.guidance_scale != 1
        text = conditioning(self.components, order, guiding, given, negative)  # prompt -> embeddings
        text = text.to(self.device, self.dtype)

        sampling = self.sampling(order.scheduler)
        levels = sampling.scheduler.levels(sampling.schedule, order.num_inference_steps, sampling.spacing)
        levels = levels.part(order.denoising_start, order.denoising_end, sampling.schedule.num_train_timesteps)
        denoise = self.denoiser(sampling, levels, text, sizes(self.components, order, images, guiding), images)
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
        if order.denoising_start and latents is None:
            raise UsageError("denoising_start wants the latents of the model that ended there; give latents")
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

    def denoiser(
        self, sampling: Sampling, levels: Levels, text: Conditioning, sizes: Tensor | None, images: int
    ) -> Denoiser:
        """The U-Net as a function of the noise level: the one bridge between solvers, which know sigmas, and
        networks, which know timesteps.

        On the CPU each image is a network call of its own (with the other half of its guidance pair), so that its
        pixels do not depend on the images drawn beside it; on CUDA all go at once.
        """
        kind = PREDICTIONS[sampling.prediction]
        timesteps = dict(zip(levels.sigmas, levels.timesteps, strict=False))
        alone = [slice(i, None, images) for i in range(images)]  # image i, and image i of the other half
        rows = [slice(None)] if self.device.type == "cuda" else alone
        extras = [None if extra is None else extra.to(self.device) for extra in (text.pooled, sizes)]
        prepared = [(r, self.unet.prepare(text.context[r], *(e if e is None else e[r] for e in extras))) for r in rows]

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


def solver_options(sampling: Sampling, order: Request) -> dict[str, Option]:
    """The model's options of its solver, and the request's eta. UsageError when that scheduler has no eta."""
    if order.eta is None:
        return sampling.options
    if "eta" not in sampling.scheduler.options:
        raise UsageError(
            f"eta is {order.eta}, but {sampling.scheduler.name} has none; use ddim or euler_a, or leave it out"
        )
    return sampling.options | {"eta": order.eta}
