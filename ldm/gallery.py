"""A folder of pictures as one HTML page: thumbnails and recipes inside it, no network, nothing to install.

The page is gallery.html beside this file. Whatever pictures say of themselves is foreign text: it enters the page
escaped, and a Content-Security-Policy (W3C, CSP level 3) lets only the page's own script run, named by its hash.
"""

import base64
import hashlib
import html
import io
import json
import os
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields
from importlib.resources import files
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from PIL import Image, ImageOps

from ldm.errors import LdmError, ModelError
from ldm.request import Request, flag_of

if TYPE_CHECKING:
    from ldm.recipe import Recipe

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif")
THUMBNAIL, PIXELS = 256, 128  # longest side of a thumbnail; up to which a picture is shown pixel by pixel
ORIENTATION = 0x0112  # Exif 2.32, sec. 4.6.4: 5 to 8 lie on their side
POLICY = "default-src 'none'; img-src data: 'self'; style-src {}; script-src {}; base-uri 'none'; form-action 'none'"
SPELT = {"\n": r"\n", "\\": r"\\", "'": r"\'"}  # how $'' of a shell writes them
NOT_SHOWN = ("output_type", "num_images_per_prompt")  # fields that are nothing to one finished picture


class Picture(NamedTuple):
    """What the page shows of one file."""

    name: str  # path from the page to the file, with /
    thumbnail: bytes  # WebP, longest side <= 256
    size: tuple[int, int]  # width and height of the file's picture in pixels, as it is looked at
    date: int  # when the file was last changed, in seconds since 1970
    recipe: tuple[tuple[str, str], ...]  # (label, value) in order; the prompt's label is Prompt, the seed's Seed
    parameters: str  # the text in the file; "" where there is none
    command: str  # an `ldm generate` line; "" where no prompt is known


def find_pictures(folder: Path) -> Iterator[Path]:
    """The PNG, JPEG, WebP and AVIF files below a folder, sorted; nothing hidden, no link to a folder is followed.

    LdmError for a folder that cannot be read.
    """
    try:
        inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise LdmError(f"cannot read the folder {folder}: {error.strerror}; choose another one") from error
    for entry in inside:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from find_pictures(folder / entry.name)
        elif entry.is_file() and entry.name.lower().endswith(SUFFIXES):
            yield folder / entry.name


def describe(path: Path, page: Path) -> Picture:
    """A picture with its recipe, if it has one, for a page in the folder `page`. ModelError when it cannot be read."""
    try:
        with Image.open(path) as image:
            lies = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            size = image.size[::-1] if lies else image.size
            thumbnail = _thumbnail(image)
        date = int(path.stat().st_mtime)
    except Exception as error:  # Pillow's decoders raise nearly anything when a file is damaged
        raise ModelError(f"cannot read the image {path}: {error}; save it again") from error
    name = PurePath(os.path.relpath(path, page)).as_posix()
    request, recipe, notes, parameters = _found(path)
    return Picture(name, thumbnail, size, date, rows_of(request, recipe, notes), parameters, command_of(request))


def _thumbnail(image: Image.Image) -> bytes:
    """WebP of at most 256 pixels a side, upright; without loss where single pixels are looked at."""
    small_enough = max(image.size) <= PIXELS
    image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))  # decodes a large JPEG at a fraction of its size
    upright = ImageOps.exif_transpose(image)
    small = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "WEBP", lossless=small_enough, quality=82)
    return data.getvalue()


def _found(path: Path) -> "tuple[Mapping[str, Any], Recipe | None, Sequence[str], str]":
    """The fields of Request that drew a picture, our recipe, what is to be said, and the raw text; empty for none.

    A recipe that is damaged is something to be said.
    """
    from ldm.images import read_text
    from ldm.recipe import read

    parameters = read_text(path).get("parameters", "")
    try:
        found = read(path)
    except ModelError as error:
        return {}, None, (str(error).replace(str(path), path.name),), parameters
    except LdmError:
        return {}, None, (), parameters
    return found.request, found.recipe, found.notes, parameters


def _adapter(row: Mapping[str, Any]) -> str:
    """An adapter of a recipe: its name, its kind and how strong it was."""
    kind = str(row.get("type", "adapter")).replace("_", " ")
    return " ".join(filter(None, (str(row.get("name", "unnamed")), f"({kind})", str(row.get("strength", "")))))


