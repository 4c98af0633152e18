"""Reading weights without trusting the file, and writing so that a file is either the old one or the new one, whole.

The safetensors format: 8 bytes, little-endian, the length N of the header; N bytes of JSON, name -> {dtype, shape,
data_offsets}, with `__metadata__` of strings; then the tensors, without gaps (README of huggingface/safetensors).
Nothing in a file is ever executed, and metadata is never interpreted.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ldm.errors import LdmError, ModelError

MAX_HEADER, MAX_TENSORS, MAX_RANK, MAX_SIDE, MAX_NAME = 32_000_000, 65_536, 8, 2**31, 512
# Bytes. A training state (ldm.training.state) holds the digests of all its pictures.
MAX_JSON, LARGER = 1_000_000, {"tokenizer.json": 20_000_000, "vocab.json": 8_000_000, "state.json": 200_000_000}
# A header is read entry by entry, not as JSON of any kind, so that its time is linear and none is spent past a fault.
_TEXT, _S = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', r"[ \t\r\n]*+"
_PAIR = rf"{_S}{_TEXT}{_S}:{_S}{_TEXT}{_S}"
ENTRY = re.compile(rf'{_S}(?!"__metadata__")({_TEXT}){_S}:{_S}({{[^{{}}]{{0,400}}}}){_S}([,}}])', re.DOTALL)
METADATA = re.compile(
    rf'{_S}("__metadata__"){_S}:{_S}({{(?:{_PAIR}(?:,{_PAIR}){{0,9999}}+)?+{_S}}}){_S}([,}}])', re.DOTALL
)
ANY_NAME = re.compile(rf"{_S}({_TEXT}){_S}:", re.DOTALL)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CONVERT = "convert it with `ldm convert IN OUT --allow-pickle` if you trust its source, or take safetensors"
SIGNATURES = (  # what a file that is no safetensors file may be, by its first bytes in lower case
    (b"version https://git-lfs", "a git-lfs pointer, not the weights themselves; run `git lfs pull`"),
    (b"<!doctype", "an HTML page, probably an error page of the server; download the file again"),
    (b"<html", "an HTML page, probably an error page of the server; download the file again"),
    (b"pk\x03\x04", f"a zip archive, probably a pickled PyTorch checkpoint; {CONVERT}"),
    *((bytes([0x80, protocol]), f"a pickled PyTorch checkpoint; {CONVERT}") for protocol in range(1, 6)),
    (b"gguf", "a GGUF file; only safetensors is read"),
    (b"\x89hdf", "an HDF5 file, probably of Keras; only safetensors is read"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
)
OLD_PICKLE = re.compile(rb"\(?[cdl][\w.]*\n|\(?[\]}]q\0|\(?[dl]p\d")  # protocols 0 and 1 have no signature
MANIFEST = "manifest.sha256"


class Entry(NamedTuple):
    """One tensor of a safetensors file: its type, its shape, and its bytes [start, end) after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ModelError when it is missing, over 1 MB (some names: LARGER), not UTF-8 JSON, has a
    NaN or a name twice, or is no object.
    """
    try:
        size, largest = _size(path), LARGER.get(path.name, MAX_JSON)
        if size > largest:
            raise ModelError(f"{path} has {size:,} bytes; such a file has at most {largest:,}; fetch it again")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant, object_pairs_hook=_unique)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, not an object; fetch it again")
    return value


def _size(path: Path) -> int:
    """Bytes of a file. OSError for what is none: a pipe or a device would block, or never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "it is not a regular file")
    return found.st_size


def _constant(name: str) -> float:
    """What Python's JSON allows beyond JSON: diffusers writes -Infinity in scheduler configs; nobody means NaN."""
    if name == "NaN":
        raise ValueError("it holds a NaN")
    return float(name)


