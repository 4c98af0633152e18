"""Masks: where a picture is drawn anew, as float32 [H, W] in 0..1; 1 = drawn anew, 0 = kept byte for byte.

The centre of pixel (x, y) lies at (x + 0.5, y + 0.5); a shape holds the pixels whose centres lie in it.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d

from ldm.errors import UsageError, choose
from ldm.inputs import Source, source_of

Flags = NDArray[np.bool_]
Levels = NDArray[np.uint8]
Places = NDArray[np.float64]  # where centres lie: x as [W], y as [H, 1]
ALPHA = "alpha"
SPOKEN = re.compile(r"alpha(\+|$)|[A-Za-z]{2,}:")  # how a mask in words begins; "./alpha" is a file
FARTHEST = 1e6  # pixels from the corner at which a point of a shape may lie


def mask_of(given: str | Path | Image.Image | Source, image: Image.Image, convert: bool = False) -> Tensor:
    """The mask of an image, [H, W], in words or as a picture of the image's size.

    In words: "alpha" (what is transparent in the image), "box:L,T,R,B", "ellipse:L,T,R,B" or "polygon:X,Y,X,Y,X,Y..."
    (crossings are counted: even-odd rule), in pixels or in per cent of the image's sides, several joined by "+". A
    picture: gray, white = drawn anew; or of one colour and transparent in part, where transparent = drawn anew, as in
    OpenAI's edits. convert: see `ldm.inputs.source_of`, which refuses some pictures. UsageError: words that are no
    shape or hold no pixel of the image; a picture of another size, with colours, or with both gray and alpha.
    """
    if isinstance(given, str) and SPOKEN.match(given):
        return torch.stack([_spoken(part, image) for part in given.split("+")]).amax(0)
    source = source_of(given, "mask", convert)
    shown = f"the mask {source.name}".rstrip()
    if source.image.size != image.size:
        sizes = f"{source.image.width} x {source.image.height} pixels and the image {image.width} x {image.height}"
        raise UsageError(f"{shown} has {sizes}; give a mask of the image's size")
    pixels = np.asarray(source.image)
    colours, levels, kept = pixels[..., :3], pixels[..., 0], pixels[..., 3:] == 255
    if kept.all():  # also where there is no alpha
        if (colours != levels[..., None]).any():
            raise UsageError(f"{shown} has colours; give it in gray: white is drawn anew, black is kept")
    else:
        levels, shows = 255 - pixels[..., 3], colours[pixels[..., 3] > 0]
        if (shows != shows[:1]).any():
            raise UsageError(f"{shown} is transparent in part and not of one colour; give its alpha alone, or no alpha")
    return torch.from_numpy(levels.astype(np.float32) / 255.0)


def _spoken(part: str, image: Image.Image) -> Tensor:
    """One shape in words as a mask that holds at least one pixel."""
    word, _, rest = part.partition(":")
    choose("shape of a mask", word, [ALPHA, *SHAPES])
    if word == ALPHA:
        alpha = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", image.size, 255)
        inside = (255 - np.asarray(alpha)).astype(np.float32) / 255.0
    else:
        numbers = [length_of(text, image.size[i % 2]) for i, text in enumerate(rest.split(","))]
        x, y = (np.arange(side, dtype=np.float64) + 0.5 for side in image.size)
        inside = SHAPES[word](x, y[:, None], numbers).astype(np.float32)
    if not inside.any():
        raise UsageError(f"the mask {part!r} holds no pixel of the image ({image.width} x {image.height}); change it")
    return torch.from_numpy(inside)


def length_of(text: str, side: int) -> float:
    """ "128" -> 128 pixels; "25%" -> a quarter of `side`. UsageError for anything else, and beyond FARTHEST."""
    try:
        value = float(text.strip().removesuffix("%")) * (side / 100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not abs(value) <= FARTHEST:
        raise UsageError(f"{text!r} is no length; give pixels, as 128, or per cent of the image's side, as 25%")
    return value


def _sides(numbers: Sequence[float]) -> Sequence[float]:
    if len(numbers) != 4 or numbers[2] <= numbers[0] or numbers[3] <= numbers[1]:
        said = ", ".join(f"{n:g}" for n in numbers)
        raise UsageError(f"a box or ellipse has the sides {said}; give left,top,right,bottom, the smaller ones first")
    return numbers


def _box(x: Places, y: Places, numbers: Sequence[float]) -> Flags:
    left, top, right, bottom = _sides(numbers)
    return (left <= x) & (x < right) & (top <= y) & (y < bottom)


def _ellipse(x: Places, y: Places, numbers: Sequence[float]) -> Flags:
    left, top, right, bottom = _sides(numbers)
    across = ((2 * x - left - right) / (right - left)) ** 2
    return np.less_equal(across + ((2 * y - top - bottom) / (bottom - top)) ** 2, 1)


def _polygon(x: Places, y: Places, numbers: Sequence[float]) -> Flags:
    """Centres with an odd number of edges on their left."""
    if len(numbers) < 6 or len(numbers) % 2:
        raise UsageError(f"a polygon of {len(numbers)} numbers; give x,y of three corners at least")
    corners = np.reshape(numbers, (-1, 2))
    odd = np.zeros((len(y), len(x) + 1), np.bool_)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        rows = np.flatnonzero((y0 <= y[:, 0]) != (y1 <= y[:, 0]))  # whose line through the centres meets the edge
        at = x0 + (y[rows, 0] - y0) * ((x1 - x0) / (y1 - y0 or 1))
        odd[rows, np.clip(np.ceil(at - 0.5), 0, len(x)).astype(np.int64)] ^= True
    return np.logical_xor.accumulate(odd[:, :-1], axis=1)


SHAPES: dict[str, Callable[[Places, Places, Sequence[float]], Flags]] = {
    "box": _box,
    "ellipse": _ellipse,
    "polygon": _polygon,
}


def box_of(inside: Tensor, margin: int = 0) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the true pixels of [H, W] and `margin` more around, within the picture; all of it
    if none is true.
    """
    ends = []
    for line in (inside.any(0), inside.any(1)):
        at = line.nonzero()
        first, last = (int(at[0]), int(at[-1])) if len(at) else (0, len(line) - 1)
        ends.append((max(first - margin, 0), min(last + 1 + margin, len(line))))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def grown(mask: Tensor, pixels: int) -> Tensor:
    """The greatest value within `pixels` of each pixel (a disc: dx^2 + dy^2 <= pixels^2); below 0, the least. What lies
    outside the picture does not count. In 8 bits, as mask files have; its time grows as |pixels| x the area.
    """
    levels = (mask * 255).round().to(torch.uint8).numpy()
    result = _dilated(levels, pixels) if pixels >= 0 else 255 - _dilated(255 - levels, -pixels)
    return torch.from_numpy(result).float() / 255.0


