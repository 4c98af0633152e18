"""Pictures: tensors in [-1, 1] <-> PIL, saving with text inside, grids and contact sheets."""

import io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, features
from torch import Tensor

from ldm.checkpoints.safe import atomic_bytes
from ldm.errors import LdmError, ModelError, NumericalError, UsageError, choose
from ldm.inputs import opaque

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {  # suffix -> Pillow's format and its options
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
    ".avif": ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
}
TEXTS = ("parameters", "ldm")  # what a picture may carry: A1111's text, and our JSON
FOREIGN_TEXTS = ("prompt", "workflow")  # ComfyUI's two graphs
LARGEST_TEXT = 4_000_000  # characters of one text; a longer one is not read
LARGEST_EXIF = 65_533  # bytes in a JPEG file, whose segments count their length in two bytes
EXIF_IFD, MAKER_NOTE, USER_COMMENT = 0x8769, 0x927C, 0x9286  # Exif 2.32, tables 1, 7 and 9
UNICODE, ASCII, LDM = b"UNICODE\0", b"ASCII\0\0\0", b"ldm\0"  # what the values begin with (Exif 2.32 sec. 4.6.5)
FONT_SIZE = 11
Pictures = list[Image.Image] | Tensor | NDArray[np.float32]


def to_numpy(images: Tensor) -> NDArray[np.float32]:
    """[B, C, H, W] in [-1, 1] (clamped) -> float32 [B, H, W, C] in [0, 1], as diffusers' `output_type="np"`.

    NumericalError when a value is not finite: no picture is made of it.
    """
    if not torch.isfinite(images).all():
        kind = str(images.dtype).removeprefix("torch.")
        raise NumericalError(f"the image has values that are not finite (computed in {kind}); compute it in float32")
    array: NDArray[np.float32] = (images * 0.5 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
    return array


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] -> B pictures of 8 bits a channel, rounded as diffusers does (half to even)."""
    return [Image.fromarray(array) for array in (to_numpy(images) * 255).round().astype(np.uint8)]


def of_type(images: Tensor, output_type: str) -> Pictures:
    """[B, 3, H, W] in [-1, 1] -> "pil": pictures; "pt": tensor [B, 3, H, W] in [0, 1]; "np": array [B, H, W, 3]."""
    if output_type == "pil":
        return to_pil(images)
    array = to_numpy(images)
    return torch.from_numpy(array).permute(0, 3, 1, 2) if output_type == "pt" else array


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """B pictures of one size (any mode; white shows through transparency) -> float32 [B, 3, H, W] in [-1, 1].

    UsageError for none, or for different sizes.
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise UsageError(f"images of sizes {sizes}; a batch is of one size and not empty; resize them")
    arrays = [np.asarray(opaque(image), dtype=np.float32) / 255.0 for image in images]
    return 2.0 * torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous() - 1.0


