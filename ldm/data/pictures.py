"""One captioned picture of a data set: where its bytes lie, and what a set of them is known by.

Where the pictures come from is `ldm.data.sources`; what is wrong with them, `ldm.data.check`.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from ldm.errors import LdmError
from ldm.inputs import DecodeError, decoded, to_rgb, turned

Mask = Literal["alpha"]


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