def read_header(path: str | Path) -> Header:
    """Validates a safetensors file without reading its tensors and returns what it holds.

    Stricter than the format's own library, which accepts duplicate names (the last wins) and unknown fields. ModelError
    says what is wrong: missing, empty, truncated (expected and actual bytes), another kind of file, overlaps, gaps.
    """
    path = Path(path)
    try:
        size = _size(path)
        with path.open("rb") as file:
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            if size < 10 or length > MAX_HEADER or start[8:9] != b"{":
                raise ModelError(f"{path} {foreign_kind(start, size)}")
            if 8 + length > size:
                fault = f"its header ends at byte {8 + length:,} and the file has {size:,} bytes"
                raise ModelError(f"{path} is truncated: {fault}; fetch it again")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    try:
        if raw.count(b'"data_offsets"') > MAX_TENSORS:  # before parsing, which takes seconds for millions
            raise ValueError(f"it lists more than {MAX_TENSORS:,} tensors")
        metadata: dict[str, str] | None = None
        tensors: dict[str, Entry] = {}
        for name, field in _fields(raw.decode()):
            if name in tensors or (name == "__metadata__" and metadata is not None):
                raise ValueError(f"{ascii(name)[:80]} stands twice in it")
            if name == "__metadata__":
                metadata = _metadata(field)
            else:
                tensors[name] = _entry(name, field)
        _contiguous(tensors, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}; fetch it again") from error
    return Header(tensors, metadata or {})


def foreign_kind(start: bytes, size: int) -> str:
    """What a file of `size` bytes is that begins with `start` and is no safetensors file, and what to do about it."""
    if size == 0:
        return "is empty (0 bytes); fetch it again"
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    known = [f"is {what}" for signature, what in SIGNATURES if head.startswith(signature)]
    known += ["is a tar archive; unpack it first"] if start[257:262] == b"ustar" else []
    known += [f"is a pickled checkpoint; {CONVERT}"] if OLD_PICKLE.match(start) else []
    return next(iter(known), f"is not a safetensors file ({size:,} bytes, no valid header); fetch it again")


