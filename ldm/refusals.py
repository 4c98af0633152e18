"""What a run is refused for: requests that its model, scheduler or machine cannot draw, and numbers that went wrong."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.checkpoints.components import Components
from ldm.conditioning import SIZES
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import NumericalError, UsageError
from ldm.models.seamless import refuse_unjoined
from ldm.models.tiny_vae import TinyVAEConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.request import Request
from ldm.runtime import refuse_if_too_large, short_name
from ldm.schedulers import Sampling

WANTS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "text-to-image": ("words", ()),
    "inpainting": ("an image and a mask", (("image",), ("mask_image", "extend"))),
    "instruct-pix2pix": ("an image", (("image",),)),
    "upscaling": ("a small image", ((),)),  # not built
}
"""Of each task, what a network wants, and the fields of Request of which one must be there."""


def refuse_unfit(c: Components, sampling: Sampling, order: Request) -> None:
    """UsageError for what this model, scheduler or machine cannot draw, be it one picture."""
    assert order.height and order.width
    factor, config = c.vae.config.factor, c.unet.config
    if any(all(getattr(order, n) is None for n in names) for names in WANTS[c.task][1]):
        raise UsageError(
            f"this is a model for {c.task} ({config.in_channels} channels): it wants "
            f"{WANTS[c.task][0]} beside the words, and cannot draw from words alone"
        )
    if order.image_guidance_scale is not None and (c.task != "instruct-pix2pix" or order.guidance_rescale):
        other = "guidance_rescale" if order.guidance_rescale else f"a model for {c.task}"
        raise UsageError(
            f"image_guidance_scale is {order.image_guidance_scale} with {other}; it is for models that edit by "
            "instructions (instruct-pix2pix), without guidance_rescale"
        )
    if order.seamless:
        refuse_unjoined(order.seamless, order.height, order.width, factor << (len(config.block_out_channels) - 1))
    if not config.projection_class_embeddings_input_dim:
        for name in SIZES:
            if getattr(order, name):
                raise UsageError(f"{name} is {getattr(order, name)}, and this model hears no sizes (SDXL does)")
    least = factor * lone_pixels(config, c.vae.config) + 1
    if max(order.height, order.width) < least:
        raise UsageError(f"size {order.width}x{order.height}; the longer side must be at least {least} for this model")
    if (order.denoising_start or order.denoising_end < 1) and not isinstance(sampling.schedule, NoiseSchedule):
        raise UsageError(
            f"denoising_start is {order.denoising_start} and denoising_end {order.denoising_end}; a run is shared "
            "between models on a table of noise levels, and this model has none, so leave both out"
        )
    assert order.num_inference_steps
    sampling.solver(order.eta)
    sampling.levels(order.num_inference_steps)
    refuse_if_too_large(c.unet, c.vae, order.height, order.width, 1, 1)


def lone_pixels(unet: UNetConfig, vae: VAEConfig | TinyVAEConfig) -> int:
    """The longest side of latents that some GroupNorm would see as single numbers, which it cannot normalise: where its
    groups have one channel and its map one pixel. 0 for models without such groups: they draw from 1x1 pixels on.
    """
    widths = unet.block_out_channels
    inputs = zip((widths[0], *widths), widths, strict=False)  # of the norms at each level, 2 ** i latents a pixel
    sides = [1 << i for i, pair in enumerate(inputs) if unet.norm_num_groups in pair]
    single = isinstance(vae, VAEConfig) and vae.norm_num_groups == vae.block_out_channels[-1]
    return max([*sides, int(single)])


def refuse_infinite(finite: Sequence[Tensor], scheduler: str, dtype: torch.dtype) -> None:
    """NumericalError for the first step whose latents were not finite."""
    flags = torch.stack(list(finite)).tolist() if finite else []
    if not all(flags):
        raise NumericalError(
            f"the latents are not finite after step {flags.index(False) + 1} of {scheduler} "
            f"in {short_name(dtype)}; "
            "use dtype fp32, another scheduler or a lower guidance_scale"
        )
