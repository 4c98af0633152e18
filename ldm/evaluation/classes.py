"""Which objects cannot be told apart at the size of a corpus' pictures: published classes, by the renders alone.

Two objects are alike when the best placed render of one explains all but MARGIN of the other's contrast T (matching.py
says what that is), summed over the ten backgrounds b, in canonical size, at the resolution at which the judge compares:

    min over offsets  sum_b |T_A - T_B|^2  <  MARGIN max(sum_b |T_A|^2, sum_b |T_B|^2).

That is how much the judge prefers A where it is shown A, without noise; noise favours neither. A class is what objects
that are alike link. No model enters, so none can gain by losing detail.
"""

from collections.abc import Iterator

import numpy as np

from ldm.data.emoji import SIDES, EmojiScenes
from ldm.data.glyphs import COLOURS
from ldm.evaluation.matching import SIDE, Array, placed, premultiplied, rivals, shrunk

MARGIN = 0.1
Classes = tuple[tuple[str, ...], ...]


def classes(scenes: EmojiScenes, margin: float = MARGIN) -> Classes:
    """The classes of more than one object, each sorted, in the order of their first names."""
    names = rivals(scenes)
    part = {name: {name} for name in names}  # of each object the class, shared by its members
    for a, b in alike(scenes, names, margin):
        if part[a] is not part[b]:
            part[a] |= part[b]
            for name in part[b]:
                part[name] = part[a]
    found = {tuple(sorted(members)) for members in part.values() if len(members) > 1}
    return tuple(sorted(found))


def alike(scenes: EmojiScenes, names: list[str], margin: float) -> Iterator[tuple[str, str]]:
    """The pairs of objects that cannot be told apart."""
    whitened = _whitening() @ np.stack([_render(scenes, name) for name in names])  # [N, 4, 32 * 32]
    images = whitened.reshape(len(names), 4, SIDE, SIDE)
    spectra, energy = np.fft.rfft2(images), (whitened**2).sum((1, 2))
    for a in range(len(names) - 1):
        product = np.einsum("cyx,ncyx->nyx", spectra[a], spectra[a + 1 :].conj())
        overlap = np.fft.irfft2(product, s=(SIDE, SIDE)).max((1, 2))
        far = energy[a] + energy[a + 1 :] - 2 * overlap
        near = np.flatnonzero(far < margin * np.maximum(energy[a], energy[a + 1 :]))
        yield from ((names[a], names[a + 1 + b]) for b in near)


def _whitening() -> Array:
    """L^T [4, 4] with L L^T = sum over the ten backgrounds b of B^T B, B = (1, -b) [3, 4], the map from premultiplied
    colour and opacity to T = P - b A: so |L^T (P, A)|^2 is the sum of |T|^2.
    """
    maps = np.concatenate([np.concatenate([np.eye(3), -np.array([[v / 255] for v in b])], 1) for b in COLOURS.values()])
    upper: Array = np.linalg.cholesky(maps.T @ maps).T.astype(np.float32)
    return upper


def _render(scenes: EmojiScenes, name: str) -> Array:
    """The object in canonical size, premultiplied, [4, 32 * 32]."""
    size = scenes.config.size
    return shrunk(placed(premultiplied(scenes.sprite(name, round(SIDES[""] * size))), size)).reshape(4, -1)
