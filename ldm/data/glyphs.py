"""What the corpus draws: emoji, simple shapes in plain colours, and the styles both may be drawn in.

Glyphs are rendered from the Noto Color Emoji font (SIL Open Font License 1.1); their names are CLDR short names, their
synonyms CLDR keywords.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ldm.errors import LdmError

RGB = tuple[int, int, int]
COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40), "orange": (244, 140, 36), "yellow": (250, 214, 60), "green": (46, 160, 72),
    "blue": (44, 92, 214), "purple": (128, 56, 172), "pink": (250, 156, 196), "brown": (122, 76, 46),
    "black": (18, 18, 18), "white": (246, 246, 246),
}  # fmt: skip
TINTS = ("red", "orange", "green", "blue", "purple", "pink")
STYLES_OF: dict[str, tuple[str, ...]] = {  # each kind of style, which is the first word of its styles
    **{kind: (kind,) for kind in ("outline", "silhouette", "pixelated")},
    "tinted": tuple(f"tinted {colour}" for colour in TINTS),
}
STYLES = tuple(style for styles in STYLES_OF.values() for style in styles)
DARK = ("black",)  # grounds on which outlines and silhouettes are white; on all others they are black
STRIKE = 109  # pixels per em of the font's only bitmaps
LINE = 0.05  # width of an outline, as a share of the object's longer side
BLOCKS = 11  # of a pixelated object's longer side
DRAWN = 256  # side at which shapes are drawn, to be made smaller
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/Library/Fonts",
    str(Path.home() / ".local/share/fonts"),
    str(Path.home() / ".fonts"),
)


KEPT = 6000  # sprites in memory; of the box's corpus all, of larger ones 29 kB each


def _turned(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """A polygon's corners on a circle, the first on top; inner: radius of a corner between each two, 1 for none."""
    steps = corners if inner == 1 else 2 * corners
    radii = [1.0 if inner == 1 or i % 2 == 0 else inner for i in range(steps)]
    turns = [2 * math.pi * i / steps for i in range(steps)]
    return [(r * math.sin(turn), -r * math.cos(turn)) for r, turn in zip(radii, turns, strict=True)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 120 for i in range(120)]
    return [
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in turns
    ]


SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": _turned(180),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": _turned(3),
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "star": _turned(5, 0.45),
    "heart": _heart(),
}
"""Corners of each, y downwards; scaled to the side that is asked for."""
COLOURED_SHAPES = tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))


@dataclass(frozen=True)
class Glyph:
    """One emoji the corpus can draw: its CLDR short name, code point and subgroup, and other words for it."""

    name: str
    code: str
    subgroup: str
    synonyms: tuple[str, ...] = ()


def all_glyphs(people: bool = False) -> list[Glyph]:
    """Every emoji the corpus may draw: plain names, no flags, keycaps, zodiac or religious signs, gestures.

    people: also faces, creatures, persons and roles, which come last.
    """
    tables = ("emoji.tsv", *["emoji_more.tsv"] * people)
    glyphs = (g for table in tables for g in _table(table))
    return [g for g in glyphs if _plain(g.name) and not is_plural(g.name) and g.name not in SHAPES]


def _table(name: str) -> Iterator[Glyph]:
    for line in files("ldm.data").joinpath(name).read_text("utf-8").splitlines():
        if not line.startswith("#"):
            code, subgroup, name, *said = line.split("\t")
            yield Glyph(name, code, subgroup, tuple(filter(None, said[0].split("|"))) if said else ())


def _plain(name: str) -> bool:
    return name.isascii() and name.replace(" ", "").replace("-", "").isalpha()


def is_plural(name: str) -> bool:
    """Whether a name is already a plural ('grapes', 'socks'), which 'a' and counts do not go with."""
    return (name.endswith("s") and not name.endswith(("ss", "us"))) or " with " in name


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


