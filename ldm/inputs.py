"""Pictures that people give, from files or from memory: opened safely, and brought to 8-bit RGB or RGBA.

Torch is imported where a tensor is made, for `ldm.data` opens pictures with this and needs none.
"""

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ldm.errors import LdmError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES: dict[str, tuple[str, ...]] = {  # Pillow's format -> suffixes; nothing else is opened, EPS least of all
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),  # several JPEG in one file, as some cameras write: the decoder of JPEG takes it
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
DECODERS = tuple(name for name in SUFFIXES if name != "MPO")
IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
LARGEST = 178_956_970  # pixels, half a GiB in RGB, where Pillow refuses too: more is taken for a decompression bomb
# What decoders raise at files that are damaged; Pillow lets all of these through.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)
PLAIN = frozenset("1 L LA P PA RGB RGBA".split())  # noqa: SIM905  # modes that become RGB or RGBA without loss
MODES = PLAIN | frozenset("La RGBX RGBa CMYK YCbCr HSV I I;16 I;16L I;16B I;16N".split())  # noqa: SIM905
OWN_PROFILE = ("RGB", "RGBA", "P")  # modes whose colour profile also tells of the RGB that they become
BITS_PER_SAMPLE = 258  # TIFF 6.0, section 8


class DecodeError(LdmError):
    """The bytes of a picture cannot become pixels; `kind` is the word of `ldm.data.check.KINDS` for it."""

    def __init__(self, text: object = "", kind: str = "corrupt") -> None:  # the text alone makes it anew from a pickle
        super().__init__(text)
        self.kind = kind


class Source(NamedTuple):
    """A picture to be edited. name: of its file, without the folder; "" for a picture of memory. image: RGB or RGBA of
    8 bits. sha256: of mode, size and pixels in hex, so that the same picture in another file has the same.
    """

    name: str
    image: Image.Image
    sha256: str


def source_of(given: "str | Path | Image.Image | Source", what: str = "image", convert: bool = False) -> Source:
    """The picture of a file or of memory, in RGB, or RGBA if it can be transparent; a Source is returned as it is.

    what: the noun for messages. convert: several frames, colours that are not RGB, more than 8 bits and a turn by EXIF
    are no longer refused: the first frame is taken, colours become RGB without a profile, the upper 8 bits are kept (as
    Pillow does with 16-bit RGB), and it is turned upright. A colour profile of RGB is not heeded, and kept. UsageError
    for these, and for what cannot be decoded (see `decoded`) or read.
    """
    if isinstance(given, Source):
        return given
    memory = isinstance(given, Image.Image)
    shown = what if memory else f"{what} {given}"
    try:
        image, deep = _opened(given)
    except (DecodeError, *DAMAGE) as error:
        reason = getattr(error, "strerror", None) or error
        kinds = ", ".join(DECODERS)
        raise UsageError(f"the {shown} cannot be used: {reason}; give a sound picture ({kinds})") from error
    faults = [
        ("has several frames", "its first frame", image.format != "MPO" and getattr(image, "is_animated", False)),
        ("has more than 8 bits a channel", "the upper 8 bits", deep),
        (f"is in {image.mode}, not in gray or RGB", "it as RGB", not deep and image.mode not in PLAIN),
        ("is to be shown turned, as its EXIF says", "it upright", is_turned(image)),
    ]
    said, cures = [fault for fault, _, there in faults if there], [cure for _, cure, there in faults if there]
    if said and not convert:
        raise UsageError(f"the {shown} {' and '.join(said)}; add --convert-image to take {' and '.join(cures)}")
    image = turned(image)
    profile = image.info.get("icc_profile") if image.mode in OWN_PROFILE else None
    if image.mode[0] == "I":
        image = Image.fromarray((_levels(image) >> 8).astype(np.uint8))
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.info = {"icc_profile": profile} if profile else {}
    digest = hashlib.sha256(f"{image.mode} {image.width} x {image.height}\n".encode())
    digest.update(image.tobytes())
    return Source("" if isinstance(given, Image.Image) else Path(given).name, image, digest.hexdigest())


def tensor_of(image: Image.Image) -> "Tensor":
    """RGB or RGBA -> float32 [1, 3 or 4, H, W] in [-1, 1], which `ldm.images.to_pil` brings back to the same bytes.

    Colours are straight, not multiplied by alpha.
    """
    import torch

    levels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)
    return 2.0 * levels.permute(2, 0, 1)[None].contiguous() - 1.0


def _opened(given: str | Path | Image.Image) -> tuple[Image.Image, bool]:
    """The decoded picture, and whether it has more than 8 bits a channel."""
    if isinstance(given, Image.Image):
        return _loaded(given), given.mode[0] == "I"
    data = Path(given).read_bytes()
    image = decoded(data)
    return image, is_deep(data, image)