def rows_of(
    request: Mapping[str, Any], recipe: "Recipe | None" = None, notes: Sequence[str] = ()
) -> tuple[tuple[str, str], ...]:
    """What a person reads: what of the request is not the default, in the order of Request; what drew it; the notes."""
    rows = [(_label(field), "\n".join(values)) for field in fields(Request) if (values := _said(request, field))]
    if recipe is not None:
        digests, versions = recipe.components.items(), recipe.versions.items()
        rows += [
            ("Model", recipe.model),
            ("Weights", "\n".join(f"{name} {digest[:10]}" for name, digest in digests)),
            *([("Adapters", "\n".join(map(_adapter, recipe.adapters)))] if recipe.adapters else []),
            ("Drawn on", f"{recipe.device}, {recipe.dtype}"),
            ("Versions", "\n".join(f"{name} {version}" for name, version in versions)),
        ]
    return (*rows, *(("Note", note) for note in notes))


def command_of(request: Mapping[str, Any]) -> str:
    """The `ldm generate` line of a request, quoted for a POSIX shell; "" without a prompt.

    It is one line without control characters whatever the prompt holds, so that pasting it runs nothing else.
    """
    prompts: list[str] = []
    words: list[str] = []
    for field in fields(Request):
        values = _said(request, field)
        if field.name == "prompt":
            prompts = values
            continue
        flag = flag_of(field)
        if field.default is False:
            words += [flag] * len(values)
            continue
        for value in values:
            words += [f"{flag}={_quoted(value)}"] if value.startswith("-") else [flag, _quoted(value)]
    ended = ["--"] if any(prompt.startswith("-") for prompt in prompts) else []
    quoted = [_quoted(prompt) for prompt in prompts]
    order = [*words, *ended, *quoted] if ended else [*quoted, *words]
    return " ".join(["ldm", "generate", *order]) if prompts else ""


def _said(request: Mapping[str, Any], field: "Field[Any]") -> list[str]:
    """A field's values as text; none where it has its default, or does not matter to one picture."""
    value = request.get(field.name)
    if value is None or value == field.default or field.name in NOT_SHOWN:
        return []
    return [str(each) for each in value] if isinstance(value, tuple | list) else [str(value)]


def _label(field: "Field[Any]") -> str:
    return str(field.metadata["flag"] or field.name).replace("_", " ").replace("-", " ").capitalize()


def _quoted(text: str) -> str:
    """One word of a shell: plain, in '', or with invisible characters spelt out in $'' (POSIX 2024, sec. 2.2.4)."""
    text = text.encode("utf-8", "replace").decode().replace("\0", "")  # no word of a command line can hold a zero
    if not any(map(_invisible, text)):
        return shlex.quote(text)
    octal = ("".join(f"\\{byte:03o}" for byte in c.encode()) if _invisible(c) else c for c in text)
    return "$'" + "".join(SPELT.get(c, escaped) for c, escaped in zip(text, octal, strict=True)) + "'"


def _invisible(c: str) -> bool:
    """Whether a terminal may obey a character in place of showing it; what joins emoji is harmless."""
    return unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\u200d"


def gallery(pictures: Sequence[Picture], title: str) -> str:
    """The page: the thumbnails and their prompts as HTML, the recipes as JSON for the dialog that shows them.

    It looks for the files themselves under their names beside it, and makes do with the thumbnails where they are not.
    """
    template = files("ldm").joinpath("gallery.html").read_text("utf-8")
    count = f"{len(pictures):,} picture{'' if len(pictures) == 1 else 's'}"
    data = [{k: v for k, v in picture._asdict().items() if k != "thumbnail"} for picture in pictures]
    parts = {
        "policy": POLICY.format(_hash(template, "style"), _hash(template, "script")),
        "title": _text(title),
        "count": count,
        "cards": "\n".join(map(_card, pictures)),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # cannot end its element
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _card(picture: Picture) -> str:
    """One thumbnail: a link to the file, which the page's script opens in its dialog."""
    words = _text(dict(picture.recipe).get("Prompt") or picture.name)
    where = "./" + quote(os.fsencode(picture.name))  # ./ and %3A: never another scheme, whatever the name
    kind = ' class="pixel"' if max(picture.size) <= PIXELS else ""
    source = base64.b64encode(picture.thumbnail).decode()
    return (
        f'<li{kind}><a href="{where}" aria-haspopup="dialog"><img src="data:image/webp;base64,{source}" alt="{words}" '
        f'loading="lazy" decoding="async"><span class="caption" dir="auto" aria-hidden="true">{words}</span></a></li>'
    )


def _text(text: str) -> str:
    """Foreign text as HTML text or attribute; what HTML and UTF-8 cannot hold becomes the replacement character."""
    return html.escape(re.sub("[\0\ud800-\udfff]", "\ufffd", text))


def _hash(template: str, tag: str) -> str:
    """The source expression of CSP for the one element `tag` of the page."""
    match = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    assert match is not None  # it is our own page
    return f"'sha256-{base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()}'"
