"""Where in a picture a known glyph stands, by matching renders of it; no network involved.

A picture that shows a glyph with colours c and opacity a on a background b is b + a (c - b). With D = picture - b and
T = a (c - b), placing the glyph at an offset lowers the squared error of "there is only background" by

    gain = |D|^2 - |D - T|^2 = 2 <D, T> - |T|^2 <= |D|^2,

with equality only where T explains D exactly, so the largest gain over glyphs, sizes and offsets is the most likely
glyph under equal noise on every pixel, also for a glyph in nearly the colour of its background. All offsets at once are
one correlation, by FFT. A glyph is an emoji or a coloured shape here.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.emoji import EmojiScenes
from ldm.data.glyphs import COLOURED_SHAPES

SIDE = 32  # pictures are compared at this resolution, so that small shifts and lost detail count for little
STEP = 1.08  # between neighbouring sizes of a glyph
SLACK = 1  # pixels of that resolution a glyph may stand over the edge
LEAST_ENERGY = 1e-6  # |T|^2 of a glyph that cannot be told from its background
MOST_COPIES = 9
EVERY = slice(None)
HALVES = ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5))  # moves down and right
LIKELY = 8  # objects that are looked at to half a pixel

Array = NDArray[np.float32]
Spectra = NDArray[np.complex64]


def shrunk(image: Array, down: float = 0.0, right: float = 0.0) -> Array:
    """[..., S, S] -> [..., 32, 32], averaged over boxes of S / 32 pixels, fractions of pixels by their share. Any S.

    down, right: how far the boxes are moved, in boxes; 0 is where there is no picture.
    """
    small = _boxes(image.shape[-2], down) @ image @ _boxes(image.shape[-1], right).T
    return small.astype(np.float32, copy=False)


@cache
def _boxes(size: int, shift: float) -> Array:
    """[32, size]: the share of every pixel in every box."""
    edges = (np.arange(SIDE + 1) + shift) * size / SIDE
    pixel = np.arange(size)
    share = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    boxes: Array = (share.clip(0) * SIDE / size).astype(np.float32)
    return boxes


@dataclass(frozen=True)
class Sighting:
    """A glyph seen in a picture."""

    name: str
    box: tuple[float, float, float, float]  # left, top, right, bottom, as shares of the side
    gain: float  # how much squared error it explains; not above 0 where plain background explains as much
    fit: float  # gain / |T|^2: about 1 for a good match

    @property
    def centre(self) -> tuple[float, float]:
        """(x to the right, y down), as shares of the side."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class Templates:
    """Renders of every object a corpus draws, its longer side from `low` to `high` of the picture's; N of them, object
    by object. In a style they are those of emoji alone, which alone have styles; `background` is a colour's name, of
    those the style may depend on.
    """

    def __init__(self, scenes: EmojiScenes, low: float, high: float, style: str = "", background: str = "") -> None:
        S = scenes.config.size
        steps = max(2, round(np.log(high / low) / np.log(STEP)) + 1)
        self.sides = sorted({round(side * S) for side in np.geomspace(low, high, steps)})
        self.names = rivals(scenes, style)
        # Of each object the background on which it cannot be seen; "-": there is none.
        self.hidden_on = np.array([name.split()[0] if name in COLOURED_SHAPES else "-" for name in self.names])
        made = [scenes.sprite(name, side, style, background) for name in self.names for side in self.sides]
        self.extent = np.array([(s.height, s.width) for s in made], np.float32) / S  # [N, 2]
        images = np.stack([shrunk(placed(premultiplied(sprite), S)) for sprite in made], 1)  # [4, N, 32, 32]
        # [4, N, 32, 17] complex64, of premultiplied colours P and opacity A
        self.spectra = np.conj(np.fft.rfft2(images))
        # |P|^2 [N], <P_c, A> [N, 3] and |A|^2 [N]: |T|^2 = |P|^2 - 2 b <P, A> + b^2 |A|^2
        colour, alpha = images[:3], images[3]
        self.energies = (colour**2).sum((0, 2, 3)), np.einsum("cnhw,nhw->nc", colour, alpha), (alpha**2).sum((1, 2))
        last = np.ceil(SIDE * (1 - self.extent)) + SLACK  # [N, 2]
        over = np.arange(SIDE) > last[..., None]  # [N, 2, 32]
        outside = over[:, 0, :, None] | over[:, 1, None, :]
        # -inf at the offsets that put it over the edge, 0 at the others, [N, 32, 32]
        self.barred = np.where(outside, -np.inf, 0).astype(np.float32)

    def gains(self, seen: Spectra, background: Array, which: slice = EVERY) -> tuple[Array, Array]:
        """Gain of the templates `which` at every offset, [k, n, 32, 32], and |T|^2 [n], for `spectra` of k times D and
        b [3].
        """
        product = np.einsum("cnyx,kcyx->knyx", self.spectra[:, which], seen)
        squared, mixed, opacity = (e[which] for e in self.energies)
        energy = squared - 2 * mixed @ background + (background @ background) * opacity
        gain: Array = np.fft.irfft2(product, s=(SIDE, SIDE)).astype(np.float32, copy=False)
        gain *= 2
        gain -= energy[:, None, None]
        gain += self.barred[which]
        return gain, np.maximum(energy, LEAST_ENERGY)

    def ranking(self, difference: Array, background: Array, ground: str = "", most: int = 1) -> list[Sighting]:
        """The best placement of each of the `most` best objects, the best one first, while they explain more than plain
        background does, in a D of any size, [3, S, S]. ground: the background's name; shapes of it are no rivals.
        """
        seen = spectra(halves(difference), background)
        gain, _ = self.gains(seen[:1], background)
        best = gain.reshape(len(self.names), -1).max(1)
        best[self.hidden_on == ground] = -np.inf
        likely = np.argsort(-best, kind="stable")[: max(most, LIKELY)].tolist()
        found = sorted((self.best(i, seen, background) for i in likely), key=lambda s: -s.gain)
        return [s for s in found[:most] if s.gain > 0]

    def best(self, i: int, seen: Spectra, background: Array) -> Sighting:
        """The best placement of object i in the spectra of a D's `halves`."""
        first = i * len(self.sides)
        gain, energy = self.gains(seen, background, slice(first, first + len(self.sides)))
        half, size, y, x = (int(k) for k in np.unravel_index(gain.argmax(), gain.shape))
        top, left = ((at + move) / SIDE for at, move in zip((y, x), HALVES[half], strict=True))
        height, width = (float(v) for v in self.extent[first + size])
        most = float(gain[half, size, y, x])
        return Sighting(self.names[i], (left, top, left + width, top + height), most, most / float(energy[size]))

    def different(self, number: int, difference: Array, background: Array, ground: str, fit: float) -> list[Sighting]:
        """At most `number` objects that stand beside each other: the best one, then the best of what is left. What
        fits worse than `fit` is a trace or a blot, and none of them.
        """
        found: list[Sighting] = []
        left = difference.copy()
        while len(found) < number and (best := self.ranking(left, background, ground)):
            found += best
            erase(left, best[0])
        return [sighting for sighting in found if sighting.fit >= fit]

    def copies(self, name: str, difference: Array, background: Array, fit: float) -> list[Sighting]:
        """Where `name` stands: the best place, then the best in what is left without it, while they fit so well."""
        i, left = self.names.index(name), difference.copy()
        found: list[Sighting] = []
        while len(found) < MOST_COPIES:
            here = self.best(i, spectra(halves(left), background), background)
            if here.fit < fit:
                break
            found.append(here)
            erase(left, here)
        return found


