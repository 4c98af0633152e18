"""What is wrong with a data set, found before the first step of training: every picture is decoded once."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.pictures import Finding, Picture
from ldm.data.sources import Found
from ldm.errors import LdmError, choose
from ldm.inputs import SUFFIXES, DecodeError, decoded, is_deep, is_turned, to_rgb

Severity = Literal["defect", "note"]
KINDS: dict[str, tuple[Severity, str]] = {  # a defect stops training, or leaves the picture out; a note is only told
    "unreadable": ("defect", "a file or folder that may not be read"),
    "link": ("defect", "a link to what is not there"),
    "empty": ("defect", "a file without bytes"),
    "no-picture": ("defect", "a picture's name, but other content"),
    "corrupt": ("defect", "damaged within"),
    "truncated": ("defect", "cut short"),
    "bomb": ("defect", "too many pixels to be decoded"),
    "mode": ("defect", "pixels of a kind that does not become RGB, as floating point"),
    "small": ("defect", "a side shorter than the least"),
    "mask": ("defect", "a mask that is damaged or of another size"),
    "caption-missing": ("defect", "no caption, where other pictures have one"),
    "caption-empty": ("defect", "a caption without words"),
    "caption-encoding": ("defect", "a caption that is not UTF-8"),
    "metadata-line": ("defect", "a row of metadata that cannot be read"),
    "metadata-missing": ("defect", "a row that names a file that is not there"),
    "twice": ("defect", "a picture that metadata or shards name a second time"),
    "shard": ("defect", "a tar file that is cut short, or is none"),
    "suffix": ("note", "a suffix of another format; the content counts"),
    "duplicate": ("note", "the same bytes as another picture"),
    "near-duplicate": ("note", "looks like another picture"),
    "16-bit": ("note", "more than 8 bits a channel; scaled to 8"),
    "cmyk": ("note", "colours for print; converted without a profile"),
    "alpha": ("note", "transparent in part; laid on white"),
    "animated": ("note", "several frames; the first is taken"),
    "rotated": ("note", "turned as its EXIF says"),
    "caption-long": ("note", "more tokens than CLIP reads at once"),
    "caption-alone": ("note", "a caption without a picture"),
    "mask-alone": ("note", "a mask without a picture"),
    "unlisted": ("note", "a picture that the metadata does not name; not used"),
    "unknown": ("note", "a file of a kind that is not read"),
    "case": ("note", "a name that differs from another only in case"),
}
MIN_SIDE = 64  # pixels: below it, even the model in the box sees a picture enlarged
HASH_BITS = 6  # of 64 in which the hashes of near duplicates may differ ...
THUMB_LEVELS = 6.0  # ... and levels of 255 by which their 16 x 16 thumbnails may, on average
EDGE = 2.0  # levels of 255 by which neighbours must differ to count: flat grounds are noise in a JPEG
CLIP_TOKENS = 75  # what fits beside the two marks


class Look(NamedTuple):
    """What one picture showed. digest: SHA-256; hash: see `dhash`; thumb: RGB, [16, 16, 3] in 8 bits. The last three
    are None where it cannot be decoded.
    """

    picture: Picture
    findings: tuple[Finding, ...]
    digest: str | None = None
    hash: int | None = None
    thumb: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Report:
    """All findings of a data set by path, and the pictures that no defect touches, in order."""

    findings: tuple[Finding, ...]
    usable: tuple[Picture, ...]

    @property
    def defects(self) -> list[Finding]:
        """The findings that stop training."""
        return [finding for finding in self.findings if KINDS[finding.kind][0] == "defect"]


def check(found: Found, min_side: int = MIN_SIDE) -> Report:
    """Look at every picture of a data set. `looks` and `report` are its two halves, for those who show a bar."""
    return report(found, looks(found, min_side))


def accepted(found: Found, policy: str = "error", min_side: int = MIN_SIDE) -> tuple[tuple[Picture, ...], Report]:
    """The pictures to train on. policy "error": all of them, or an LdmError that names the first defects; "skip": those
    without a defect, exactly as if the others were not there. LdmError if none are left.
    """
    choose("policy", policy, ("error", "skip"))
    result = check(found, min_side)
    defects = result.defects
    if defects and policy == "error":
        said = "; ".join(f"{finding.path}: {finding.reason}" for finding in defects[:3])
        more = f"; and {len(defects) - 3} more" if len(defects) > 3 else ""
        raise LdmError(
            f"{len(defects)} defect{'s' * (len(defects) > 1)} in the data: {said}{more}; see them with ldm data check, "
            "and mend them, or leave such pictures out with --policy skip"
        )
    if not result.usable:
        raise LdmError(f"none of {len(found.pictures)} pictures is without a defect; see: ldm data check")
    return result.usable, result


def looks(found: Found, min_side: int = MIN_SIDE, threads: int | None = None) -> Iterator[Look]:
    """Decode every picture, several at a time, and yield what it shows in the order of the set."""
    lost = {finding.key for finding in found.findings if finding.kind == "shard"}  # their bytes are not there
    pictures = [picture for picture in found.pictures if picture.key not in lost]
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda picture: look(picture, min_side), pictures)


def look(picture: Picture, min_side: int = MIN_SIDE) -> Look:
    """Read and decode one picture and its mask."""
    data = b""
    try:
        data = picture.read()
        image = decoded(data, whole=True)
        faults = list(_traits(picture.key, data, image))
        rgb = to_rgb(image)
        faults += _mask_faults(picture, rgb.size)
    except DecodeError as error:
        return Look(picture, (_of(picture, error.kind, str(error)),), _sha(data))
    except LdmError as error:
        return Look(picture, (_of(picture, "unreadable", str(error)),))
    if min(rgb.size) < min_side:
        size = f"{rgb.width} x {rgb.height} pixels"
        faults.append(("small", f"it has {size}, and a side must have {min_side} at least"))
    findings = tuple(_of(picture, *fault) for fault in faults)
    thumb = np.asarray(rgb.resize((16, 16), Image.Resampling.BOX))
    return Look(picture, findings, _sha(data), dhash(rgb), thumb)


def _of(picture: Picture, kind: str, reason: str) -> Finding:
    return Finding(picture.where, kind, reason, picture.key)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _traits(key: str, data: bytes, image: Image.Image) -> Iterator[tuple[str, str]]:
    """Kind and reason of what is told of a sound picture."""
    suffix, kind = os.path.splitext(key)[1].lower(), image.format or ""
    if suffix not in SUFFIXES[kind]:
        yield "suffix", f"by its content it is {kind}, whose suffix is {SUFFIXES[kind][0]}"
    if is_deep(data, image):
        yield "16-bit", "it has more than 8 bits a channel, and is scaled to 8"
    if image.mode == "CMYK":
        yield "cmyk", "it is in CMYK, and is converted to RGB without its colour profile"
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        yield "alpha", "it is transparent in part, and is laid on white"
    if kind != "MPO" and getattr(image, "is_animated", False):
        yield "animated", "it has several frames, of which the first is taken"
    if is_turned(image):
        yield "rotated", "its EXIF says to turn or mirror it, and so it is"


def _mask_faults(picture: Picture, size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    try:
        mask = picture.open_mask() if isinstance(picture.mask, Picture) else None
    except LdmError as error:
        yield "mask", f"its mask cannot be used: {error}"
        return
    if mask is not None and mask.size != size:
        yield "mask", f"its mask is of {mask.width} x {mask.height} pixels, the picture of {size[0]} x {size[1]}"


def dhash(image: Image.Image) -> int:
    """64 bits, one for each of 8 x 8 places in gray: whether it is brighter by EDGE levels than that to its left (a
    difference hash, with a threshold so that flat grounds stay equal through a JPEG).
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.float32)
    return int.from_bytes(np.packbits(np.diff(small, axis=1) > EDGE).tobytes(), "big")


