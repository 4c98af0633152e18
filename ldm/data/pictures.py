"""One captioned picture of a data set: where its bytes lie, how they become RGB, and what a set of them is known by.

Where the pictures come from is `ldm.data.sources`; what is wrong with them, `ldm.data.check`.
"""

import hashlib
import io
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ldm.errors import LdmError

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
MODES = frozenset("1 L LA La P PA RGB RGBA RGBX RGBa CMYK YCbCr HSV I I;16 I;16L I;16B I;16N".split())  # noqa: SIM905
BITS_PER_SAMPLE = 258  # TIFF 6.0, section 8
Mask = Literal["alpha"]


class DecodeError(LdmError):
    """The bytes of a picture cannot become pixels; `kind` is the word of `ldm.data.check.KINDS` for it."""

    def __init__(self, text: object = "", kind: str = "corrupt") -> None:  # the text alone makes it anew from a pickle
        super().__init__(text)
        self.kind = kind


class Finding(NamedTuple):
    """What is noticed in a data set: where (as a person would look for it), a kind of `ldm.data.check.KINDS`, why, and
    the key of the picture that is left out for it ("": none is).
    """

    path: str
    kind: str
    reason: str
    key: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture and its caption; cheap and picklable, for nothing is read before `read`, `open` and `open_mask`.

    key: its path in the data set (in a tar shard, the member's), by which it is known and ordered, unique in the set.
    path: the file; start, length: the part of it that is the picture, in bytes (all of it when length is None).
    mask: a gray picture of the same size, white where the loss counts; "alpha": the picture's own alpha; None: no mask.
    """

    key: str
    path: Path
    start: int = 0
    length: int | None = None
    caption: str = ""
    mask: "Picture | Mask | None" = None

    def read(self) -> bytes:
        """The encoded bytes. LdmError: the file is gone, unreadable, or shorter than it was."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                data = file.read(-1 if self.length is None else self.length)
        except OSError as error:
            raise LdmError(f"{self.path} cannot be read: {error.strerror}; the picture {self.key} is in it") from error
        if self.length is not None and len(data) < self.length:
            raise LdmError(f"{self.path} ends within {self.key}: {len(data)} of its {self.length} bytes are there")
        return data

    @property
    def where(self) -> str:
        """The picture as a person would look for it: its key, after the file if that holds others too."""
        return self.key if self.length is None else f"{self.path.name}: {self.key}"

    def frame(self) -> Image.Image:
        """The first frame in its own mode, not turned (see `decoded`). LdmError, which names it, if there is none."""
        try:
            return decoded(self.read())
        except DecodeError as error:
            raise DecodeError(f"{self.key} is no picture to train on: {error}", error.kind) from error

    def open(self) -> Image.Image:
        """The picture in RGB (see `to_rgb`). LdmError as `frame`."""
        return to_rgb(self.frame())

    def open_mask(self) -> Image.Image | None:
        """The mask in "L", turned as the picture is; None without one. LdmError as `frame`."""
        if isinstance(self.mask, Picture):
            return self.mask.open().convert("L")
        return None if self.mask is None else turned(self.frame()).convert("RGBA").getchannel("A")


def decoded(data: bytes, whole: bool = False) -> Image.Image:
    """The first frame of a picture file, decoded in its own mode. DecodeError when it is empty, no picture, damaged or
    cut short, of more than LARGEST pixels, or of a mode that does not become RGB.

    whole: the checksums of a PNG are compared too, also of parts that decoding does not need.
    """
    if not data:
        raise DecodeError("it has no bytes", "empty")
    try:
        image = Image.open(io.BytesIO(data), formats=DECODERS)
        if image.width * image.height <= LARGEST:
            image.load()
            if whole and image.format == "PNG":
                Image.open(io.BytesIO(data), formats=("PNG",)).verify()
            if image.mode in MODES:
                return image
            raise DecodeError(f"its pixels are of the kind {image.mode!r}; save it with 8 or 16 bits a channel", "mode")
        size = f"{image.width} x {image.height} pixels"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        size = str(error).split(",")[0].lower()
    except UnidentifiedImageError as error:
        kind, reason = _unidentified(data)
        raise DecodeError(reason, kind) from error
    except DAMAGE as error:
        short = _cut(data) or "truncated" in str(error)
        kind, what = ("truncated", "cut short") if short else ("corrupt", "damaged")
        raise DecodeError(f"it is {what}: {error}", kind) from error
    raise DecodeError(f"it is too large to be decoded: {size}, and {LARGEST} pixels are the most", "bomb")


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
    if image.mode[0] == "I":  # Pillow's own conversion cuts values off at 255
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


# -- what a set of pictures is known by -------------------------------------------------------------------------------


class Digest(NamedTuple):
    """Half the SHA-256 of what training takes from a picture, in hex; "" for a mask that is not there."""

    content: str
    caption: str
    mask: str


def manifest(pictures: Iterable[Picture]) -> dict[str, Digest]:
    """Key -> digests, in the pictures' order; every byte is read. To be kept with a run, as JSON too.

    The digest of a tar shard's picture is that of the file it holds, so packing a folder changes nothing.
    """
    return {picture.key: _digest(picture) for picture in pictures}


def _digest(picture: Picture) -> Digest:
    mask = picture.mask.read() if isinstance(picture.mask, Picture) else (picture.mask or "").encode()
    parts = (picture.read(), picture.caption.encode("utf-8", "surrogatepass"), mask)
    return Digest(*(hashlib.sha256(part).hexdigest()[:32] if part or i < 2 else "" for i, part in enumerate(parts)))


def fingerprint(pictures: Iterable[Picture] | Mapping[str, Sequence[str]]) -> str:
    """SHA-256 in hex of all that training takes from these pictures, or of their manifest: keys, contents, captions,
    masks, and the order. Equal for a folder and its tar shard; another for any change.
    """
    entries = pictures if isinstance(pictures, Mapping) else manifest(pictures)
    whole = hashlib.sha256()
    for key, digests in entries.items():
        whole.update("\0".join((key, *digests)).encode("utf-8", "surrogatepass") + b"\n")
    return whole.hexdigest()


def difference(old: Mapping[str, Sequence[str]], new: Mapping[str, Sequence[str]]) -> str:
    """What changed between two manifests, in words that name the pictures; "" if nothing did."""
    both = [key for key in old if key in new]
    changes = {
        "gone": [key for key in old if key not in new],
        "new": [key for key in new if key not in old],
        **{
            f"with another {what}": [key for key in both if old[key][i] != new[key][i]]
            for i, what in enumerate(Digest._fields)
        },
    }
    said = [f"{len(keys)} {what} ({_listed(keys)})" for what, keys in changes.items() if keys]
    return ", ".join(said) or "another order" * (list(old) != list(new))


def _listed(keys: Sequence[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
