"""A request to edit a picture: the canvas that it comes to, and what of the canvas a run begins with and keeps.

B images, C latent channels, H W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.canvas import Canvas, canvas_of
from ldm.checkpoints.components import Components
from ldm.decoding import VAE, encoder_in
from ldm.diffusion.guidance import held
from ldm.diffusion.prediction import Denoiser, Estimate
from ldm.diffusion.spacing import Levels
from ldm.diffusion.strength import freed
from ldm.errors import UsageError
from ldm.images import Pictures, of_type, to_tensor
from ldm.inputs import Source, source_of
from ldm.masks import SPOKEN, mask_of, shrunk
from ldm.models.seamless import seamless
from ldm.noise import Noise
from ldm.noise_files import GivenNoise, read_noise
from ldm.request import Request
from ldm.schedulers import Step
from ldm.schedulers.laps import laps, total

STRENGTH, STRENGTH_INSIDE = 0.8, 1.0  # where none is said: of a whole picture, and of what a mask lets be drawn
IMAGE_GUIDANCE = 1.5  # of instruct-pix2pix: Brooks et al. 2023 (arXiv:2211.09800), sec. 3.2.1
INVERTIBLE = ("ddim", "euler")
WANTS = ("inpainting", "instruct-pix2pix")  # tasks of networks that take more channels
EDIT_GUIDANCE = 1.0  # away from what a picture shows; more changes more than was asked for
INVERSION_STEPS = 50  # Mokady et al. 2022 (arXiv:2211.09794), sec. 4


def settled(c: Components, order: Request) -> Request:
    """The request with its pictures opened and what they decide: the size, the strength, how an inversion is run.
    UsageError, in one sentence, for a picture, mask or number that cannot be taken.
    """
    if order.noise is not None:
        order = _with_noise(c, order, read_noise(order.noise))
    if order.image is None:
        return order
    image = source_of(order.image, "image", order.convert_image)
    mask = order.mask_image
    if mask is not None and not (isinstance(mask, str) and SPOKEN.match(mask)):
        mask = source_of(mask, "mask_image", order.convert_image)
    order = _with_source(replace(order, image=image, mask_image=mask))
    height, width = canvas(c, order).size
    chosen: dict[str, Any] = {"height": height, "width": width}
    if order.strength is None and not (order.timesteps or order.sigmas or order.timestep_respacing):
        anew = order.source_prompt is not None or order.mask_image is not None or order.extend is not None
        chosen["strength"] = STRENGTH_INSIDE if anew or c.task == "instruct-pix2pix" else STRENGTH
    if order.image_guidance_scale is None and c.task == "instruct-pix2pix":
        chosen["image_guidance_scale"] = IMAGE_GUIDANCE
    return replace(order, **chosen)


def _with_noise(c: Components, order: Request, noise: GivenNoise) -> Request:
    """With the noise, and at its size, where none is said and there is no picture that has one."""
    order = replace(order, noise=noise)
    if order.image is not None or order.height or order.width:
        return order
    height, width = (side * c.vae.config.factor for side in noise.latents.shape[-2:])
    return replace(order, height=height, width=width)


def _with_source(order: Request) -> Request:
    """A variation of a picture is one of the noise that it comes from. What the picture shows is also what an edit
    keeps away from: so the same words, at any guidance, draw the picture again (Miyake et al. 2023, arXiv:2305.16807).
    """
    if order.variation_strength and order.strength is None and order.source_prompt is None:
        if len(order.prompts) != 1:
            raise UsageError(f"variations of a picture in {len(order.prompts)} prompts; give source_prompt, one text")
        order = replace(order, source_prompt=order.prompts[0])
    if order.source_prompt is None:
        return order
    if order.num_images_per_prompt > 1 and not order.variation_strength and order.resample == 1:
        raise UsageError(
            f"{order.num_images_per_prompt} pictures of one prompt were asked for with source_prompt, and the noise of "
            "one picture draws one; ask for 1, or give a variation_strength"
        )
    if (order.scheduler is not None and order.scheduler not in INVERTIBLE) or order.eta:
        said = f"eta {order.eta}" if order.eta else f"the scheduler {order.scheduler}"
        raise UsageError(
            f"{said} was asked for with source_prompt, and runs go back by {' or '.join(INVERTIBLE)} alone"
        )
    if not order.negative_prompt:
        scale = EDIT_GUIDANCE if order.guidance_scale is None else order.guidance_scale
        order = replace(order, negative_prompt=order.source_prompt, guidance_scale=scale)
    steps = order.num_inference_steps or (None if order.nfe else INVERSION_STEPS)
    return replace(order, scheduler=order.scheduler or "ddim", num_inference_steps=steps)


def canvas(c: Components, order: Request) -> Canvas:
    """The canvas of a request whose picture is opened (see `settled`)."""
    image, side = order.image, c.unet.config.sample_size * c.vae.config.factor
    assert isinstance(image, Source)
    mask = None if order.mask_image is None else mask_of(order.mask_image, image.image)
    return canvas_of(
        image, mask, extend=order.extend, fill=order.fill, fit=order.fit, size=(order.height, order.width),
        native=(side, side), padding=order.padding_mask_crop, grow=order.mask_grow, feather=order.mask_feather,
        invert=order.mask_invert, seed=0,
    )  # fmt: skip


class Posterior(NamedTuple):
    """What the encoder says of a picture: mean and deviation [1, C, H, W], float32, in the network's frame."""

    mean: Tensor
    deviation: Tensor