def grid(
    images: Sequence[Image.Image], columns: int, padding: int = 2, labels: Sequence[str] | None = None
) -> Image.Image:
    """Pictures row by row on white, `padding` pixels around each, each centred in a cell of the largest size.

    labels: one line or more under each picture, wrapped at the cell's width. UsageError when there is nothing to show,
    or the labels are not as many as the pictures.
    """
    if not images or columns < 1 or padding < 0:
        raise UsageError(f"a grid of {len(images)} images in {columns} columns; it takes at least one of each")
    if labels is not None and len(labels) != len(images):
        raise UsageError(f"{len(labels)} labels for {len(images)} images; give one each")
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_wrapped(label, width, font) for label in labels or []]
    line = FONT_SIZE + 3
    band = line * max((text.count("\n") + 1 for text in texts if text), default=0)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    step_x, step_y = width + padding, height + band + padding
    sheet = Image.new("RGB", (columns * step_x + padding, rows * step_y + padding), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = padding + i % columns * step_x, padding + i // columns * step_y
        sheet.paste(opaque(image), (x + (width - image.width) // 2, y + (height - image.height) // 2))
        for row, text in enumerate(texts[i].split("\n") if texts else []):
            draw.text((x, y + height + row * line), text, fill="black", font=font)
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text` in lines of at most `width` pixels; a longer word is cut."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            word = word[:-1]
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width or not lines[-1] else [*lines, word]
    return "\n".join(lines)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8, side: int = 128
) -> Image.Image:
    """A labelled grid of pictures brought to at most `side` pixels, small ones by whole factors to stay sharp."""
    return grid([_fitted(image, side) for image in images], columns, padding=8, labels=captions)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    longest = max(image.size)
    if longest <= side:
        factor = side // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * side / longest)), max(1, round(image.height * side / longest)))
    return image.resize(size, Image.Resampling.LANCZOS)


def format_of(path: str | Path) -> tuple[str, dict[str, Any]]:
    """Pillow's format of a picture file and how to save it, by the suffix: .png, .jpg, .jpeg, .webp or .avif.

    UsageError for another suffix; LdmError for .avif where Pillow was built without it.
    """
    kind, options = FORMATS[choose("image suffix", Path(path).suffix.lower(), FORMATS)]
    if kind == "AVIF" and not features.check("avif"):
        raise LdmError(f"{path} cannot be written, for this Pillow was built without AVIF; save as .png")
    return kind, options


def save(image: Image.Image, path: str | Path, text: Mapping[str, str] | None = None) -> None:
    """Writes a picture atomically, in the format of its suffix (see `format_of`; quality 95).

    text: kept inside the file under the keys "parameters" and "ldm". PNG has text chunks, where image tools look for
    them; in the others "parameters" is the Exif UserComment, as A1111 has it, and "ldm" the MakerNote. Half surrogate
    pairs, which no encoding takes, become "?". UsageError for another suffix or key; LdmError when the file cannot be
    written or the text is too long for it.
    """
    path = Path(path)
    kind, options = format_of(path)
    texts = {choose("text key", key, TEXTS): v.encode("utf-8", "replace").decode() for key, v in (text or {}).items()}
    if any(len(value) > LARGEST_TEXT for value in texts.values()):
        raise LdmError(f"the text for {path} is longer than {LARGEST_TEXT:,} characters; shorten it or leave it out")
    data = io.BytesIO()
    if image.info.get("icc_profile"):
        options = options | {"icc_profile": image.info["icc_profile"]}
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, value in texts.items():
            chunks.add_text(key, value)
        image.save(data, kind, pnginfo=chunks, **options)
    else:
        exif = _exif(texts)
        if kind == "JPEG" and len(exif) > LARGEST_EXIF:
            fault = f"the text takes {len(exif):,} bytes and a JPEG file holds {LARGEST_EXIF:,}"
            raise LdmError(f"{path} cannot be written: {fault}; save as .png, or shorten the prompt")
        opaque(image).save(data, kind, exif=exif, **options)
    atomic_bytes(path, data.getvalue())


def _exif(texts: Mapping[str, str]) -> bytes:
    """The texts as an Exif block: a big-endian TIFF file whose first directory only points to the Exif one.

    By hand, for Pillow writes both tags as BYTE and other readers want the UNDEFINED of the standard.
    """
    written = {"ldm": (MAKER_NOTE, LDM, "utf-8"), "parameters": (USER_COMMENT, UNICODE, "utf-16-be")}  # by rising tag
    rows = [(tag, start + texts[key].encode(code)) for key, (tag, start, code) in written.items() if texts.get(key)]
    if not rows:
        return b""
    values, end = b"", 26 + 6 + 12 * len(rows)
    entries = struct.pack(">H", len(rows))
    for tag, value in rows:
        entries += struct.pack(">HHLL", tag, 7, len(value), end + len(values))  # 7 = UNDEFINED
        values += value + bytes(len(value) % 2)
    first = struct.pack(">2sHLHHHLLL", b"MM", 42, 8, 1, EXIF_IFD, 4, 1, 26, 0)  # 4 = LONG
    return b"Exif\0\0" + first + entries + bytes(4) + values


def read_text(path: str | Path) -> dict[str, str]:
    """The texts a picture carries under "parameters" and "ldm", and ComfyUI's "prompt" and "workflow"; {} for none.

    One that is damaged or longer than 4,000,000 characters is left out. ModelError when the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                if not image.info.keys() & {*TEXTS, *FOREIGN_TEXTS}:
                    image.load()  # text may also follow the pixels
                found = {key: image.info.get(key) for key in (*TEXTS, *FOREIGN_TEXTS)}
            else:
                found = _exif_texts(image.getexif())
    except Exception as error:  # a decoder at a hostile file: Pillow's raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"cannot read the image {path}: {ascii(reason)[1:-1]}") from error
    return {key: str(text) for key, text in found.items() if isinstance(text, str) and len(text) <= LARGEST_TEXT}


def _exif_texts(exif: Image.Exif) -> dict[str, str | None]:
    """What `save` wrote, and ComfyUI's, which stands in the first directory as "prompt:{...}" and "workflow:{...}"."""
    pairs = [value.partition(":") for value in exif.values() if isinstance(value, str)]
    found: dict[str, str | None] = {key: text for key, _, text in pairs if key in FOREIGN_TEXTS}
    inner = exif.get_ifd(EXIF_IFD)
    comment, note = inner.get(USER_COMMENT), inner.get(MAKER_NOTE)
    if isinstance(comment, bytes):
        found["parameters"] = _comment_text(comment)
    if isinstance(note, bytes) and note.startswith(LDM):
        found["ldm"] = note.removeprefix(LDM).decode("utf-8", "replace")
    return found


def _comment_text(comment: bytes) -> str | None:
    """The text of a UserComment. None: in another code. Exif leaves the byte order of UNICODE open: A1111 and we write
    the high byte first, others the low one; the text says which, for it has "Steps: ", or else mostly plain letters.
    """
    if comment.startswith(ASCII):
        return comment.removeprefix(ASCII).rstrip(b"\0").decode("utf-8", "replace")
    if not comment.startswith(UNICODE) or len(comment) > 2 * LARGEST_TEXT:
        return None
    both = [comment.removeprefix(UNICODE).decode(code, "replace") for code in ("utf-16-be", "utf-16-le")]
    text = max(both, key=lambda text: ("Steps: " in text, sum(map(str.isascii, text[:1000]))))
    return text.removeprefix("\ufeff")
