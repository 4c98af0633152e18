"""XYZ plots: pictures in columns and rows with their labels, and the axes such a plot is asked for with."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import fields
from decimal import Decimal
from math import ceil
from typing import Any, NamedTuple, get_args, get_type_hints

from PIL import Image, ImageDraw, ImageFont

from ldm.errors import UsageError, choose
from ldm.request import Request, make_request

SMALLEST = 128  # pixels of a picture's longer side in the plot
LARGEST = 178_956_970  # pixels of a sheet; Pillow refuses to open a larger one as a decompression bomb
MARGIN, GAP, FONT_SIZE, LINE, TITLE_SIZE, TITLE_LINE = 16, 8, 14, 18, 20, 26  # pixels
MOST_LINES, MOST_CHARACTERS, WIDEST_LABEL = 8, 2000, 256  # of a label; the last of a row's, in pixels
MOST_VALUES = 400  # of an axis

NOT_AXES = ("output_type", "num_images_per_prompt")  # a cell of a plot is one picture
BESIDE = {"prompt": "an owl", "variation_strength": 0.5, "image": "owl.png", "mask_image": "alpha"}
# Fields whose values are separated by |, because they have commas in them.
TEXTS = ("prompt", "negative_prompt", "source_prompt", "mask_image", "extend")
NUMBER = r"[+-]?(?:\d{1,20}(?:\.\d{1,20})?|\.\d{1,20})"
RANGE = re.compile(rf"({NUMBER})(?:\.\.({NUMBER})(?::({NUMBER}))?)?", re.ASCII)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Layout(NamedTuple):
    """Where things are on a sheet, in pixels, and its texts in their lines."""

    size: tuple[int, int]
    cell: tuple[int, int]
    corner: tuple[int, int]  # upper left of the first cell
    title: list[str]
    columns: list[list[str]]
    rows: list[list[str]]


def plot(cells: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str], title: str = "") -> Image.Image:
    """Pictures row by row, labels of the columns above and of the rows at the left, all on white, in RGB.

    Pictures smaller than 128 pixels are enlarged by a whole factor, each pixel a square. Labels are wrapped to their
    column or row, and cut with ... where they do not fit; letters that the font lacks lose their accents or become
    boxes. UsageError: other than columns * rows pictures, none at all, or a sheet that `layout` refuses.
    """
    if not cells or len(cells) != len(columns) * len(rows):
        raise UsageError(
            f"{len(cells)} pictures for {len(columns)} columns and {len(rows)} rows; a plot takes one for each place"
        )
    factors = [max(1, -(-SMALLEST // max(image.size))) for image in cells]
    widest = max(image.width * factor for image, factor in zip(cells, factors, strict=True))
    highest = max(image.height * factor for image, factor in zip(cells, factors, strict=True))
    plan = layout((widest, highest), columns, rows, title)
    sheet = Image.new("RGB", plan.size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    (left, top), (width, height) = plan.corner, plan.cell
    write(draw, (MARGIN, MARGIN), plan.title, ImageFont.load_default(TITLE_SIZE), TITLE_LINE)
    for i, lines in enumerate(plan.columns):
        write(draw, (left + i * (width + GAP), top - GAP // 2 - LINE * len(lines)), lines, font, LINE)
    for i, lines in enumerate(plan.rows):
        write(draw, (MARGIN, top + i * (height + GAP)), lines, font, LINE)
    for i, (image, factor) in enumerate(zip(cells, factors, strict=True)):
        large = image.convert("RGBA").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        x, y = left + i % len(columns) * (width + GAP), top + i // len(columns) * (height + GAP)
        sheet.paste(large, (x + (width - large.width) // 2, y + (height - large.height) // 2), large)
    return sheet


def layout(cell: tuple[int, int], columns: Sequence[str], rows: Sequence[str], title: str = "") -> Layout:
    """Where `plot` puts pictures of at most `cell` pixels. UsageError: a sheet too large for Pillow to open again."""
    width, height = max(cell[0], SMALLEST // 2), max(cell[1], LINE)
    font, large = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(TITLE_SIZE)
    above = [wrapped(text, width, font, MOST_LINES) for text in columns]
    beside = [
        wrapped(text, min(max(width, SMALLEST), WIDEST_LABEL), font, min(MOST_LINES, height // LINE)) for text in rows
    ]
    label = max((round(font.getlength(line) + 0.5) for lines in beside for line in lines), default=0)
    left = MARGIN + (label + GAP if label else 0)
    right = left + len(columns) * (width + GAP) - GAP + MARGIN
    heading = wrapped(title, right - 2 * MARGIN, large, MOST_LINES)
    top = MARGIN + (len(heading) * TITLE_LINE + GAP if heading else 0)
    highest = max(map(len, above), default=0)
    top += LINE * highest + GAP // 2 if highest else 0
    bottom = top + len(rows) * (height + GAP) - GAP + MARGIN
    if right * bottom > LARGEST:
        raise UsageError(
            f"a plot of {len(columns)} columns and {len(rows)} rows has {right}x{bottom} pixels; at most {LARGEST:,} "
            f"fit into one picture, so give fewer values or smaller pictures"
        )
    return Layout((right, bottom), (width, height), (left, top), heading, above, beside)


def write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: Font, line: int) -> None:
    """Lines of text from their upper left corner on, `line` pixels apart."""
    for i, text in enumerate(lines):
        draw.text((at[0], at[1] + i * line), text, fill="black", font=font)


def wrapped(text: str, width: int, font: Font, most: int) -> list[str]:
    """`text` in at most so many lines of at most `width` pixels; a longer word is broken, what is left over is cut."""
    lines: list[str] = []
    line = ""
    for word in drawable(text[:MOST_CHARACTERS]).split():
        if len(lines) > most:
            break
        longer = f"{line} {word}".lstrip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        while len(line) > 1 and font.getlength(line) > width and len(lines) <= most:
            fits = max(1, bisect_right(range(1, len(line)), width, key=lambda n: ceil(font.getlength(line[:n]))))
            lines.append(line[:fits])
            line = line[fits:]
    lines += [line] if line else []
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last}..."]
    return lines


def drawable(text: str) -> str:
    """Text as Pillow's own font can show it: accented Latin letters without their accents, for it has only ASCII."""
    parts = []
    for c in text:
        letters = "".join(each for each in unicodedata.normalize("NFD", c) if not unicodedata.combining(each))
        parts.append(letters if letters.isascii() else c)
    return "".join(parts)


