"""From latents to images of the size asked for, in a type of numbers that holds them.

float16 ends at 65,504, and what goes through a decoder may be larger (that of SDXL). bfloat16 has the range of float32
and 8 bits of precision. An image that is not finite is decoded again in the next type, and the user is told.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.errors import NumericalError, UsageError
from ldm.models.tiny_vae import AutoencoderTiny
from ldm.models.vae import AutoencoderKL
from ldm.runtime import short_name

VAE = AutoencoderKL | AutoencoderTiny


def decoder_in(vae: VAE, dtype: torch.dtype) -> VAE:
    """The autoencoder, if its weights are of this type; else a copy of its decoding half that is. The given one stays
    as it is, for others may be decoding with it.
    """
    return _half_in(vae, dtype, vae.encoder)


def encoder_in(vae: VAE, dtype: torch.dtype) -> VAE:
    """The same for encoding."""
    return _half_in(vae, dtype, vae.decoder)


def _half_in(vae: VAE, dtype: torch.dtype, unused: nn.Module) -> VAE:
    if next(vae.parameters()).dtype == dtype:
        return vae
    return copy.deepcopy(vae, {id(unused): nn.Identity()}).to(dtype)


def decoded(
    vae: VAE, latents: Tensor, types: Sequence[torch.dtype], size: tuple[int, int] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Latents [B, C, H, W] in the network's frame -> images [B, 3, fH, fW], about [-1, 1], float32, and notes for the
    user. size: (height, width) in pixels of the upper left part that is kept; None keeps all.

    types: in which to decode (see `ldm.runtime.decoding_types`), each for those images that were not finite in the ones
    before. On the CPU every image is a network call of its own, so that its pixels do not depend on the images decoded
    beside it. NumericalError: not finite in the last type either. UsageError: images smaller than `size`.
    """
    where = next(vae.parameters()).device
    rows, images, notes = torch.arange(len(latents), device=where), torch.empty(0), list[str]()
    for i, dtype in enumerate(types):
        network, rest = decoder_in(vae, dtype), latents.to(where)[rows].to(dtype)
        parts = [rest] if where.type == "cuda" else rest.split(1)
        fresh = torch.cat([network.decode(part).float() for part in parts])
        images = images.index_copy(0, rows, fresh) if i else fresh
        if i:
            was, now = short_name(types[i - 1]), short_name(dtype)
            notes.append(f"a picture was not finite when decoded in {was}, and was decoded again in {now}")
        rows = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten()
        if not len(rows):
            return cropped(images, size), tuple(notes)
    if not torch.isfinite(latents).all():
        raise NumericalError("decode: the latents are not finite, and no picture is made of them")
    raise NumericalError(
        f"decode: the picture is not finite, even in {short_name(types[-1])}; "
        "use another autoencoder (vae), or a lower guidance_scale"
    )


def cropped(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The upper left part [B, 3, *size] of images [B, 3, H, W], or all. UsageError: images that are smaller.

    What lies right of it or below is cut off, so that a picture is part of the one of the next larger size that fills
    its latents: same latents, same pixels.
    """
    if size is None:
        return images
    height, width = images.shape[-2:]
    if height < size[0] or width < size[1]:
        raise UsageError(f"latents of {width}x{height} pixels for a picture of {size[1]}x{size[0]}; give larger ones")
    return images[..., : size[0], : size[1]]
