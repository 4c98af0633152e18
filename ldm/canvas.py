"""The canvas of an edit: what the network sees of a picture, and how its answer comes back and leaves the rest."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ldm.errors import UsageError, choose
from ldm.images import to_pil, to_tensor
from ldm.inputs import Source, tensor_of, to_rgb
from ldm.masks import Flags, box_of, faded, grown, length_of

Box = tuple[int, int, int, int]  # left, top, right, bottom
Size = tuple[int, int]  # height, width
Pixels = NDArray[np.uint8]  # RGB, [H, W, 3]
SIDES = ("left", "top", "right", "bottom")
FITS = ("stretch", "crop", "pad")
LARGEST_SIDE = 16384  # pixels, as of a request
SURROUNDINGS = 64  # pixels around the box of what is hidden, from which colours flow in
PADS = {"edge": "edge", "mirror": "reflect"}  # fills of an extended picture only -> numpy.pad's mode


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture with what is drawn anew of it.

    picture: RGB or RGBA of the output's size, what is kept. mask: [H, W] of it; None: all of it is drawn. window: the
    part of it that the network sees. size: (height, width) at which it sees and draws that. fill, seed: of `filled`.
    feather: pixels.
    """

    picture: Image.Image
    mask: Tensor | None
    window: Box
    size: Size
    fill: str
    seed: int
    feather: int

    @property
    def seen(self) -> Image.Image:
        """RGB: the window, filled under the mask, at `size`."""
        left, top, right, bottom = self.window
        part = self.picture.crop(self.window)
        mask = None if self.mask is None else self.mask[top:bottom, left:right]
        part = to_rgb(part) if mask is None else filled(part, mask, self.fill, self.seed)
        return fitted(part, self.size, "stretch")

    @property
    def freedom(self) -> Tensor | None:
        """[h, w]: the mask within the window at `size`; the greatest value of the pixels that a pixel there touches."""
        if self.mask is None:
            return None
        left, top, right, bottom = self.window
        return F.adaptive_max_pool2d(self.mask[None, top:bottom, left:right], self.size)[0]

    def pasted(self, images: Tensor) -> Tensor:
        """Drawn images [B, 3, h, w] in [-1, 1] -> the edited pictures, float32 [B, 3 or 4, H, W]; without a mask the
        images themselves.

        Brought to the window's size (bicubic, antialiased) and laid over the picture with the opacity `faded`. Where
        the mask is 0 the numbers are the picture's own, of which `ldm.images.to_pil` makes the same bytes.
        """
        if self.mask is None:
            return images
        left, top, right, bottom = self.window
        drawn, size = images.float(), (bottom - top, right - left)
        if size != self.size:
            drawn = F.interpolate(drawn, size, mode="bicubic", antialias=True).clamp(-1, 1)
        pictures = tensor_of(self.picture).to(drawn.device).repeat(len(drawn), 1, 1, 1)
        within = pictures[..., top:bottom, left:right]
        weight = share = faded(self.mask, self.feather)[top:bottom, left:right].to(drawn.device)
        if pictures.shape[1] == 4:  # "over" (Porter and Duff 1984, section 4.2), in straight colours
            alpha = within[:, 3] * 0.5 + 0.5
            share = torch.where(weight > 0, weight / torch.lerp(alpha, torch.ones_like(alpha), weight), 0.0)[:, None]
            within[:, 3] = torch.lerp(within[:, 3], torch.ones_like(alpha), weight)
        within[:, :3] = torch.lerp(within[:, :3], drawn, share)
        return pictures