def axes(text: str) -> tuple[str, list[Any]]:
    """What one axis of a plot goes through: the name of a field of Request, and its values.

    "steps=5,10,20", "guidance=1..7:2" (a range, its step; 1 if absent), "seed=1..4", "scheduler=ddim,euler",
    "prompt=a taco|an owl". The name is the field's or its command-line flag's. UsageError: an unknown name, no value,
    one that is out of the field's range, or more than 400; scheduler names are looked up when the model is known.
    """
    name, equals, listed = text.partition("=")
    known = _names()
    field = known[choose("axis", name.strip().lstrip("-").replace("-", "_"), known)]
    kind = _kind(field)
    if not equals or not listed.strip():
        raise UsageError(f"axis {text!r} has no values; write for example steps=5,10,20 or guidance=1..7:2")
    parts = [part.strip() for part in listed.split("|" if field in TEXTS else ",")]
    values = parts if kind is str else [value for part in parts for value in _numbers(part, field, kind)]
    if len(values) > MOST_VALUES:
        raise UsageError(f"axis {name} has {len(values)} values; give at most {MOST_VALUES}")
    for value in values:
        if value == "" and field != "negative_prompt":
            raise UsageError(f"axis {text!r} has an empty value; take out what separates it from the next")
        # Some fields are right only beside others; whether the plot has those is for its own request to say.
        make_request(None, BESIDE | {field: value})
    return field, values


def _kind(field: str) -> type | None:
    """What one value of a field is: int, float or str; None for fields of other types."""
    hint = get_type_hints(Request)[field]
    return next((kind for kind in get_args(hint) or (hint,) if kind in (int, float, str)), None)


def _names() -> dict[str, str]:
    """The words an axis may begin with -> the field of Request each stands for."""
    usable = [field for field in fields(Request) if field.name not in NOT_AXES and _kind(field.name)]
    flags = {field.metadata["flag"].replace("-", "_"): field.name for field in usable if field.metadata["flag"]}
    return flags | {field.name: field.name for field in usable}


def _numbers(part: str, field: str, kind: type | None) -> list[int | float]:
    """The numbers of "5", "1..4" or "7..1:2". UsageError for anything else, and for more of them than an axis takes."""
    match = RANGE.fullmatch(part)
    if match is None:
        raise UsageError(f"{field} is {part!r}; it must be a number, or a range such as 1..7 or 1..7:2")
    first, last, step = Decimal(match[1]), Decimal(match[2] or match[1]), Decimal(match[3] or 1)
    if step <= 0:
        raise UsageError(f"{field} is {part!r}; the step of a range must be above 0, as in 1..7:2")
    if abs(last - first) / step >= MOST_VALUES:
        raise UsageError(f"{field} is {part!r}, which is more than {MOST_VALUES} values; give fewer, or a larger step")
    count = int(abs(last - first) / step) + 1
    exact = [first + i * (step if last >= first else -step) for i in range(count)]
    whole = kind is int and all(value == int(value) for value in exact)  # else Request says what is wrong with it
    return [int(value) if whole else float(value) for value in exact]
