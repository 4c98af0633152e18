"""Endless captioned scenes of emoji: the corpus of the model in the box, and the ground truth it is judged by.

A scene is one to four objects on a coloured background, with a caption that says exactly what is drawn. Glyphs are
rendered from the Noto Color Emoji font (SIL Open Font License 1.1); their names are CLDR short names. Scene i of a
corpus depends on (config, seed, i) alone. A fixed, hash-based share of the combinations is held out: training never
sees them, judging draws only from them.
"""

import hashlib
import os
import random
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from itertools import combinations, cycle, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from ldm.errors import LdmError, UsageError

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "orange": (244, 140, 36), "yellow": (250, 214, 60), "green": (46, 160, 72),
    "blue": (44, 92, 214), "purple": (128, 56, 172), "pink": (250, 156, 196), "brown": (122, 76, 46),
    "black": (18, 18, 18), "white": (246, 246, 246),
}  # fmt: skip
RELATIONS = ("to the left of", "to the right of", "above", "below")
COUNTS = {2: "two", 3: "three", 4: "four"}
# Phrasings of every caption, the canonical one first. {x} is the subject, {c} the background colour, {a} its article.
PHRASINGS = (
    "{x} on {a} {c} background",
    "{x} in front of {a} {c} background",
    "{a} {c} background with {x}",
    "{x}, {c} background",
    "a picture of {x} on {c}",
)
CANONICAL_SHARE = 0.6
# Side of an object as a share of the picture's side, by what the caption says of it.
SIDES = {"small": (0.34, 0.42), "": (0.56, 0.70), "large": (0.80, 0.92)}
SIDES_BY_COUNT = {2: (0.40, 0.47), 3: (0.36, 0.43), 4: (0.34, 0.42)}
# Where objects of a scene stand (centres, as shares of the side), by how many there are.
PLACES = {
    1: ((0.5, 0.5),),
    2: ((0.26, 0.5), (0.74, 0.5)),
    3: ((0.5, 0.27), (0.26, 0.73), (0.74, 0.73)),
    4: ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)),
}
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/Library/Fonts",
    str(Path.home() / ".local/share/fonts"),
    str(Path.home() / ".fonts"),
)


@dataclass(frozen=True)
class Glyph:
    """One object the corpus can draw: its CLDR short name, code point and CLDR subgroup."""

    name: str
    code: str
    subgroup: str


@dataclass(frozen=True)
class CorpusConfig:
    """What the scenes are made of. Shares are probabilities; sizes are pixels."""

    size: int = 64  # side of the square picture
    objects: int = 60  # how many objects are drawn by hash from the table of emoji
    always: tuple[str, ...] = ("taco", "owl", "pizza", "banana")  # objects of the README's prompts, beside those
    salt: str = "ldm"  # decides which objects, and which combinations are held out
    held_out: float = 0.1  # share of (object, background) and of object pairs never trained on
    pairs: float = 0.35  # share of scenes with two objects in a relation
    counts: float = 0.15  # share of scenes with two to four of one object
    sized: float = 0.2  # share of single-object scenes that are small or large, and say so
    spread: float = 1.0  # how much of the range of an object's side is used; 0 draws every object in its middle size
    wander: float = 0.5  # how much of the room between an object and the border it may wander
    grid: int = 1  # objects stand at multiples of this many pixels


@dataclass(frozen=True)
class SceneSpec:
    """What a scene shows, without where exactly: enough to write its caption and to judge a picture of it."""

    objects: tuple[str, ...]  # one name, or two in a relation
    background: str
    relation: str = ""  # one of RELATIONS, of the first object to the second
    count: int = 1  # how many of a single object
    size: str = ""  # "small", "large" or ""

    @property
    def subject(self) -> str:
        if self.relation:
            return f"{with_article(self.objects[0])} {self.relation} {with_article(self.objects[1])}"
        if self.count > 1:
            return f"{COUNTS[self.count]} {plural(self.objects[0])}"
        return with_article(f"{self.size} {self.objects[0]}".strip())

    def caption(self, phrasing: int = 0) -> str:
        """The words for this scene; phrasing 0 is the canonical one."""
        article = with_article(self.background).split()[0]
        return PHRASINGS[phrasing].format(x=self.subject, c=self.background, a=article)


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


