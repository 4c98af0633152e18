"""Endless captioned scenes of emoji: the corpus of the model in the box, and the ground truth it is judged by.

A scene is one to four objects on a coloured background, with a caption that says exactly what is drawn. Scene i of a
corpus depends on (config, seed, i) alone. A fixed, hash-based share of the combinations is held out: an object on a
background in scenes of that object alone or counted, two objects in any scene. Training never sees them, judging draws
only from them.
"""

import hashlib
import math
import random
from dataclasses import asdict, dataclass, field
from itertools import combinations, cycle, islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.glyphs import COLOURED_SHAPES, COLOURS, SHAPES, STYLES, STYLES_OF, Sprites, all_glyphs
from ldm.data.words import AND, COUNTS, PHRASINGS, RELATIONS, SIZES, SceneSpec
from ldm.errors import UsageError

# Side of the box an object stands in, and of the object in its middle, as shares of the picture's side, by the size
# that the caption says. Where there are several objects they have the small size.
BOXES = {"small": 0.5, "": 0.75, "large": 0.875}
SIDES = {"small": 0.46, "": 0.66, "large": 0.845}
LEFT, RIGHT, UPPER, LOWER = (0.25, None), (0.75, None), (None, 0.25), (None, 0.75)
# Where the boxes stand (centres, as shares of the side, x to the right; None: anywhere), by relation or count.
PLACES: dict[str | int, tuple[tuple[float | None, float | None], ...]] = {
    0: ((None, None),),
    1: ((None, None),),
    2: (LEFT, RIGHT),
    3: (UPPER, (0.25, 0.75), (0.75, 0.75)),
    4: ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),
    AND: (LEFT, RIGHT),
    "to the left of": (LEFT, RIGHT),
    "to the right of": (RIGHT, LEFT),
    "above": (UPPER, LOWER),
    "below": (LOWER, UPPER),
    "above two": (UPPER, (0.25, 0.75), (0.75, 0.75)),
    "below two": (LOWER, (0.25, 0.25), (0.75, 0.25)),
}
KINDS = ("single", "pair", "and", "triple", "count")
LIMITS = {"objects": (0, math.inf), "grid": (1, math.inf), "size": (1, math.inf), "wander": (0, 1), "spread": (0, 0.9)}


@dataclass(frozen=True)
class CorpusConfig:
    """What the scenes are made of. Shares are probabilities; sizes are pixels."""

    size: int = 64  # side of the square picture
    objects: int = 156  # how many objects are drawn by hash from the table of emoji
    always: tuple[str, ...] = ("taco", "owl", "pizza", "banana")  # objects of the README's prompts, beside those
    salt: str = "ldm"  # decides which objects, and which combinations are held out
    held_out: float = 0.1  # share of (object, background) and of object pairs never trained on
    pairs: float = 0.18  # share of scenes with two objects in a relation
    ands: float = 0.07  # share of scenes with two objects
    triples: float = 0.05  # share of scenes with three
    counts: float = 0.12  # share of scenes with one to four of one object, and the number said
    shapes: float = 0.2  # share of objects that are simple shapes in a colour; the others are emoji
    sized: float = 0.2  # share of scenes of a single object that are small or large, and say so
    styled: float = 0.35  # ... that are in a style
    spread: float = 0.0  # by how much of its side an object may be smaller than the largest of its size
    wander: float = 1.0  # how much of the room between an object and the border it may wander
    grid: int = 8  # boxes of objects stand at multiples of this many pixels
    people: bool = False  # also faces and people

    @property
    def kinds(self) -> tuple[float, ...]:
        """The shares of KINDS."""
        several = (self.pairs, self.ands, self.triples, self.counts)
        return (1 - sum(several), *several)

    def __post_init__(self) -> None:
        for names in (("pairs", "ands", "triples", "counts"), ("sized", "styled"), ("shapes",), ("held_out",)):
            shares = [getattr(self, name) for name in names]
            if min(shares) < 0 or sum(shares) > 1:
                raise UsageError(
                    f"{' + '.join(names)} of the corpus is {' + '.join(f'{s:g}' for s in shares)}; they are shares of "
                    "one whole: none below 0, and no more than 1 together"
                )
        if self.held_out == 1:
            raise UsageError("held_out of the corpus is 1; below that something is left to train on")
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                allowed = f"from {low} to {high:g}" if high < math.inf else f"at least {low}"
                raise UsageError(f"{name} of the corpus is {getattr(self, name)}; it must be {allowed}")
        if self.size % (2 * self.grid):
            raise UsageError(f"size of the corpus is {self.size}; it must be a multiple of twice its grid, {self.grid}")


