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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.errors import LdmError, ModelError

MAX_HEADER, MAX_TENSORS, MAX_RANK, MAX_SIDE, MAX_JSON = 100_000_000, 65_536, 8, 2**31, 64_000_000
NAME = re.compile(r"[\w.\-/:]{1,512}", re.ASCII)
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
SIGNATURES = (  # what a file that is no safetensors file may be, by its first bytes in lower case
    (b"version https://git-lfs", "a git-lfs pointer, not the weights themselves; run `git lfs pull`"),
    (b"<!doctype", "an HTML page, probably an error page of the server; download the file again"),
    (b"<html", "an HTML page, probably an error page of the server; download the file again"),
    (b"pk\x03\x04", "a zip archive, probably a pickled PyTorch checkpoint; convert it to safetensors"),
    (b"\x80\x02", "a pickled PyTorch checkpoint; convert it to safetensors"),
    (b"gguf", "a GGUF file; only safetensors is read"),
)
ALIASES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
ATTENTION_WEIGHT = re.compile(r".*attentions\.\d+\.to_(q|k|v|out\.0)\.weight")
MANIFEST = "manifest.sha256"


class Entry(NamedTuple):
    """One tensor of a safetensors file: its type, its shape, and its bytes [start, end) after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


Shape = tuple[int, ...]
Source = tuple[Path, str, Entry]  # where our key comes from: file, name there, what the header says


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ModelError when it is missing, over 64 MB, not UTF-8 JSON, or not an object."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ModelError(f"{path} has {path.stat().st_size:,} bytes; a JSON file here has at most {MAX_JSON:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, not an object; fetch it again")
    return value


def read_header(path: str | Path) -> Header:
    """Validates a safetensors file without reading its tensors and returns what it holds.

    Stricter than the format's own library, which accepts duplicate names (the last wins) and unknown fields. ModelError
    says what is wrong: missing, empty, truncated (expected and actual bytes), another kind of file, overlaps, gaps.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            if size < 10 or length > MAX_HEADER or start[8:9] != b"{":
                raise ModelError(f"{path} {_kind(start, size)}")
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
        fields = json.loads(raw, object_pairs_hook=_unique)
        metadata = fields.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is not a table of strings")
        tensors = {name: _entry(name, field) for name, field in fields.items()}
        _contiguous(tensors, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}; fetch it again") from error
    return Header(tensors, metadata)


def _kind(start: bytes, size: int) -> str:
    if size == 0:
        return "is empty (0 bytes); fetch it again"
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    known = (f"is {what}" for signature, what in SIGNATURES if head.startswith(signature))
    return next(known, f"is not a safetensors file ({size:,} bytes, no valid header); fetch it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{ascii(name)[:80]} stands twice in its header")
    return table