def decoded(data: bytes, whole: bool = False) -> Image.Image:
    """The first frame of a picture file, decoded in its own mode. DecodeError when it is empty, no picture, damaged or
    cut short, of more than LARGEST pixels, or of a mode that does not become RGB.

    whole: the checksums of a PNG are compared too, also of parts that decoding does not need.
    """
    if not data:
        raise DecodeError("it has no bytes", "empty")
    try:
        image = _loaded(Image.open(io.BytesIO(data), formats=DECODERS))
        if whole and image.format == "PNG":
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()
        return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(str(error).split(",")[0].lower()) from error
    except UnidentifiedImageError as error:
        kind, reason = _unidentified(data)
        raise DecodeError(reason, kind) from error
    except DAMAGE as error:
        short = _cut(data) or "truncated" in str(error)
        kind, what = ("truncated", "cut short") if short else ("corrupt", "damaged")
        raise DecodeError(f"it is {what}: {error}", kind) from error


def _loaded(image: Image.Image) -> Image.Image:
    """The picture with its pixels, which are counted before they are decoded."""
    if not image.width * image.height:
        raise DecodeError("it has no pixels", "empty")
    if image.width * image.height > LARGEST:
        raise _bomb(f"{image.width} x {image.height} pixels")
    image.load()
    if image.mode not in MODES:
        raise DecodeError(f"its pixels are of the kind {image.mode!r}; save it with 8 or 16 bits a channel", "mode")
    return image


def _bomb(size: str) -> DecodeError:
    return DecodeError(f"it is too large to be decoded: {size}, and {LARGEST} pixels are the most", "bomb")


def _unidentified(data: bytes) -> tuple[str, str]:
    """The kind and the reason for bytes that no decoder takes."""
    if data.startswith(b"version https://git-lfs"):
        return "no-picture", "it is the pointer of a file in Git LFS; fetch it with: git lfs pull"
    if magic(data):
        return ("truncated", "it is cut short") if _cut(data) else ("corrupt", f"it is a damaged {magic(data)}")
    if data.lstrip()[:1] == b"<":
        return "no-picture", "it is text (a web page?), not a picture"
    return "no-picture", "it is no picture of a known kind"


def magic(data: bytes) -> str:
    """The format that the first bytes promise; "" if none."""
    starts = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    return next((name for start, name in starts.items() if data.startswith(start)), "BMP" * data.startswith(b"BM"))


def _cut(data: bytes) -> bool:
    """Whether a damaged file lacks the end that its format has."""
    kind = magic(data)
    if kind == "PNG":
        return b"IEND" not in data[-32:]
    if kind == "JPEG":
        return b"\xff\xd9" not in data[-4096:]
    if kind == "GIF":
        return not data.rstrip(b"\0").endswith(b";")
    if kind in ("WEBP", "BMP"):
        size = struct.unpack("<I", data[4:8].ljust(4, b"\0"))[0] + 8 if kind == "WEBP" else _word(data, 2)
        return len(data) < size
    return kind == "TIFF" and _word(data, 4) > len(data)  # it and AVIF have no last mark


def _word(data: bytes, at: int) -> int:
    order: Literal["big", "little"] = "big" if data.startswith(b"MM") else "little"
    return int.from_bytes(data[at : at + 4], order)


def is_deep(data: bytes, image: Image.Image) -> bool:
    """Whether a file has more than 8 bits a channel. Pillow shows it by the mode only for gray."""
    if image.format == "PNG":
        return data[24] == 16  # the bit depth of the header, PNG 3rd edition, section 11.2.1
    depths = image.getexif().get(BITS_PER_SAMPLE, 8) if image.format == "TIFF" else 8
    return image.mode[0] == "I" or max(depths if isinstance(depths, tuple) else (depths,)) > 8


def is_turned(image: Image.Image) -> bool:
    """Whether its EXIF says that it is to be shown turned or mirrored."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except DAMAGE:  # an EXIF block that is no EXIF says nothing
        return False


def turned(image: Image.Image) -> Image.Image:
    """The picture as its EXIF says that it is to be shown."""
    return ImageOps.exif_transpose(image) if is_turned(image) else image


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture in RGB, as training sees it: turned as its EXIF says, white behind what is transparent, 16 bits
    scaled to 8 (v / 257, rounded). CMYK becomes RGB without a colour profile, and profiles of RGB are not heeded.
    """
    image = turned(image)
    if image.mode[0] == "I":
        image = Image.fromarray(np.rint(_levels(image) / 257).astype(np.uint8))
    return opaque(image)


def opaque(image: Image.Image) -> Image.Image:
    """In RGB, on white where it is transparent."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _levels(image: Image.Image) -> NDArray[np.int64]:
    """A gray picture in 16 bits. Pillow's own conversion to 8 cuts values off at 255."""
    return np.clip(np.asarray(image).astype(np.int64), 0, 65535)