class Sprites:
    """Renders of emoji and coloured shapes in all sizes and styles; the last few thousand are kept."""

    def __init__(self, glyphs: dict[str, Glyph]) -> None:
        self.glyphs = glyphs
        self._inks: dict[str, Image.Image] = {}
        self._made: dict[tuple[str, int, str, bool], Image.Image] = {}

    def sprite(self, name: str, side: int, style: str = "", background: str = "white") -> Image.Image:
        """The object `name`, cropped to its ink and scaled so that its longer side is `side` pixels. RGBA.

        name: of an emoji, or "red circle". style: one of STYLES, or "". background: what it is to be seen on.
        """
        dark = background in DARK and style in ("outline", "silhouette")
        if (name, side, style, dark) not in self._made:
            if name not in self._inks:
                self._inks[name] = self.ink(name)
            if len(self._made) == KEPT:  # in insertion order: the oldest goes
                del self._made[next(iter(self._made))]
            ink = self._inks[name]
            self._made[name, side, style, dark] = _styled(ink, side, style, COLOURS["white" if dark else "black"])
        return self._made[name, side, style, dark]

    def ink(self, name: str) -> Image.Image:
        """The object as large as it is known, cropped to its ink. RGBA."""
        return _shape(*name.split()) if name in COLOURED_SHAPES else self._emoji(self.glyphs[name])

    @cached_property
    def _font(self) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(str(find_font()), STRIKE, layout_engine=ImageFont.Layout.BASIC)

    def _emoji(self, glyph: Glyph) -> Image.Image:
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((10, 10), chr(int(glyph.code, 16)), font=self._font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise LdmError(
                f"the emoji font has no glyph for {glyph.name!r} (U+{glyph.code}); install a newer Noto Color Emoji"
            )
        return canvas.crop(box)


def _shape(colour: str, shape: str) -> Image.Image:
    corners = np.array(SHAPES[shape], float)
    corners -= corners.min(0)
    corners *= DRAWN / corners.max()
    canvas = Image.new("RGBA", tuple(np.ceil(corners.max(0)).astype(int).tolist()))
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in corners.tolist()], fill=(*COLOURS[colour], 255))
    return canvas


def _styled(ink: Image.Image, side: int, style: str, line: RGB) -> Image.Image:
    """An object at its size in a style of STYLES, or as it is ("")."""
    kind, _, colour = style.partition(" ")
    if kind == "pixelated":
        blocks = _scaled(ink, BLOCKS)
        alpha = blocks.getchannel("A").point(lambda a: 255 * (a > 127))
        blocks.putalpha(alpha)
        return blocks.resize(_size(ink, side), Image.Resampling.NEAREST)
    if kind == "tinted":
        light = np.asarray(ink.convert("L"), np.float32)[..., None] / 255
        tint = np.array(COLOURS[colour], np.float32)
        rgb = np.where(light < 0.5, 2 * light * tint, 255 - 2 * (1 - light) * (255 - tint))
        ink = Image.merge("RGBA", (*Image.fromarray(rgb.round().astype(np.uint8)).split(), ink.getchannel("A")))
    elif kind in ("outline", "silhouette"):
        alpha = ink.getchannel("A")
        if kind == "outline":
            width = 2 * max(1, round(LINE * max(ink.size))) + 1
            room = Image.new("L", (ink.width + 2 * width, ink.height + 2 * width))
            room.paste(alpha, (width, width))
            inside = room.filter(ImageFilter.MinFilter(width)).crop((width, width, *(np.add(ink.size, width).tolist())))
            alpha = Image.fromarray(np.asarray(alpha) - np.minimum(np.asarray(alpha), np.asarray(inside)))
        ink = Image.new("RGBA", ink.size, line)
        ink.putalpha(alpha)
    return _scaled(ink, side)


def _size(ink: Image.Image, side: int) -> tuple[int, int]:
    scale = side / max(ink.size)
    return max(1, round(ink.width * scale)), max(1, round(ink.height * scale))


def _scaled(ink: Image.Image, side: int) -> Image.Image:
    """Premultiplied, so that transparent pixels lend no colour to the edge."""
    how = Image.Resampling.BOX if side < 0.2 * max(ink.size) else Image.Resampling.LANCZOS
    return ink.convert("RGBa").resize(_size(ink, side), how).convert("RGBA")