def canvas_of(
    source: Source,
    mask: Tensor | None,
    *,
    extend: str | None,
    fill: str | None,
    fit: str | None,
    size: tuple[int | None, int | None],
    native: Size,
    padding: int | None,
    grow: int,
    feather: int,
    invert: bool,
    seed: int,
) -> Canvas:
    """The canvas of a picture and its mask [H, W]: the mask inverted, both extended, fitted, the mask grown, the window
    of it cut out and filled.

    extend: see `margins`. fill: of FILLS; absent: "smooth" for an extended picture, else "original". size: (height,
    width) asked for. Without padding the network works at the canvas' size; to have another, `fit` says how the canvas
    comes to it (one side alone: the other in proportion), and the output has it too. With padding the network works at
    the size asked for (absent: `native`) on the `window` of the mask, and the output has the canvas' size. UsageError
    for what does not fit together.
    """
    picture = source.image
    how = choose("fill", fill or ("smooth" if extend else "original"), [f for f in FILLS if extend or f not in PADS])
    if mask is not None and invert:
        mask = ((1.0 - mask) * 255.0).round() / 255.0
    if extend:
        left, top, right, bottom = sides = margins(extend, *picture.size)
        picture, new = extended(picture, sides, how)
        mask = new if mask is None else F.pad(mask, (left, right, top, bottom), value=1.0)
    height, width = size
    if padding is None or mask is None:
        picture, mask = _brought(picture, mask, height, width, fit)
    elif fit is not None:
        raise UsageError("fit and padding_mask_crop were both given, and drawing the mask alone fits nothing; give one")
    if mask is not None and grow:
        mask = grown(mask, grow)
    box, work = (0, 0, *picture.size), (picture.height, picture.width)
    if padding is not None and mask is not None:
        work = (height or native[0], width or native[1])
        box = window(mask, padding, work)
    return Canvas(picture, mask, box, work, how, seed, feather)


def _brought(
    picture: Image.Image, mask: Tensor | None, height: int | None, width: int | None, fit: str | None
) -> tuple[Image.Image, Tensor | None]:
    """Picture and mask at the size asked for. UsageError if that is another and no `fit` says how."""
    if fit is not None and height is None and width is None:
        raise UsageError("fit was given without a size to fit to; give height or width, or leave it out")
    own = picture.size
    scale = (width or own[0]) / own[0] if height is None else height / own[1]
    asked = width or max(1, round(own[0] * scale)), height or max(1, round(own[1] * scale))
    if asked == own:
        return picture, mask
    if fit is None:
        raise UsageError(
            f"the picture has {own[0]} x {own[1]} pixels and {asked[0]} x {asked[1]} were asked for; leave the size "
            f"out, or say how to fit it: {', '.join(FITS)}"
        )
    if mask is not None:
        levels = Image.fromarray((mask * 255.0).round().to(torch.uint8).numpy())
        mask = torch.from_numpy(np.asarray(fitted(levels, asked[::-1], fit), dtype=np.float32) / 255.0)
    return fitted(picture, asked[::-1], fit), mask


# -- larger canvases, and parts of one --------------------------------------------------------------------------------


def margins(text: str, width: int, height: int) -> Box:
    """ "left=128,top=25%" -> pixels to add at the left, top, right and bottom of a picture; per cent of its width or
    height. UsageError: another side, one named twice, no whole number of pixels, none at all, more than LARGEST_SIDE.
    """
    found: dict[str, int] = {}
    for part in re.split(r"[\s,]+", text.strip()):
        side, _, amount = part.partition("=")
        if choose("side", side, SIDES) in found:
            raise UsageError(f"extend is {text!r}, which names {side} twice; name it once")
        pixels = length_of(amount, (width, height)[SIDES.index(side) % 2])
        if pixels < 0 or not (amount.endswith("%") or pixels.is_integer()):
            raise UsageError(f"extend is {text!r}, and {amount!r} is no number of pixels; give left=128 or left=25%")
        found[side] = round(pixels)
    left, top, right, bottom = (found.get(side, 0) for side in SIDES)
    sides = left + width + right, top + height + bottom
    if sides == (width, height) or max(sides) > LARGEST_SIDE:
        raise UsageError(
            f"extend is {text!r}, which makes {sides[0]} x {sides[1]} pixels of {width} x {height}; a side must grow, "
            f"and {LARGEST_SIDE} pixels are the most"
        )
    return left, top, right, bottom


def extended(image: Image.Image, sides: Box, fill: str = "edge") -> tuple[Image.Image, Tensor]:
    """The image (RGB or RGBA) with so many pixels more at the left, top, right and bottom, and the mask [H, W] of them.

    What is new repeats the image's edge, or mirrors the image if `fill` is "mirror" (see PADS).
    """
    left, top, right, bottom = sides
    around = ((top, bottom), (left, right), (0, 0))
    pixels = np.pad(np.asarray(image), around, mode=PADS.get(fill, "edge"))  # type: ignore[call-overload]
    mask = F.pad(torch.zeros(image.height, image.width), (left, right, top, bottom), value=1.0)
    return Image.fromarray(pixels), mask