def with_article(noun: str) -> str:
    """'an owl', 'a taco', 'a unicorn'."""
    vowel = noun[0] in "aeiou" and not noun.startswith(("uni", "uku", "eu", "one"))
    return f"{'an' if vowel else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a CLDR short name: bananas, peaches, cherries, mice."""
    irregular = {"mouse": "mice", "goose": "geese", "ox": "oxen", "fish": "fish", "sheep": "sheep", "deer": "deer",
                 "knife": "knives", "leaf": "leaves", "loaf": "loaves", "tooth": "teeth", "wolf": "wolves",
                 "bison": "bison", "squid": "squid"}  # fmt: skip
    head, _, last = noun.rpartition(" ")
    if last in irregular:
        last = irregular[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def all_glyphs() -> list[Glyph]:
    """Every emoji the corpus may draw: plain names, no flags, keycaps, zodiac or religious signs, gestures."""
    lines = files("ldm.data").joinpath("emoji.tsv").read_text("utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    glyphs = [Glyph(name, code, subgroup) for code, subgroup, name in rows]
    return [
        g
        for g in glyphs
        if g.name.replace(" ", "").replace("-", "").isalpha() and g.name.isascii() and not is_plural(g.name)
    ]


def is_plural(name: str) -> bool:
    """Whether a name is already a plural ('grapes', 'socks'), which 'a' and counts do not go with."""
    return (name.endswith("s") and not name.endswith(("ss", "us"))) or " with " in name


def share(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:8], "big") / 2**64


def find_font() -> Path:
    """The Noto Color Emoji font: $LDM_EMOJI_FONT, or where systems keep fonts.

    Needed to train and to judge, never to draw. LdmError: it is not there.
    """
    named = os.environ.get("LDM_EMOJI_FONT")
    places = (
        [Path(named)]
        if named
        else [p for folder in FONT_FOLDERS for p in sorted(Path(folder).rglob("NotoColorEmoji.ttf"))]
    )
    for path in places:
        if path.is_file():
            return path
    raise LdmError(
        "the Noto Color Emoji font was not found; install it (Debian, Ubuntu: apt-get install fonts-noto-color-emoji) "
        "or name its NotoColorEmoji.ttf in LDM_EMOJI_FONT"
    )


class EmojiScenes:
    """The corpus: scenes[i] is (image uint8 [3, S, S], caption) of training scene i, never a held-out combination."""

    def __init__(self, config: CorpusConfig | None = None, seed: int = 0) -> None:
        self.config = config or CorpusConfig()
        self.seed = seed
        table = {g.name: g for g in all_glyphs()}
        if unknown := [name for name in self.config.always if name not in table]:
            raise UsageError(
                f"the corpus has no emoji named {unknown[0]!r}; names are CLDR short names of countable things"
            )
        by_hash = sorted(
            (n for n in table if n not in self.config.always), key=lambda n: share(self.config.salt, "object", n)
        )
        self.glyphs = {n: table[n] for n in sorted([*self.config.always, *by_hash[: self.config.objects]])}
        self._sprites: dict[tuple[str, int], Image.Image] = {}

    @property
    def names(self) -> list[str]:
        """The objects it can draw, sorted."""
        return list(self.glyphs)

    def vocabulary(self) -> dict[str, object]:
        """What a model trained on these scenes can draw, for `vocabulary.json`."""
        return {
            "objects": [{"name": g.name, "code_point": g.code, "subgroup": g.subgroup} for g in self.glyphs.values()],
            "backgrounds": {name: list(rgb) for name, rgb in BACKGROUNDS.items()},
            "relations": list(RELATIONS),
            "counts": list(COUNTS.values()),
            "sizes": [s for s in SIDES if s],
            "phrasings": [p.format(x="<objects>", c="<colour>", a="a") for p in PHRASINGS],
        }

    def is_held_out(self, spec: SceneSpec) -> bool:
        """Whether training never sees this combination: (object, background), or the unordered pair of objects."""
        words = sorted(spec.objects) if spec.relation else [spec.objects[0], spec.background]
        return share(self.config.salt, "held out", *words) < self.config.held_out

    def spec(self, rng: random.Random, kind: str | None = None) -> SceneSpec:
        """Draw what a scene shows. `kind` is "single", "pair" or "count"; None draws the kind too."""
        c = self.config
        kind = kind or rng.choices(("pair", "count", "single"), (c.pairs, c.counts, 1 - c.pairs - c.counts))[0]
        background = rng.choice(list(BACKGROUNDS))
        if kind == "pair":
            return SceneSpec(tuple(rng.sample(self.names, 2)), background, relation=rng.choice(RELATIONS))
        name = rng.choice(self.names)
        if kind == "count":
            return SceneSpec((name,), background, count=rng.choice(list(COUNTS)))
        return SceneSpec((name,), background, size=rng.choice(("small", "large")) if rng.random() < c.sized else "")

    def held_out_specs(self, n: int, seed: int, kind: str) -> list[SceneSpec]:
        """n held-out combinations of one kind, canonical size, decided by the seed alone.

        None comes a second time before all came once: of single objects a corpus holds out only a few dozen. UsageError
        when it holds out none.
        """
        rng, found = random.Random(f"held-out {kind} {seed}"), dict[SceneSpec, None]()
        known = self.held_out_count(kind)
        if not known:
            raise UsageError(f"the corpus holds out no {kind!r} scene; give it more objects or a larger held_out share")
        while len(found) < min(n, known):
            spec = self.spec(rng, kind)
            if self.is_held_out(spec) and not spec.size:
                found[spec] = None
        return [*islice(cycle(found), n)]

    def held_out_count(self, kind: str) -> int:
        """How many different combinations of one kind are held out, of canonical size."""
        if kind == "pair":
            pairs = sum(self.is_held_out(SceneSpec(p, "", RELATIONS[0])) for p in combinations(self.names, 2))
            return pairs * 2 * len(RELATIONS) * len(BACKGROUNDS)
        singles = sum(self.is_held_out(SceneSpec((name,), colour)) for name in self.names for colour in BACKGROUNDS)
        return singles * (len(COUNTS) if kind == "count" else 1)

    def scene(self, index: int) -> Scene:
        """Training scene `index` with its ground truth."""
        rng = random.Random(f"{self.seed} {index}")
        spec = self.spec(rng)
        while self.is_held_out(spec):
            spec = self.spec(rng)
        phrasing = 0 if rng.random() < CANONICAL_SHARE else rng.randrange(1, len(PHRASINGS))
        return self.draw(spec, rng, phrasing)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], str]:
        scene = self.scene(index)
        return scene.image.transpose(2, 0, 1), scene.caption

    def draw(self, spec: SceneSpec, rng: random.Random, phrasing: int = 0) -> Scene:
        """Render a scene: every object at its place, jittered by what room there is."""
        S = self.config.size
        names = spec.objects if spec.relation else spec.objects * spec.count
        image = Image.new("RGB", (S, S), BACKGROUNDS[spec.background])
        masks = np.zeros((len(names), S, S), bool)
        boxes = []
        for i, (name, (x, y)) in enumerate(zip(names, places(spec), strict=True)):
            low, high = SIDES[spec.size] if len(names) == 1 else SIDES_BY_COUNT[len(names)]
            middle = (low + high) / 2
            side = round((middle + (rng.uniform(low, high) - middle) * self.config.spread) * S)
            sprite = self.sprite(name, side)
            room = [max(min(c, 1 - c) * S - side / 2, 0) * self.config.wander for c in (x, y)]
            left = self.on_grid(x * S - sprite.width / 2 + rng.uniform(-1, 1) * room[0], sprite.width)
            top = self.on_grid(y * S - sprite.height / 2 + rng.uniform(-1, 1) * room[1], sprite.height)
            image.paste(sprite, (left, top), sprite)
            boxes.append((left, top, left + sprite.width, top + sprite.height))
            cover = Image.new("L", (S, S))
            cover.paste(sprite.getchannel("A"), (left, top))
            masks[i] = np.asarray(cover) > 127
        for i in range(len(names)):
            masks[i] &= ~masks[i + 1 :].any(0)  # what a later object hides is not seen
        return Scene(spec, spec.caption(phrasing), np.asarray(image), names, tuple(boxes), masks)

    def on_grid(self, start: float, length: int) -> int:
        """The multiple of the grid nearest to `start` at which something of this length stays inside the picture."""
        grid = self.config.grid
        return min(round(start / grid), max(self.config.size - length, 0) // grid) * grid

    def sprite(self, name: str, side: int) -> Image.Image:
        """The glyph of `name`, cropped to its ink and scaled so that its longer side is `side` pixels. RGBA."""
        if (name, side) not in self._sprites:
            ink = self._sprites.get((name, 0)) or self._render(name)
            self._sprites[name, 0] = ink
            scale = side / max(ink.size)
            size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
            # Premultiplied, so that transparent pixels lend no colour to the edge.
            self._sprites[name, side] = (
                ink.convert("RGBa")
                .resize(size, Image.Resampling.BOX if scale < 0.2 else Image.Resampling.LANCZOS)
                .convert("RGBA")
            )
        return self._sprites[name, side]

    @cached_property
    def _font(self) -> ImageFont.FreeTypeFont:
        # The font's only bitmap strike is 109 pixels per em.
        return ImageFont.truetype(str(find_font()), 109, layout_engine=ImageFont.Layout.BASIC)

    def _render(self, name: str) -> Image.Image:
        from PIL import ImageDraw

        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text(
            (10, 10), chr(int(self.glyphs[name].code, 16)), font=self._font, embedded_color=True
        )
        ink = canvas.getbbox()
        if ink is None:
            raise LdmError(
                f"the emoji font has no glyph for {name!r} (U+{self.glyphs[name].code}); "
                "install a newer Noto Color Emoji"
            )
        return canvas.crop(ink)


def places(spec: SceneSpec) -> tuple[tuple[float, float], ...]:
    """The centres of a scene's objects, as shares of the side (x to the right, y down)."""
    if not spec.relation:
        return PLACES[spec.count]
    first, second = PLACES[2]
    if spec.relation in ("above", "below"):
        first, second = first[::-1], second[::-1]
    return (second, first) if spec.relation in ("to the right of", "below") else (first, second)