class Placed(NamedTuple):
    """What a run has drawn before its first step: the picture's latents [1 or B, C, H, W], unit noise [B, C, H, W], and
    the further channels of the network's input [1 or B, C', H, W], where it takes some.
    """

    known: Tensor
    unit: Tensor
    beside: Tensor | None


@dataclass(frozen=True, eq=False)
class Ground:
    """The picture under a run.

    image: of the canvas. told: what networks that take more channels are told of it: for inpainting the canvas without
    what the mask lets be drawn, for instruct-pix2pix the canvas, not scaled. mask: [1, 1, H, W] in 0..1, how much of
    the way every place is drawn; None: all of it. strength: None where the levels of the run are listed. as_diffusers:
    what diffusers' pipelines do, with their numbers: latents are samples of the posterior, the mask is binary, and the
    noise of what is kept is always that of the beginning.
    """

    image: Posterior
    told: Posterior | None
    mask: Tensor | None
    strength: float | None
    task: str
    as_diffusers: bool

    def placed(self, noise: Noise, unit: Callable[[], Tensor]) -> Placed:
        """What is drawn from `noise`, in diffusers' order; `unit` makes the unit noise."""
        inpainting = self.task == "inpainting"
        known = self._latents(self.image, noise, not (inpainting and self.strength == 1))
        drawn = unit()
        told = None if self.told is None else self._latents(self.told, noise, True)
        if inpainting and told is not None and self.mask is not None:
            mask = (self.mask > 0).to(told)  # such networks were trained with masks of 0 and 1
            told = torch.cat([mask.expand(len(told), -1, -1, -1), told], 1)
        return Placed(known, drawn, told if self.task in WANTS else None)

    def _latents(self, posterior: Posterior, noise: Noise, sampled: bool) -> Tensor:
        if not (self.as_diffusers and sampled and self.task != "instruct-pix2pix"):
            return posterior.mean
        return posterior.mean + posterior.deviation * noise()

    def begin(self, placed: Placed, levels: Levels) -> Tensor:
        """x at the first level: the picture under noise, and where all of the way is drawn, noise alone."""
        alone, under = placed.unit * levels.start, placed.known + levels.sigmas[0] * placed.unit
        if self.strength != 1 or (self.as_diffusers and self.mask is None and self.task == "text-to-image"):
            return under
        return alone if self.mask is None or self.as_diffusers else torch.where(self.mask == 1, alone, under)

    def noise_at(self, x: Tensor, levels: Levels) -> Tensor:
        """The unit noise with which `begin` makes x of what is drawn."""
        return x / levels.start if self.strength == 1 else (x - self.image.mean) / levels.sigmas[0]

    def keeping(self, denoise: Denoiser, placed: Placed, levels: Levels) -> Denoiser:
        """The denoiser that keeps what the mask says."""
        if self.mask is None or (self.as_diffusers and self.task != "text-to-image"):
            return denoise
        if self.as_diffusers:
            denoise = _overwritten(denoise, placed, self.mask, levels.sigmas[0])
        return held(denoise, placed.known, freed(levels, self.mask))

    def ended(self, step: Step, placed: Placed) -> Step:
        """The last step of the run. diffusers ends with the picture itself in what is kept, also where the run ends at
        a level above 0.
        """
        if self.mask is None or not self.as_diffusers or self.task != "text-to-image":
            return step
        return replace(step, x=torch.lerp(placed.known / step.scale, step.x, self.mask))