# -- all of them together ---------------------------------------------------------------------------------------------


def report(found: Found, looked: Iterable[Look]) -> Report:
    """What was found on the way to the pictures, in them, and between them."""
    seen = list(looked)
    findings = [*found.findings, *(finding for one in seen for finding in one.findings)]
    findings += [*_duplicates(seen), *_near_duplicates(seen), *_long_captions(found.pictures)]
    findings += _only_case(found.pictures)
    out = {finding.key for finding in findings if KINDS[finding.kind][0] == "defect"}
    return Report(tuple(sorted(findings)), tuple(picture for picture in found.pictures if picture.key not in out))


def _duplicates(seen: Sequence[Look]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for one in seen:
        if one.digest is None or one.thumb is None:
            continue
        if one.digest in first:
            yield _of(one.picture, "duplicate", f"it has the same bytes as {first[one.digest]}")
        first.setdefault(one.digest, one.picture.key)


def _near_duplicates(seen: Sequence[Look]) -> Iterator[Finding]:
    """Hashes within HASH_BITS and thumbnails within THUMB_LEVELS; of each such group all but the first."""
    alone = list({one.digest: one for one in reversed(seen) if one.thumb is not None}.values())[::-1]
    hashes = np.array([one.hash for one in alone], dtype=np.uint64)
    thumbs = [np.asarray(one.thumb, dtype=np.float32) for one in alone]
    for i, one in enumerate(alone):
        for j in np.flatnonzero(np.bitwise_count(hashes[:i] ^ hashes[i]) <= HASH_BITS):
            if np.abs(thumbs[i] - thumbs[j]).mean() <= THUMB_LEVELS:
                yield _of(one.picture, "near-duplicate", f"it looks like {alone[j].picture.key}")
                break


def _long_captions(pictures: Iterable[Picture]) -> Iterator[Finding]:
    long = [picture for picture in pictures if len(picture.caption.encode()) > CLIP_TOKENS]  # a token is a byte or more
    if not long:
        return
    from ldm.text.tokenizer import CLIPTokenizer

    tokenizer = CLIPTokenizer.standard()
    for picture in long:
        count = sum(len(word.ids) for word in tokenizer.words(picture.caption))
        if count > CLIP_TOKENS:
            yield _of(picture, "caption-long", f"its caption has {count} tokens, and CLIP reads {CLIP_TOKENS} at once")


def _only_case(pictures: Iterable[Picture]) -> Iterator[Finding]:
    names: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        names[picture.key.casefold()].append(picture)
    for same in names.values():
        yield from (_of(one, "case", f"it differs from {same[0].key} only in case") for one in same[1:])
