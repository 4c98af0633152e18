"""What a run is refused for: requests that its model, scheduler or machine cannot draw, and numbers that went wrong."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.checkpoints.components import Components
from ldm.conditioning import SIZES
from ldm.errors import NumericalError, UsageError
from ldm.request import Request
from ldm.runtime import refuse_if_too_large, short_name
from ldm.schedulers import Option, Sampling

WANTS = {"inpainting": "an image and a mask", "instruct-pix2pix": "an image", "upscaling": "a small image"}


def refuse_unfit(c: Components, sampling: Sampling, order: Request) -> None:
    """UsageError for what this model, scheduler or machine cannot draw, be it one picture."""
    assert order.height and order.width
    factor, config = c.vae.config.factor, c.unet.config
    if c.task != "text-to-image":
        raise UsageError(
            f"this is a model for {c.task} ({config.in_channels} channels): it wants "
            f"{WANTS[c.task]} beside the words, and cannot draw from words alone"
        )
    if not config.projection_class_embeddings_input_dim:
        for name in SIZES:
            if getattr(order, name):
                raise UsageError(f"{name} is {getattr(order, name)}, and this model hears no sizes (SDXL does)")
    if order.height % factor or order.width % factor:
        raise UsageError(
            f"size {order.width}x{order.height}; width and height must be multiples of {factor} for this model"
        )
    solver_options(sampling, order)
    refuse_if_too_large(c.unet, c.vae, order.height, order.width, 1, 1)


def solver_options(sampling: Sampling, order: Request) -> dict[str, Option]:
    """The model's options of its solver, and the request's eta. UsageError when that scheduler has no eta."""
    if order.eta is None:
        return sampling.options
    if "eta" not in sampling.scheduler.options:
        raise UsageError(
            f"eta is {order.eta}, but {sampling.scheduler.name} has none; use ddim or euler_a, or leave it out"
        )
    return sampling.options | {"eta": order.eta}


def refuse_infinite(finite: Sequence[Tensor], scheduler: str, dtype: torch.dtype) -> None:
    """NumericalError for the first step whose latents were not finite."""
    flags = torch.stack(list(finite)).tolist()
    if not all(flags):
        raise NumericalError(
            f"the latents are not finite after step {flags.index(False) + 1} of {scheduler} "
            f"in {short_name(dtype)}; "
            "use dtype fp32, another scheduler or a lower guidance_scale"
        )