def spectra(seen: Array, background: Array) -> Spectra:
    """Of k times D [k, 3, 32, 32]: what the templates' colours and opacity are multiplied with, [k, 4, 32, 17]."""
    colours = np.fft.rfft2(seen)
    return np.concatenate([colours, -(background[:, None, None] * colours).sum(1, keepdims=True)], 1)


def halves(difference: Array) -> Array:
    """A D [3, S, S] at the resolution of comparison, as it is and moved by half a pixel, [4, 3, 32, 32]."""
    return np.stack([shrunk(difference, *move) for move in HALVES])


def rivals(scenes: EmojiScenes, style: str = "") -> list[str]:
    """All objects that a picture may show: the emoji, and where the corpus draws them the coloured shapes."""
    return [*scenes.names, *(COLOURED_SHAPES if scenes.config.shapes and not style else ())]


def erase(difference: Array, seen: Sighting) -> None:
    """Put plain background in the place of what was seen, in a D [3, S, S]."""
    x0, y0, x1, y1 = (round(max(v, 0) * difference.shape[-1]) for v in seen.box)
    difference[:, y0:y1, x0:x1] = 0


def placed(sprite: Array, side: int) -> Array:
    """[4, h, w] in the upper left corner of [4, side, side], on nothing."""
    canvas = np.zeros((4, side, side), np.float32)
    canvas[:, : sprite.shape[1], : sprite.shape[2]] = sprite
    return canvas


def premultiplied(sprite: Image.Image) -> Array:
    """uint8 RGBA -> float32 [4, h, w] in 0..1, the colours times the opacity."""
    pixels = np.asarray(sprite, np.float32).transpose(2, 0, 1) / np.float32(255)
    return np.concatenate([pixels[:3] * pixels[3:], pixels[3:]])