def _entry(name: str, field: object) -> Entry:
    """One header field, checked; ValueError says what is wrong with it."""
    if not NAME.fullmatch(name):
        raise ValueError(f"tensor name {ascii(name)[:80]} has characters outside letters, digits and . _ - / :")
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = DTYPES.get(str(field["dtype"])), field["shape"], field["data_offsets"]
    if dtype is None:
        raise ValueError(f"tensor {name} has the unknown dtype {ascii(field['dtype'])[:40]}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK or any(side >= MAX_SIDE for side in shape):
        raise ValueError(f"tensor {name} has the impossible shape {ascii(shape)[:80]}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
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


def load_into(
    model: nn.Module,
    paths: str | Path | Sequence[Path],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Gives a model built on the meta device the tensors of one safetensors file, or of several (shards).

    Tensors are memory-mapped and cast one at a time, so the file is never in memory twice; dtype None keeps the file's.
    Spellings of old files are understood: CLIP keys without `text_model.`, the VAE's query / key / value / proj_attn
    (also as 1x1 convolutions); stray `embeddings.position_ids` are passed over. Every header is validated and every key
    compared before anything is allocated. ModelError names missing, unexpected and misshapen keys; the model is then
    left as it was.
    """
    files = [Path(paths)] if isinstance(paths, (str, Path)) else list(paths)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found: dict[str, Source] = {}
    unexpected = []
    for path in files:
        for name, entry in read_header(path).tensors.items():
            key = _our_key(name, wanted)
            if key in found:
                raise ModelError(f"{name} and {found[key][1]} are the same weights twice in {_listed(files)}; keep one")
            if key in wanted:
                found[key] = (path, name, entry)
            elif not name.endswith("embeddings.position_ids"):
                unexpected.append(name)
    _complete(wanted, found, unexpected, _listed(files))
    state: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key, (source, name, _) in found.items():
                    if source == path:
                        state[key] = file.get_tensor(name).reshape(wanted[key]).to(device, dtype)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
    model.load_state_dict(state, assign=True)


def _our_key(name: str, wanted: Mapping[str, object]) -> str:
    """Our spelling of a key; `name` itself where we have none."""
    renamed = OLD_ATTENTION.sub(lambda match: f"{match[1]}.{ALIASES[match[2]]}.{match[3]}", name)
    return next((key for key in (name, f"text_model.{name}", renamed) if key in wanted), name)


def _complete(wanted: Mapping[str, Shape], found: Mapping[str, Source], unexpected: list[str], where: str) -> None:
    """ModelError unless every wanted key is there in its shape and nothing else is."""
    shapes = {key: entry.shape for key, (_, _, entry) in found.items()}
    for key in filter(ATTENTION_WEIGHT.fullmatch, shapes):
        shapes[key] = shapes[key][:2] if shapes[key][2:] == (1, 1) else shapes[key]
    misshapen = [f"{key} {shape} for {wanted[key]}" for key, shape in shapes.items() if shape != wanted[key]]
    codes = {key: CODES[entry.dtype] for key, (_, _, entry) in found.items() if not entry.dtype.is_floating_point}
    faults = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": unexpected,
        "of another shape": misshapen,
        "without floating-point numbers": [f"{key} is {code}" for key, code in codes.items()],
    }
    said = [f"{len(keys)} {what} ({_listed(keys)})" for what, keys in faults.items() if keys]
    if said:
        raise ModelError(f"{where} does not fit its config.json: {'; '.join(said)}; use weights made for it")


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:3])) + (", ..." if len(items) > 3 else "")


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
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file atomically; `{"format": "pt"}` is always in its metadata (transformers asks for it).

    Streams tensor by tensor from wherever they lie, and the same tensors make the same bytes. Written here because the
    library's `save_file` ignores the umask and does not sync. Two names may share one tensor: it is written twice.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # keeps all of them aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with atomic_write(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


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
        _sync(path.parent)
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


def _sha256(path: Path) -> str:
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
    atomic_text(folder / MANIFEST, "".join(f"{_sha256(folder / name)}  {name}\n" for name in _files(folder)))
    return folder / MANIFEST


def check_manifest(folder: str | Path) -> dict[str, str]:
    """What differs from `manifest.sha256`: name -> "missing", "changed" or "unlisted"; empty when all is as written.

    ModelError when there is no manifest or it cannot be read.
    """
    folder = Path(folder)
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
        matches = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
        listed = {match[2]: match[1] for match in matches if match}
        present = {name: _sha256(folder / name) for name in _files(folder)}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot check {folder} against {MANIFEST}: {error}") from error
    if None in matches:
        raise ModelError(f"{folder / MANIFEST} has lines that are not `sha256  name`; write it again")
    changed = {name: "changed" for name in listed.keys() & present.keys() if listed[name] != present[name]}
    missing = {name: "missing" for name in listed.keys() - present.keys()}
    unlisted = {name: "unlisted" for name in present.keys() - listed.keys()}
    return dict(sorted((changed | missing | unlisted).items()))