def _overwritten(denoise: Denoiser, placed: Placed, mask: Tensor, first: float) -> Denoiser:
    """As StableDiffusionInpaintPipeline has it: below the first level, what is kept is the picture under the noise of
    the beginning, whatever the solver made of it.
    """

    def seen(x: Tensor, sigma: float) -> Estimate:
        return denoise(torch.lerp(placed.known + sigma * placed.unit, x, mask) if sigma < first else x, sigma)

    return seen


@torch.inference_mode()
def ground_of(c: Components, vae: VAE, order: Request) -> Ground | None:
    """The picture of a resolved request, encoded; None where there is none."""
    if order.image is None:
        return None
    drawn, axes = canvas(c, order), order.seamless or ""
    as_diffusers, where = order.profile == "diffusers", c.unet.conv_in.weight.device
    pixels, mask = _even(to_tensor([drawn.seen]), vae.config.factor), None
    image = _posterior(vae, pixels, axes)
    told = Posterior(*(each / vae.config.scaling_factor for each in image)) if c.task == "instruct-pix2pix" else None
    if drawn.freedom is not None:
        free = _even(drawn.freedom[None, None], vae.config.factor)
        mask = shrunk(drawn.freedom, vae.config.factor).to(where)
        if as_diffusers:
            free = (free >= 0.5).float()
            mask = F.interpolate(free, mask.shape[-2:]).to(where)
        if c.task == "inpainting" or as_diffusers:
            told = _posterior(vae, pixels * (free == 0), axes)
    return Ground(image, told, mask, order.strength, c.task, as_diffusers)


def _posterior(vae: VAE, pixels: Tensor, axes: str) -> Posterior:
    """Of pixels [1, 3, fH, fW] in [-1, 1]."""
    network = encoder_in(vae, torch.float32)
    with seamless(axes):
        mean, logvar = network.posterior(pixels.to(next(network.parameters()).device))
    factor = vae.config.scaling_factor
    return Posterior(mean * factor, (0.5 * logvar).exp() * factor)


def _even(pixels: Tensor, factor: int) -> Tensor:
    """[1, C, h, w] with its last row and column repeated until both sides are multiples of `factor`."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % factor, 0, -height % factor), mode="replicate")


def guided_by_picture(order: Request) -> bool:
    """Whether a request is guided by the difference that the picture makes, beside that of the words."""
    return order.image_guidance_scale not in (None, 1)


def source_of_edit(order: Request) -> Request:
    """The run that goes back from the picture to noise, told what the picture shows, without guidance."""
    return replace(
        order, prompt=(order.source_prompt or "",) * len(order.prompts), negative_prompt="", guidance_scale=1.0
    )


def mask_remarks(c: Components, order: Request) -> tuple[str, ...]:
    """A sentence where the mask of a resolved request leaves nothing, or all, to be drawn."""
    mask = None if order.image is None else canvas(c, order).mask
    if mask is None:
        return ()
    if not mask.any():
        return ("the mask is empty (black), so nothing is drawn anew and the picture is given back; white is drawn",)
    return ("the mask is full (white), so nothing of the picture is kept",) * bool((mask == 1).all())


def pasted(c: Components, order: Request, images: Tensor) -> Tensor:
    """The pictures drawn for a resolved request [B, 3, h, w], put into the picture that it edits. diffusers' pipelines
    do so only where they draw no more than the mask's surroundings.
    """
    if order.image is None or (order.profile == "diffusers" and order.padding_mask_crop is None):
        return images
    return canvas(c, order).pasted(images)


def pictures_of(order: Request, images: Tensor, output_type: str = "pil") -> Pictures:
    """Finished images [B, 3 or 4, H, W] of a resolved request as `ldm.images.of_type` has them; PIL pictures with the
    colour profile of the picture that they edit, for their bytes mean its colours.
    """
    pictures = of_type(images, output_type)
    profile = order.image.image.info.get("icc_profile") if isinstance(order.image, Source) else None
    for picture in pictures if isinstance(pictures, list) and profile else ():
        picture.info["icc_profile"] = profile
    return pictures


def length(order: Request) -> int:
    """How many Steps `Pipeline.sample` yields for a resolved request: more than its steps where it goes back to noise
    first, or walks stretches again; fewer where its strength is counted as diffusers does.
    """
    steps = order.num_inference_steps or 0
    if order.profile == "diffusers" and order.strength is not None:
        steps = min(int(steps * order.strength), steps)
    again = total(laps(steps, order.resample, order.resample_jump))
    return again + (0 if order.source_prompt is None else steps)
