"""Where and in what precision a model runs, and whether a request fits into memory."""

from typing import Any

import torch

from ldm.errors import UsageError, choose
from ldm.memory import available_bytes

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
DEVICES = ("auto", "cpu", "cuda")
LIVE_MAPS = 4  # feature maps of the widest level that a network holds at once, its input and output included


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device of its name; None and "auto" are CUDA if there is one, else the CPU. UsageError: unknown, or CUDA
    asked and absent.
    """
    kind, colon, index = str(device or "auto").partition(":")
    choose("device", kind, DEVICES)
    if colon and not (index.isdecimal() and kind == "cuda"):
        raise UsageError(f"device is {str(device)!r}; it must be auto, cpu, cuda, or cuda:0, cuda:1 ...")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "cuda was asked for, but torch sees no CUDA device; use cpu, or install a CUDA build of torch and "
            "its driver"
        )
    if index and int(index) >= torch.cuda.device_count():
        raise UsageError(
            f"device is {str(device)!r}; this machine has {torch.cuda.device_count()}, counted from cuda:0"
        )
    return torch.device(kind, int(index)) if index else torch.device(kind)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The weights' type of its name; None is bfloat16 on CUDA and float32 on the CPU. UsageError: unknown."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[choose("dtype", short_name(dtype) if isinstance(dtype, torch.dtype) else str(dtype), DTYPES)]


def short_name(dtype: torch.dtype) -> str:
    """'float32' of torch.float32."""
    return str(dtype).removeprefix("torch.")


def latent_sides(height: int, width: int, factor: int) -> tuple[int, int]:
    """Height and width of the latents of a picture of any size: as many as cover it, at `factor` pixels each."""
    return -(-height // factor), -(-width // factor)


def decoding_types(unet: Any, vae: Any) -> tuple[torch.dtype, ...]:
    """The types in which latents are decoded: the first, and those that follow where its images are not finite.

    CUDA: that of the weights, bfloat16 where the device has it, float32; not float16 for an autoencoder of SDXL whose
    config says `force_upcast` (diffusers heeds it there alone, and takes float32). CPU: always float32, which holds all
    and is the fastest: where the processor has no instructions for the others, a convolution took 1.5 times as long in
    bfloat16 and 39 times as long in float16.
    """
    weight = next(vae.parameters())
    if weight.device.type == "cpu":
        return (torch.float32,)
    own, types = weight.dtype, (torch.float16, torch.bfloat16, torch.float32)
    brain = own == torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    wider = [kind for kind in types[types.index(own) :] if kind != torch.bfloat16 or brain]
    xl = bool(unet.config.projection_class_embeddings_input_dim)
    overflows = own == torch.float16 and xl and getattr(vae.config, "force_upcast", False)
    return tuple(wider[1:] if overflows else wider)


def working_bytes(unet: Any, vae: Any, height: int, width: int, images: int) -> int:
    """About how much memory drawing takes beyond the weights: the widest feature maps of one U-Net call and one VAE
    call, the latents and the pictures. height, width in pixels; images: how many are in one network call on this
    device.
    """
    item, factor = unet.conv_in.weight.element_size(), vae.config.factor
    rows, columns = latent_sides(height, width, factor)
    down, widest = unet.config.block_out_channels, vae.config.block_out_channels
    unet_map = 2 * images * max(2 * w * (rows >> i) * (columns >> i) for i, w in enumerate(down))
    # The decoder reaches each resolution with the width of the level below it.
    vae_map = images * max(
        widest[min(i + 1, len(widest) - 1)] * (rows * factor >> i) * (columns * factor >> i) for i in range(len(widest))
    )
    own, first = next(vae.parameters()).dtype, decoding_types(unet, vae)[0]
    copied = 0 if own == first else sum(p.numel() for p in vae.decoder.parameters())
    decoding = first.itemsize * (LIVE_MAPS * vae_map + copied)
    return int(max(LIVE_MAPS * item * unet_map, decoding) + images * height * width * 3 * 8)


def refuse_if_too_large(unet: Any, vae: Any, height: int, width: int, at_once: int, total: int) -> None:
    """UsageError, before anything is allocated, when a request does not fit into the memory there is."""
    device = unet.conv_in.weight.device
    need = working_bytes(unet, vae, height, width, at_once) + (total - at_once) * height * width * 3 * 4
    have = available_bytes(device)
    if need > have:
        raise UsageError(
            f"{total} picture{'s' * (total > 1)} of {width}x{height} would take about {need / 2**30:.1f} GiB, and "
            f"{have / 2**30:.1f} GiB are free on {device.type}; ask for a smaller size or fewer at once"
        )