def _fields(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a header as they stand, the metadata among them; ValueError where it is no such table."""
    empty = re.match(rf"{{{_S}}}", text)
    at, separator = (empty.end(), "") if empty else (1, ",")
    decode = json.JSONDecoder(object_pairs_hook=_unique).decode
    while separator == ",":
        match = ENTRY.match(text, at) or METADATA.match(text, at)
        if not match:
            raise ValueError(_break(text, at))
        name, field, separator = match.groups()
        yield decode(name) if "\\" in name else name[1:-1], decode(field)
        at = match.end()
    if text[at:].strip(" \t\r\n"):
        raise ValueError("its header goes on behind its end")


def _break(text: str, at: int) -> str:
    """What is wrong with the entry of a header that begins here."""
    name = ANY_NAME.match(text, at)
    if not name:
        return f"its header is no valid JSON at character {at:,}"
    if name[1] == '"__metadata__"':
        return "__metadata__ is not a table of at most 10,000 strings"
    return f"tensor {ascii(name[1][1:-1])[:80]} has other fields than dtype, shape and data_offsets"


def _metadata(field: dict[str, Any]) -> dict[str, str]:
    if not all(isinstance(value, str) for value in field.values()):
        raise ValueError("__metadata__ is not a table of strings")
    for text in (*field, *field.values()):
        text.encode()  # ValueError: half of a surrogate pair, which nobody could print
    return field


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{ascii(name)[:80]} stands twice in it")
    return table


def _entry(name: str, field: object) -> Entry:
    """One header field, checked; ValueError says what is wrong with it."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or "../" in name:
        raise ValueError(f"tensor name {ascii(name)[:80]} has characters outside the printable ones, ../, or too many")
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = DTYPES.get(str(field["dtype"])), field["shape"], field["data_offsets"]
    if dtype is None:
        raise ValueError(f"tensor {name} has the unknown dtype {ascii(field['dtype'])[:40]}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK or any(side >= MAX_SIDE for side in shape):
        raise ValueError(f"tensor {name} has the impossible shape {ascii(shape)[:80]}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or max(offsets) >= 2**63:
        raise ValueError(f"tensor {name} has the impossible data_offsets {ascii(offsets)[:80]}")
    count = dtype.itemsize
    for side in shape:
        count *= side
    if offsets[1] - offsets[0] != count:
        raise ValueError(f"tensor {name} needs {count:,} bytes and has {offsets[1] - offsets[0]:,}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _contiguous(tensors: Mapping[str, Entry], size: int) -> None:
    """ValueError unless the tensors fill exactly `size` bytes, without gap or overlap."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end))
    ends = [0, *(entry.end for _, entry in ordered)]
    for end, (name, entry) in zip(ends, ordered, strict=False):
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            raise ValueError(f"tensor {name} {fault} (starts at byte {entry.start:,}, not {end:,})")
    if ends[-1] != size:
        what = "truncated" if ends[-1] > size else "followed by foreign bytes"
        raise ValueError(f"{what}, its tensors need {ends[-1]:,} bytes and it has {size:,}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that appears under `path`, whole, when the block ends well; else `path` stays as it was.

    Written under a temporary name in the same folder, synced, then renamed; permissions follow the umask. A symbolic
    link at `path` is replaced, its target is not touched. LdmError when the system refuses (full disk, no permission).
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(6)}.tmp"
    try:
        try:
            with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> LdmError:
    return LdmError(f"cannot write {path}: {error.strerror or error}; check its folder and the free space there")


def atomic_bytes(path: str | Path, data: bytes) -> None:
    """`atomic_write` of bytes."""
    with atomic_write(path) as file:
        file.write(data)


def atomic_text(path: str | Path, text: str) -> None:
    """`atomic_write` of UTF-8 text."""
    atomic_bytes(path, text.encode())


def atomic_json(path: str | Path, value: object) -> None:
    """`atomic_write` of JSON, indented, keys in their order. ValueError for NaN and infinity, which JSON lacks."""
    atomic_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def atomic_save_safetensors(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a safetensors file atomically; `{"format": "pt"}` is always in its metadata (transformers asks for it).

    Streams tensor by tensor from wherever they lie, and the same tensors make the same bytes. Written here because the
    library's `save_file` ignores the umask and does not sync. Two names may share one tensor: it is written twice.
    dtype: of the floating-point numbers in the file, each tensor cast as it is written; None keeps theirs.
    """
    types = {name: dtype if dtype and value.is_floating_point() else value.dtype for name, value in tensors.items()}
    ordered = sorted(tensors.items(), key=lambda item: (-types[item[0]].itemsize, item[0]))  # keeps all of them aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * types[name].itemsize
        header[name] = {"dtype": CODES[types[name]], "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with atomic_write(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in ordered:
            stored = tensor.detach().to("cpu", types[name]).contiguous()
            # A lone number may be called contiguous with any stride, and is viewed with none but 1.
            file.write(stored.as_strided((stored.numel(),), (1,)).view(torch.uint8).numpy().data)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill that takes the place of `path`, whole, when the block ends well; else `path` stays.

    A folder already there is kept under a temporary name until the new one stands in its place, and then removed.
    Parents are made. LdmError when the system refuses.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise LdmError(f"cannot write the folder {path}: a file of that name is there; remove it or choose another")
    staging, old = (path.parent / f".{secrets.token_hex(6)}.{end}" for end in ("tmp", "old"))
    named = [path.parent, *(parent.parent for parent in path.parents if not parent.exists())]  # folders of new names
    try:
        try:
            staging.mkdir(parents=True)
            yield staging
            for item in sorted(staging.rglob("*")):
                _sync(item)
            _sync(staging)
            with suppress(FileNotFoundError):
                path.rename(old)
            staging.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(staging, ignore_errors=True)
            raise
        for parent in named:
            _sync(parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _refused(path, error) from error


def _sync(path: Path) -> None:
    """Makes a written file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterable[str]:
    """Relative names of the files under `folder`, sorted; not the manifest, nothing hidden."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    shown = (name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    return sorted(name for name in shown if name != MANIFEST)


def write_manifest(folder: str | Path) -> Path:
    """Writes `manifest.sha256` of everything in `folder`, in the format that `sha256sum -c` reads."""
    folder = Path(folder)
    atomic_text(folder / MANIFEST, "".join(f"{file_sha256(folder / name)}  {name}\n" for name in _files(folder)))
    return folder / MANIFEST


def check_manifest(folder: str | Path) -> dict[str, str]:
    """What differs from `manifest.sha256`: name -> "missing", "changed" or "unlisted"; empty when all is as written.

    ModelError when there is no manifest or it cannot be read.
    """
    folder = Path(folder)
    try:
        lines = (folder / MANIFEST).read_bytes().decode().split("\n")[:-1]  # splitlines: at more than line ends
        matches = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
        listed = {match[2]: match[1] for match in matches if match}
        present = {name: file_sha256(folder / name) for name in _files(folder)}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot check {folder} against {MANIFEST}: {error}") from error
    if None in matches:
        raise ModelError(f"{folder / MANIFEST} has lines that are not `sha256  name`; write it again")
    changed = {name: "changed" for name in listed.keys() & present.keys() if listed[name] != present[name]}
    missing = {name: "missing" for name in listed.keys() - present.keys()}
    unlisted = {name: "unlisted" for name in present.keys() - listed.keys()}
    return dict(sorted((changed | missing | unlisted).items()))