def window(mask: Tensor, padding: int, size: Size) -> Box:
    """The box of mask > 0 with `padding` pixels around, made wider or higher to the ratio of `size` as far as the
    picture goes, and within the picture; all of the picture for an empty mask.
    """
    left, top, right, bottom = box_of(mask > 0, padding)
    height, width = bottom - top, right - left
    height, width = max(height, round(width * size[0] / size[1])), max(width, round(height * size[1] / size[0]))
    (top, bottom), (left, right) = _around(top, bottom, height, len(mask)), _around(left, right, width, mask.shape[1])
    return left, top, right, bottom


def _around(start: int, end: int, length: int, most: int) -> tuple[int, int]:
    """A stretch of `length` about another, within 0..most."""
    length = min(length, most)
    start = min(max((start + end - length) // 2, 0), most - length)
    return start, start + length


def fitted(image: Image.Image, size: Size, fit: str) -> Image.Image:
    """The image at (height, width): stretched, its middle cut out ("crop"), or its edges repeated ("pad"), as FITS has
    them. Lanczos; masks (L, F) bilinear, which stays within their range.
    """
    choose("fit", fit, FITS)
    height, width = size
    resample = Image.Resampling.BILINEAR if image.mode in ("L", "F") else Image.Resampling.LANCZOS
    across, down = image.width / width, image.height / height
    if fit == "pad":
        inner = max(1, round(image.width / max(across, down))), max(1, round(image.height / max(across, down)))
        pixels = np.asarray(image.resize(inner, resample))
        left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
        around = ((top, height - inner[1] - top), (left, width - inner[0] - left), (0, 0))
        return Image.fromarray(np.pad(pixels, around[: pixels.ndim], mode="edge"))
    scale = (across, down) if fit == "stretch" else (min(across, down),) * 2
    x, y = (image.width - width * scale[0]) / 2, (image.height - height * scale[1]) / 2
    return image.resize((width, height), resample, box=(x, y, image.width - x, image.height - y))


# -- what lies under a mask at first ----------------------------------------------------------------------------------


def filled(image: Image.Image, mask: Tensor, how: str, seed: int) -> Image.Image:
    """The image in RGB (white shows through what is transparent), with what lies under mask > 0 replaced.

    how: of FILLS: "original" leaves it, "smooth" lets the colours around flow in, "noise" is uniform by `seed`, "gray"
    is the middle of the range; "edge" and "mirror" are what `extended` has put there, and leave it too.
    """
    pixels, hidden = np.asarray(to_rgb(image)), (mask > 0).numpy()
    new = FILLS[choose("fill", how, FILLS)](pixels, hidden, seed)
    return Image.fromarray(np.where(hidden[..., None], new, pixels))


def _smooth(pixels: Pixels, hidden: Flags, seed: int) -> Pixels:
    left, top, right, bottom = box_of(torch.from_numpy(hidden), SURROUNDINGS)
    part, new = np.s_[top:bottom, left:right], pixels.copy()
    known = torch.from_numpy(~hidden[part])[None, None].float()
    new[part] = np.asarray(to_pil(_flowed(to_tensor([Image.fromarray(pixels[part])]), known))[0])
    return new


def _flowed(colours: Tensor, known: Tensor) -> Tensor:
    """[1, 3, H, W] with the unknown pixels (known [1, 1, H, W] is 0) made of the known ones: halved in size, each pixel
    the mean of those known, until there is one; then back, the gaps filled from the size below (pull-push: Gortler et
    al. 1996, section 3.4) and relaxed twice, each pixel to the mean of those around it. Gray if nothing is known.
    """
    colours = colours * known
    if known.numel() == 1:
        return colours
    share = F.avg_pool2d(known, 2, ceil_mode=True)  # a quarter or more where anything is known
    below = _flowed(F.avg_pool2d(colours, 2, ceil_mode=True) / share.clamp(min=0.25), (share > 0).float())
    height, width = known.shape[-2:]
    back = F.interpolate(below, scale_factor=2)[..., :height, :width]
    for _ in range(2):
        back = F.avg_pool2d(torch.where(known > 0, colours, back), 3, 1, 1, count_include_pad=False)
    return torch.where(known > 0, colours, back)


FILLS: dict[str, Callable[[Pixels, Flags, int], Pixels]] = {
    "original": lambda pixels, hidden, seed: pixels,
    "smooth": _smooth,
    "noise": lambda pixels, hidden, seed: np.random.default_rng(seed).integers(0, 256, pixels.shape, np.uint8),
    "gray": lambda pixels, hidden, seed: np.full_like(pixels, 128),
    **dict.fromkeys(PADS, lambda pixels, hidden, seed: pixels),
}
