"""Does a picture show what a spec says? Compared with renders of all objects of the corpus, without any network."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ldm.data.emoji import SIDES, EmojiScenes
from ldm.data.glyphs import COLOURS, DARK
from ldm.data.words import SceneSpec
from ldm.errors import UsageError
from ldm.evaluation.classes import Classes, classes
from ldm.evaluation.matching import Array, Sighting, Templates

TOLERANCE = 1.15  # how much smaller or larger than in training an object may be drawn
LEAST_FIT = 0.5  # of what counts as seen; objects that went through the first stage have 0.66 and more
TRIED = 5  # objects whose copies are counted
# GenEval's rule of positions: centres count as apart by what exceeds a tenth of both boxes' sides, along each axis, and
# the relation holds whose axis has at least half of that distance.
NEAR, PART = 0.1, 0.5
TOWARDS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class Verdict:
    """What of a spec a picture shows."""

    background: bool  # the nearest of the ten colours is the one asked for
    objects: tuple[bool, ...]  # of each object wanted: it, or one of its class, is the best of all where one stands
    exact: tuple[bool, ...]  # ... it itself
    relation: bool  # all objects are right, and stand as asked where a relation is asked
    count: bool  # as many as asked, where the caption says how many; True elsewhere
    seen_background: str
    seen: tuple[Sighting, ...]  # what it took for the objects, the clearest first

    @property
    def right(self) -> bool:
        """Objects up to classes, relation and count: what GenEval asks, which does not look at the background."""
        return all(self.objects) and self.relation and self.count

    @property
    def exactly_right(self) -> bool:
        """The same without regard to classes."""
        return self.right and all(self.exact)

    @property
    def all_right(self) -> bool:
        """All of the prompt: objects up to classes, relation, count and background."""
        return self.right and self.background


class Judge:
    """Compares pictures with renders of every object of a corpus. Needs the emoji font."""

    def __init__(self, scenes: EmojiScenes) -> None:
        self.scenes = scenes
        self._templates: dict[tuple[str, str, bool], Templates] = {}

    @cached_property
    def classes(self) -> Classes:
        """The objects that it takes for each other in `Verdict.objects`."""
        return classes(self.scenes)

    @cached_property
    def _class(self) -> dict[str, str]:
        return {name: members[0] for members in self.classes for name in members}

    def alike(self, one: str, other: str) -> bool:
        """Whether two objects are of a class."""
        return self._class.get(one, one) == self._class.get(other, other)

    def templates(self, size: str, style: str = "", ground: str = "") -> Templates:
        """All objects, as large as the corpus draws them in a size of SIDES; as in a style, on a background."""
        key = (size, style, bool(style) and ground in DARK)
        if key not in self._templates:
            low, high = SIDES[size] / TOLERANCE, min(SIDES[size] * TOLERANCE, 0.98)
            self._templates[key] = Templates(self.scenes, low, high, style, ground)
        return self._templates[key]

    def judge(self, image: NDArray[np.uint8], spec: SceneSpec) -> Verdict:
        """The verdict on a square picture, uint8 [S, S, 3] of any S. UsageError for another shape or type."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
            got = f"a picture of shape {list(image.shape)} and type {image.dtype}"
            raise UsageError(f"{got}; the judge takes uint8 [S, S, 3]")
        ground, colour = background(image)
        difference = image.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - colour[:, None, None]
        if spec.count:
            seen = self._copies(difference, colour, ground)
        else:
            size = "small" if spec.relation else spec.size
            templates = self.templates(size, spec.style, ground)
            seen = templates.different(len(spec.objects), difference, colour, ground, LEAST_FIT)
        objects, exact, stand = self._matched(spec, seen)
        counted = not spec.count or spec.count == len(seen)
        return Verdict(ground == spec.background, objects, exact, stand, counted, ground, tuple(seen))

    def _copies(self, difference: Array, colour: Array, ground: str) -> list[Sighting]:
        """The object whose copies together explain most, in the size of one or in that of several."""
        sets: list[list[Sighting]] = [[]]
        for templates in (self.templates(""), self.templates("small")):
            for best in templates.ranking(difference, colour, ground, TRIED):
                sets.append(templates.copies(best.name, difference, colour, LEAST_FIT))
        return max(sets, key=lambda copies: sum(s.gain for s in copies))

    def _matched(self, spec: SceneSpec, seen: Sequence[Sighting]) -> tuple[tuple[bool, ...], tuple[bool, ...], bool]:
        """Which of the objects wanted are seen, up to classes and exactly, and whether all stand as asked.

        Each is looked for in another place, where most are right, then where most are exactly right: a class helps only
        where the object itself is not seen.
        """
        names = spec.objects
        ways = []
        for way in permutations([*seen, *[None] * len(names)], len(names)):
            pairs = list(zip(names, way, strict=True))
            right = tuple(s is not None and self.alike(name, s.name) for name, s in pairs)
            exact = tuple(s is not None and name == s.name for name, s in pairs)
            found = [s for s in way if s is not None]
            stand = all(right) and stands(spec.relation, found)
            ways.append((right, exact, stand))
        return max(ways, key=lambda way: (sum(way[0]), sum(way[1]), way[2]))


def stands(relation: str, seen: Sequence[Sighting]) -> bool:
    """Whether the first thing seen has its relation to every other; "" and AND ask for none. GenEval's rule."""
    return relation not in TOWARDS or all(_component(seen[0], other, TOWARDS[relation]) > PART for other in seen[1:])


def _component(one: Sighting, other: Sighting, towards: tuple[int, int]) -> float:
    """The share of the way from `other` to `one` that leads in a direction (x, y), -1 .. 1."""
    apart = np.subtract(one.centre, other.centre)
    sides = [s.box[i + 2] - s.box[i] for s in (one, other) for i in range(2)]
    beyond = np.sign(apart) * (np.abs(apart) - NEAR * np.add(sides[:2], sides[2:])).clip(0)
    length = float(np.linalg.norm(apart))
    return float(beyond @ np.array(towards)) / length if length else 0.0


def background(image: NDArray[np.uint8]) -> tuple[str, Array]:
    """The nearest of the ten colours to most of the border's pixels, and those pixels' median, [3] in 0..1."""
    width = max(1, image.shape[0] // 32)
    inside = np.zeros(image.shape[:2], bool)
    inside[width:-width, width:-width] = True
    border = image[~inside].astype(np.float32)  # [n, 3]
    colours = np.array(list(COLOURS.values()), np.float32)
    nearest = ((border[:, None] - colours) ** 2).sum(2).argmin(1)
    winner = int(np.bincount(nearest, minlength=len(colours)).argmax())
    return list(COLOURS)[winner], np.median(border[nearest == winner], 0).astype(np.float32) / 255