def _dilated(levels: Levels, radius: int) -> Levels:
    """Row by row of the disc, whose chords grow from its rim to its middle: the greatest value of a chord is that of
    two runs of 2^k pixels, and the runs double as it grows (Urbach and Wilkinson 2008).
    """
    whole = np.zeros_like(levels)
    left, top, right, bottom = box_of(torch.from_numpy(levels > 0), radius)
    part, greatest = levels[top:bottom, left:right], whole[top:bottom, left:right]
    height, width = part.shape
    runs, run = np.pad(part, ((0, 0), (radius, radius))), 1  # runs[:, i]: the greatest of `run` pixels from i on
    for dy in range(radius, -1, -1):
        half = math.isqrt(radius**2 - dy**2)
        while 2 * run <= 2 * half + 1:
            runs, run = np.maximum(runs[:, :-run], runs[:, run:]), 2 * run
        if dy < height:
            first, last = radius - half, radius + half + 1 - run
            chord = np.maximum(runs[:, first : first + width], runs[:, last : last + width])
            np.maximum(greatest[dy:], chord[: height - dy], out=greatest[dy:])
            np.maximum(greatest[: height - dy], chord[dy:], out=greatest[: height - dy])
    return whole


def faded(mask: Tensor, pixels: int) -> Tensor:
    """How much of the new picture is pasted: 0 where the mask is 0, and d / (pixels + 1), at most 1, at distance d from
    the nearest such pixel (Euclidean, between centres), so that it rises over `pixels` pixels. 0: a hard edge.
    Its time grows as the area x the greatest of these distances, up to `pixels`.
    """
    free, far = (mask > 0).numpy(), pixels + 1
    weights = free.astype(np.float32)
    left, top, right, bottom = box_of(mask > 0, 1)  # nothing kept is nearer beyond this box than on its rim
    inside = free[top:bottom, left:right]
    down = np.minimum(_since(inside, far), _since(inside[::-1], far)[::-1]).astype(np.float32)
    for row in range(0, len(down), 16):  # so many rows at once stay in the processor's cache
        squares = down[row : row + 16] ** 2
        nearest = squares.copy()  # the least of dx^2 + dy^2 (Meijster, Roerdink and Hesselink 2000, section 2)
        for dx in range(1, min(far, squares.shape[1])):
            if dx**2 >= nearest.max():
                break
            further = squares + np.float32(dx**2)
            np.minimum(nearest[:, dx:], further[:, :-dx], out=nearest[:, dx:])
            np.minimum(nearest[:, :-dx], further[:, dx:], out=nearest[:, :-dx])
        weights[top:bottom, left:right][row : row + 16] = np.minimum(np.sqrt(nearest) / far, 1)
    return torch.from_numpy(weights)


def _since(inside: Flags, far: int) -> NDArray[np.int32]:
    """For every pixel, how many rows above it the next one lies that is not inside, at most `far`."""
    rows = np.arange(len(inside), dtype=np.int32)[:, None]
    return np.minimum(rows - np.maximum.accumulate(np.where(inside, np.int32(-far), rows), axis=0), np.int32(far))


def shrunk(mask: Tensor, factor: int) -> Tensor:
    """[H, W] -> [1, 1, ceil(H / factor), ceil(W / factor)]: the greatest value in each cell."""
    return max_pool2d(mask[None, None], factor, ceil_mode=True)
