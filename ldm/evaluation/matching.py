"""Where in a picture a known glyph stands, by matching renders of it; no network involved.

A picture that shows a glyph with colours c and opacity a on a background b is b + a (c - b). With D = picture - b and
T = a (c - b), placing the glyph at an offset lowers the squared error of "there is only background" by

    gain = |D|^2 - |D - T|^2 = 2 <D, T> - |T|^2 <= |D|^2,

with equality only where T explains D exactly, so the largest gain over glyphs, sizes and offsets is the most likely
glyph under equal noise on every pixel, also for a glyph in nearly the colour of its background. All offsets at once are
one correlation, by FFT.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.emoji import EmojiScenes

SIDE = 32  # pictures are compared at this resolution, so that small shifts and lost detail count for little
STEP = 1.08  # between neighbouring sizes of a glyph
SLACK = 1  # pixels of that resolution a glyph may stand over the edge
LEAST_ENERGY = 1e-6  # |T|^2 of a glyph that cannot be told from its background
MOST_COPIES = 9
EVERY = slice(None)

Array = NDArray[np.float32]


def shrunk(image: Array) -> Array:
    """[..., S, S] -> [..., 32, 32], averaged over boxes of S / 32 pixels, fractions of pixels by their share. Any S."""
    S = image.shape[-1]
    edges = np.arange(SIDE + 1) * S / SIDE
    pixel = np.arange(S)
    share = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    boxes = (share.clip(0) * SIDE / S).astype(np.float32)  # [32, S], every row sums to 1
    small: Array = boxes @ image @ boxes.T
    return small


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
    """Renders of every glyph, its longer side from `low` to `high` of the picture's; N of them, glyph by glyph."""

    def __init__(self, scenes: EmojiScenes, low: float, high: float) -> None:
        S = scenes.config.size
        steps = max(2, round(np.log(high / low) / np.log(STEP)) + 1)
        self.sides = sorted({round(side * S) for side in np.geomspace(low, high, steps)})
        self.names = scenes.names
        sprites = [premultiplied(scenes.sprite(name, side)) for name in self.names for side in self.sides]
        self.extent = np.array([s.shape[1:] for s in sprites], np.float32) / S  # [N, 2]: height, width
        canvas = np.zeros((4, len(sprites), S, S), np.float32)
        for i, sprite in enumerate(sprites):
            canvas[:, i, : sprite.shape[1], : sprite.shape[2]] = sprite
        images = shrunk(canvas)
        self.spectra = np.conj(
            np.fft.rfft2(images)
        )  # [4, N, 32, 17] complex64, of premultiplied colours P and opacity A
        # |P|^2 [N], <P_c, A> [N, 3] and |A|^2 [N]: |T|^2 = |P|^2 - 2 b <P, A> + b^2 |A|^2
        colour, alpha = images[:3], images[3]
        self.energies = (colour**2).sum((0, 2, 3)), np.einsum("cnhw,nhw->nc", colour, alpha), (alpha**2).sum((1, 2))
        last = np.ceil(SIDE * (1 - self.extent)) + SLACK  # [N, 2]
        over = np.arange(SIDE) > last[..., None]  # [N, 2, 32]
        self.outside = over[:, 0, :, None] | over[:, 1, None, :]  # which offsets put a glyph over the edge, [N, 32, 32]

    def gains(self, difference: Array, background: Array, which: slice = EVERY) -> tuple[Array, Array]:
        """Gain of the templates `which` at every offset, [n, 32, 32], and |T|^2 [n], for D [3, 32, 32] and b [3]."""
        seen = np.fft.rfft2(difference)
        seen = np.concatenate([seen, -(background[:, None, None] * seen).sum(0, keepdims=True)])
        product = np.einsum("cnyx,cyx->nyx", self.spectra[:, which], seen)
        squared, mixed, opacity = (e[which] for e in self.energies)
        energy = squared - 2 * mixed @ background + (background @ background) * opacity
        gain = 2 * np.fft.irfft2(product, s=(SIDE, SIDE)) - energy[:, None, None]
        gain[self.outside[which]] = -np.inf
        return gain, np.maximum(energy, LEAST_ENERGY)

    def sighting(self, number: int, offset: int, gain: float, energy: float) -> Sighting:
        """What template `number` at a flat offset means."""
        top, left = offset // SIDE / SIDE, offset % SIDE / SIDE
        height, width = (float(v) for v in self.extent[number])
        box = (left, top, left + width, top + height)
        return Sighting(self.names[number // len(self.sides)], box, gain, gain / energy)

    def ranking(self, difference: Array, background: Array) -> list[Sighting]:
        """The best placement of every glyph, the best glyph first."""
        gain, energy = self.gains(difference, background)
        flat = gain.reshape(len(self.names), -1)
        places = flat.argmax(1)
        found = []
        for glyph, place in enumerate(places.tolist()):
            number, offset = glyph * len(self.sides) + place // SIDE**2, place % SIDE**2
            found.append(self.sighting(number, offset, float(flat[glyph, place]), float(energy[number])))
        return sorted(found, key=lambda s: -s.gain)

    def copies(self, name: str, difference: Array, background: Array, fit: float) -> list[Sighting]:
        """Where `name` stands: the best place, then the best in what is left without it, while they fit so well."""
        first, left = self.names.index(name) * len(self.sides), difference.copy()
        found: list[Sighting] = []
        while len(found) < MOST_COPIES:
            gain, energy = self.gains(left, background, slice(first, first + len(self.sides)))
            size, offset = divmod(int(gain.argmax()), SIDE**2)
            here = self.sighting(first + size, offset, float(gain.max()), float(energy[size]))
            if here.fit < fit:
                break
            found.append(here)
            x0, y0, x1, y1 = (round(v * SIDE) for v in here.box)
            left[:, y0:y1, x0:x1] = 0
        return found


def premultiplied(sprite: Image.Image) -> Array:
    """uint8 RGBA -> float32 [4, h, w] in 0..1, the colours times the opacity."""
    pixels = np.asarray(sprite, np.float32).transpose(2, 0, 1) / np.float32(255)
    return np.concatenate([pixels[:3] * pixels[3:], pixels[3:]])
