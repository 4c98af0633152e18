"""Pictures: tensors in [-1, 1] <-> PIL, saving with text inside, grids and contact sheets."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ldm.checkpoints.safe import atomic_bytes
from ldm.errors import ModelError, NumericalError, UsageError, choose

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {  # suffix -> Pillow's format and its options
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
EXIF_IFD, USER_COMMENT, UNICODE = 0x8769, 0x9286, b"UNICODE\0"  # Exif 2.32, table 9 and sec. 4.6.5
FONT_SIZE = 11


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


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """B pictures of one size (any mode; white shows through transparency) -> float32 [B, 3, H, W] in [-1, 1].

    UsageError for none, or for different sizes.
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise UsageError(f"images of sizes {sizes}; a batch is of one size and not empty; resize them")
    arrays = [np.asarray(_opaque(image), dtype=np.float32) / 255.0 for image in images]
    return 2.0 * torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous() - 1.0


def _opaque(image: Image.Image) -> Image.Image:
    """In RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    base = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(base, rgba).convert("RGB")


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
        sheet.paste(_opaque(image), (x + (width - image.width) // 2, y + (height - image.height) // 2))
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


def save(image: Image.Image, path: str | Path, text: Mapping[str, str] | None = None) -> None:
    """Writes a picture atomically; the suffix chooses .png, .jpg, .jpeg or .webp (quality 95).

    text: kept inside the file, where image tools look for it: PNG takes any keys (text chunks), JPEG and WebP the one
    key "parameters" (Exif UserComment). UsageError for another suffix or key; LdmError when it cannot be written.
    """
    path = Path(path)
    kind, options = FORMATS[choose("image suffix", path.suffix.lower(), FORMATS)]
    data = io.BytesIO()
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, value in (text or {}).items():
            chunks.add_text(key, value)
        image.save(data, kind, pnginfo=chunks)
    else:
        exif = Image.Exif()
        for key, value in (text or {}).items():
            choose(f"text key for {kind}", key, ["parameters"])
            exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + value.encode("utf-16-be")
        _opaque(image).save(data, kind, exif=exif, **options)
    atomic_bytes(path, data.getvalue())


def read_text(path: str | Path) -> dict[str, str]:
    """The text that `save` put into a picture; {} when there is none. ModelError when it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                image.load()  # text chunks may follow the pixels
                return {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
            comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ModelError(f"cannot read the image {path}: {error}") from error
    if not isinstance(comment, bytes) or not comment.startswith(UNICODE):
        return {}
    return {"parameters": comment.removeprefix(UNICODE).decode("utf-16-be", errors="replace")}