@dataclass(frozen=True)
class Scene:
    """A drawn scene and its ground truth."""

    spec: SceneSpec
    caption: str
    image: NDArray[np.uint8]  # [S, S, 3]
    names: tuple[str, ...]  # of every object drawn
    boxes: tuple[tuple[int, int, int, int], ...] = field(default=())  # left, top, right, bottom of each, in pixels
    masks: NDArray[np.bool_] = field(
        default_factory=lambda: np.zeros((0, 0, 0), bool)
    )  # [n, S, S], True where the object covers


def share(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:8], "big") / 2**64


class EmojiScenes(Sprites):
    """The corpus: scenes[i] is (image uint8 [3, S, S], caption) of training scene i, never a held-out combination."""

    def __init__(self, config: CorpusConfig | None = None, seed: int = 0) -> None:
        self.config = c = config or CorpusConfig()
        self.seed = seed
        table = {g.name: g for g in all_glyphs(c.people)}
        if unknown := [name for name in c.always if name not in table]:
            raise UsageError(
                f"the corpus has no emoji named {unknown[0]!r}; names are CLDR short names of countable things"
            )
        by_hash = sorted((n for n in table if n not in c.always), key=lambda n: share(c.salt, "object", n))
        chosen = sorted({*c.always, *by_hash[: c.objects]})
        least = 3 if c.triples else 2 if c.pairs or c.ands else 1
        if c.shapes:  # which are enough for company, and alone for all
            least = 0 if c.shapes == 1 else 1
        if len(chosen) < least:
            raise UsageError(
                f"the corpus has {len(chosen)} objects, and its scenes show up to {least}; raise `objects`"
            )
        super().__init__({n: table[n] for n in chosen})
        self.synonyms = {g.name: g.synonyms for g in self.glyphs.values()}

    @property
    def names(self) -> list[str]:
        """The emoji it can draw, sorted."""
        return list(self.glyphs)

    def vocabulary(self) -> dict[str, object]:
        """What a model trained on these scenes can draw, for `vocabulary.json`."""
        return {
            "corpus": asdict(self.config),
            "seed": self.seed,
            "objects": [
                {"name": g.name, "code_point": g.code, "subgroup": g.subgroup, "synonyms": list(g.synonyms)}
                for g in self.glyphs.values()
            ],
            "shapes": list(SHAPES),
            "backgrounds": {name: list(rgb) for name, rgb in COLOURS.items()},
            "relations": list(RELATIONS),
            "counts": list(COUNTS.values()),
            "sizes": list(SIZES),
            "styles": list(STYLES),
            "phrasings": [p.format(x="<objects>", c="<colour>", a="a") for p in PHRASINGS],
        }

    def is_held_out(self, spec: SceneSpec) -> bool:
        """Whether training never sees this combination: (object, background), or an unordered pair of its objects."""
        found = combinations(sorted(spec.objects), 2) if spec.relation else [(spec.objects[0], spec.background)]
        return any(share(self.config.salt, "held out", *words) < self.config.held_out for words in found)

    def spec(self, rng: random.Random, kind: str | None = None) -> SceneSpec:
        """Draw what a scene shows. `kind` is one of KINDS; None draws the kind too."""
        c = self.config
        kind = kind or rng.choices(KINDS, c.kinds)[0]
        background = rng.choice(list(COLOURS))
        number = {"pair": 2, "and": 2, "triple": 3}.get(kind, 1)
        objects = tuple(self._different(rng, number, background))
        if kind == "and":
            return SceneSpec(objects, background, relation=AND)
        if number > 1:
            return SceneSpec(objects, background, relation=rng.choice(RELATIONS if number == 2 else RELATIONS[2:]))
        if kind == "count":
            return SceneSpec(objects, background, count=rng.choice(list(COUNTS)))
        chance = rng.random()
        if chance < c.sized:
            return SceneSpec(objects, background, size=rng.choice(SIZES))
        if chance < c.sized + c.styled and objects[0] in self.glyphs:
            of_kind = STYLES_OF[rng.choice(list(STYLES_OF))]
            visible = [style for style in of_kind if style.partition(" ")[2] != background]
            return SceneSpec(objects, background, style=rng.choice(visible))
        return SceneSpec(objects, background)

    def _different(self, rng: random.Random, number: int, background: str) -> list[str]:
        """Objects that differ from each other, none in the colour of the background."""
        visible = [name for name in COLOURED_SHAPES if name.split()[0] != background]
        found: list[str] = []
        while len(found) < number:
            name = rng.choice(visible if rng.random() < self.config.shapes else self.names)
            if name not in found:
                found.append(name)
        return found

    def held_out_specs(self, n: int, seed: int, kind: str) -> list[SceneSpec]:
        """n held-out combinations of emoji of one kind, "single", "pair" or "count", in canonical size and style,
        decided by the seed alone.

        None comes a second time before all came once: of single objects a corpus holds out only a few hundred.
        UsageError when it holds out none, or has no such scene.
        """
        c = self.config
        if c.shapes == 1 or (kind == "single" and c.sized + c.styled == 1):
            raise UsageError(
                f"the corpus has no {kind!r} scene of plain emoji; make shapes, or sized and styled, less than 1"
            )
        rng, found = random.Random(f"held-out {kind} {seed}"), dict[SceneSpec, None]()
        known = self.held_out_count(kind)
        if not known:
            raise UsageError(f"the corpus holds out no {kind!r} scene; give it more objects or a larger held_out share")
        while len(found) < min(n, known):
            spec = self.spec(rng, kind)
            if self.is_held_out(spec) and not spec.size and not spec.style and set(spec.objects) <= set(self.names):
                found[spec] = None
        return [*islice(cycle(found), n)]

    def held_out_count(self, kind: str) -> int:
        """How many different combinations of one kind are held out, of emoji in canonical size and style."""
        if kind == "pair":
            pairs = sum(self.is_held_out(SceneSpec(p, "", RELATIONS[0])) for p in combinations(self.names, 2))
            return pairs * 2 * len(RELATIONS) * len(COLOURS)
        singles = sum(self.is_held_out(SceneSpec((name,), colour)) for name in self.names for colour in COLOURS)
        return singles * (len(COUNTS) if kind == "count" else 1)

    def training_spec(self, index: int) -> tuple[SceneSpec, random.Random]:
        """What training scene `index` shows, and the dice that its words and places are drawn with."""
        rng = random.Random(f"{self.seed} {index}")
        spec = self.spec(rng)
        while self.is_held_out(spec):
            spec = self.spec(rng)
        return spec, rng

    def scene(self, index: int) -> Scene:
        """Training scene `index` with its ground truth."""
        spec, rng = self.training_spec(index)
        return self.draw(spec, rng, spec.said(rng, self.synonyms))

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], str]:
        scene = self.scene(index)
        return scene.image.transpose(2, 0, 1), scene.caption

    def draw(self, spec: SceneSpec, rng: random.Random, caption: str = "") -> Scene:
        """Render a scene: every object in the middle of a box, which stands at a random place of those it may have.

        caption: "" is the canonical one.
        """
        c = self.config
        names = spec.objects if spec.relation else spec.objects * max(spec.count, 1)
        image = Image.new("RGB", (c.size, c.size), COLOURS[spec.background])
        masks = np.zeros((len(names), c.size, c.size), bool)
        boxes = []
        size = "small" if len(names) > 1 else spec.size
        for i, (name, centre) in enumerate(zip(names, places(spec), strict=True)):
            side = round(SIDES[size] * (1 - c.spread * rng.random()) * c.size)
            sprite = self.sprite(name, side, spec.style, spec.background)
            left, top = (
                self._start(at, BOXES[size], rng) + round((BOXES[size] * c.size - own) / 2)
                for at, own in zip(centre, sprite.size, strict=True)
            )
            image.paste(sprite, (left, top), sprite)
            boxes.append((left, top, left + sprite.width, top + sprite.height))
            cover = Image.new("L", (c.size, c.size))
            cover.paste(sprite.getchannel("A"), (left, top))
            masks[i] = np.asarray(cover) > 127
        return Scene(spec, caption or spec.caption(), np.asarray(image), names, tuple(boxes), masks)

    def _start(self, centre: float | None, box: float, rng: random.Random) -> int:
        """Where a box begins along one axis, in pixels: a multiple of the grid at which it stays inside the picture."""
        c = self.config
        room = (1 - box) * c.size
        if centre is not None:
            return round((centre - box / 2) * c.size / c.grid) * c.grid
        start = room / 2 * (1 + c.wander * rng.uniform(-1, 1))
        return min(round(start / c.grid), int(room // c.grid)) * c.grid


def places(spec: SceneSpec) -> tuple[tuple[float | None, float | None], ...]:
    """The centres of a scene's boxes, as shares of the side (x to the right, y down); None: anywhere."""
    if not spec.relation:
        return PLACES[spec.count]
    return PLACES[spec.relation + " two" * (len(spec.objects) == 3)]
