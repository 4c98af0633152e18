"""Looking at a run while it happens: latents as small pictures without the decoder, pictures in a terminal, a run's
estimates as a strip or an animation.
"""

import io
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import NumericalError, UsageError
from ldm.images import grid, to_pil
from ldm.models.tiny_vae import AutoencoderTiny
from ldm.models.vae import AutoencoderKL

FITTED, SIDE, SCALES = 16, 8, (1, 2, 4)  # latents to fit on, their side, and the sides of the noise in them
GAP = 2  # pixels between the pictures of a strip
FRAME, LAST_FRAME = 100, 2000  # milliseconds
BLOCKS = {(True, True): "\u2588", (True, False): "\u2580", (False, True): "\u2584", (False, False): " "}


@torch.no_grad()
def fit_latent_to_rgb(vae: AutoencoderKL | AutoencoderTiny, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The map [C, 3] and the bias [3], float32 on the CPU, from a latent pixel in the network's frame (scaled, as the
    VAE's decode takes it) to the mean colour, in [-1, 1], of the f x f pixels that become of it.

    Least squares on decoded random latents, smooth as those of pictures are: on white noise the fit is worse, because
    what a pixel becomes hangs on its neighbours. 16 latents of 8 x 8 cost a quarter of decoding one 64 x 64 latent. For
    the model in the box, smooth noise explains 0.80 of the variance of real pictures' colours, white noise 0.66, and a
    fit on those pictures themselves 0.85. Depends on the VAE and `seed` alone. NumericalError: the decoder's output is
    not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    channels = vae.config.latent_channels
    noise = [torch.randn(FITTED, channels, scale, scale, generator=generator) for scale in SCALES]
    smooth = sum(F.interpolate(part, (SIDE, SIDE), mode="bicubic") for part in noise)
    assert isinstance(smooth, Tensor)
    latents = smooth / smooth.std()
    images = vae.decode(latents.to(next(vae.parameters()))).double().cpu()
    if not torch.isfinite(images).all():
        raise NumericalError("the decoder's pictures are not finite, so no preview can be made; use dtype fp32")
    colours = F.adaptive_avg_pool2d(images, SIDE).movedim(1, -1).reshape(-1, 3)
    pixels = F.pad(latents.double().movedim(1, -1).reshape(-1, channels), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(pixels, colours).solution.float()
    return solution[:-1], solution[-1]


def preview_image(latents: Tensor, to_rgb: tuple[Tensor, Tensor]) -> Image.Image:
    """Latents [C, H, W] in the network's frame -> a picture of W x H pixels: one product of matrices.

    to_rgb: of `fit_latent_to_rgb`. UsageError: latents of another shape. NumericalError: latents that are not finite.
    """
    weight, bias = to_rgb
    if latents.ndim != 3 or len(latents) != len(weight):
        raise UsageError(f"latents of shape {list(latents.shape)}; a preview takes [{len(weight)}, height, width]")
    colours = torch.tensordot(weight.T, latents.float().cpu(), dims=1) + bias[:, None, None]
    return to_pil(colours[None])[0]


def half_blocks(image: Image.Image, columns: int, colour: bool = True) -> str:
    """A picture as lines for a terminal: each character is two pixels, one above the other, in 24-bit colours.

    It gets `columns` wide when it is wider; a smaller one is enlarged by a whole factor as far as it fits. Colours are
    reset at the end of each line; where the last line has no lower pixels, the terminal's background shows. colour
    False: black and white by error diffusion, without escapes. UsageError: less than one column.
    """
    if columns < 1:
        raise UsageError(f"a picture of {columns} columns; it takes at least one")
    factor = columns // image.width or columns / image.width
    shown = _scaled(image, factor)
    if not colour:
        lit = np.asarray(shown.convert("1"))
        rows = np.pad(lit, ((0, len(lit) % 2), (0, 0))).tolist()
        return "\n".join(
            "".join(BLOCKS[pair] for pair in zip(upper, lower, strict=True))
            for upper, lower in zip(rows[::2], rows[1::2], strict=True)
        )
    pixels = np.asarray(shown).tolist()
    lines = []
    for y in range(0, len(pixels), 2):
        line = ""
        for column, run in groupby(zip(*pixels[y : y + 2], strict=True)):
            codes = ";".join(f"{ground};2;{r};{g};{b}" for ground, (r, g, b) in zip((38, 48), column, strict=False))
            line += f"\x1b[{codes}m{BLOCKS[True, False] * len(list(run))}"
        lines.append(f"{line}\x1b[0m")
    return "\n".join(lines)


def strip(images: Sequence[Image.Image], height: int | None = None) -> Image.Image:
    """Pictures side by side in one row, from the first to the last, with thin white gaps, in RGB.

    height: in pixels, to which each is brought, its aspect kept; None leaves them as they are. UsageError: no picture,
    or no height.
    """
    if height is not None and height < 1:
        raise UsageError(f"a strip of {height} pixels; it takes at least one")
    row = images if height is None else [_scaled(image, height / image.height) for image in images]
    return grid(row, len(row), GAP)


def animation(images: Sequence[Image.Image]) -> bytes:
    """The same as a GIF that repeats without end, 0.1 s a picture and 2 s the last. UsageError: no picture, or
    pictures of different sizes.

    Each has its own 256 colours, from an octree, and its errors diffused: smooth estimates of a run show no bands.
    Neighbours that are equal become one frame of their time together (Pillow).
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise UsageError(f"pictures of sizes {sizes}; an animation takes at least one, all of one size")
    first, *rest = [_reduced(image.convert("RGB")) for image in images]
    data = io.BytesIO()
    durations = [FRAME] * len(rest) + [LAST_FRAME]
    first.save(data, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    return data.getvalue()


def chosen(steps: int, most: int) -> list[int]:
    """Which of a run's steps (0 ... steps - 1) to show, at most `most`: first, last, and evenly between; of one, the
    last. UsageError: less than one of either.
    """
    if steps < 1 or most < 1:
        raise UsageError(f"{most} of {steps} steps were to be shown; it takes at least one of each")
    if steps <= most:
        return list(range(steps))
    gaps = most - 1
    return [(2 * i * (steps - 1) + gaps) // (2 * gaps) for i in range(most)] if gaps else [steps - 1]


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    """In RGB, with this many times the sides; enlarged, its pixels stay sharp."""
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS)


def _reduced(image: Image.Image) -> Image.Image:
    """In 256 colours of its own. Pillow diffuses errors only towards a palette that it is given."""
    palette = image.quantize(256, Image.Quantize.FASTOCTREE)
    return image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
