"""Captioned pictures in WebDataset tar shards; parquet files and data sets of the hub, which are unpacked into one.

A tar file is listed once; then each picture is a part of it, at a known place. The convention is WebDataset's: files
of one sample share their path up to the first dot of the name, and what follows that dot says what each is.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ldm.data.pictures import Finding, Picture
from ldm.errors import LdmError, UsageError
from ldm.inputs import SUFFIXES, magic

SAMPLE = re.compile(r"((?:.*/|)[^.]+)(\.[^/]*)")  # webdataset's base_plus_ext: the key, and the rest from its first dot
META = re.compile(r"__[^/]*__($|/)")  # members that webdataset passes over
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
MOST_SHARDS = 100_000
ROWS = 64  # of parquet, held in memory at a time


class Listed(NamedTuple):
    """Files by key, in no order yet, and what was noticed on the way."""

    parts: dict[str, Picture]
    findings: list[Finding]


def expanded(pattern: str) -> list[str]:
    """The paths of a brace pattern: "a-{008..010}.tar" -> a-008.tar, a-009.tar, a-010.tar; "{x,y}.tar" -> x.tar, y.tar.

    Numbers keep the width of the first. UsageError for more than MOST_SHARDS.
    """
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, words = found.groups()
    if words is None and int(last) - int(first) >= MOST_SHARDS:
        raise UsageError(f"{found[0]} stands for more than {MOST_SHARDS} files; give fewer")
    inner = words.split(",") if words else [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return [path for word in inner for path in expanded(pattern[: found.start()] + word + pattern[found.end() :])]


def split_member(key: str) -> tuple[str, str] | None:
    """A member's sample and what it is of it ("cats/7", ".jpg"); None for names that are in no sample."""
    found = SAMPLE.fullmatch(key)
    return (found[1], found[2]) if found else None


def listed_tars(paths: Iterable[Path]) -> Listed:
    """The members of tar shards. With several shards a key begins with its shard's name, for samples are numbered anew
    in each; with the folders before it where the shards lie in different ones. UsageError for a shard that is missing.
    """
    paths = list(paths)
    home = os.path.commonpath([path.absolute().parent for path in paths])
    whole = Listed({}, [])
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path} is not there; give tar files that are, or a pattern that fits them")
        prefix = f"{path.absolute().relative_to(home).with_suffix('').as_posix()}/" if len(paths) > 1 else ""
        for key, part in _members(path, prefix, whole.findings):
            if key in whole.parts:
                whole.findings.append(Finding(f"{path.name}: {key}", "twice", "the shards hold it before already"))
            whole.parts.setdefault(key, part)
    return whole


def _members(path: Path, prefix: str, findings: list[Finding]) -> Iterator[tuple[str, Picture]]:
    """Key and place of every plain file in a tar; what is cut off goes to `findings`."""
    size, count = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                count += 1
                name = member.name.removeprefix("./")
                hidden = name.rpartition("/")[2].startswith(".")
                if not member.isreg() or member.issparse() or META.match(name) or hidden:
                    continue
                if name.startswith("masks/"):  # masks/7.png is the mask of 7: as a member of its sample, 7.mask.png
                    name = ".mask".join(os.path.splitext(name.removeprefix("masks/")))
                key = prefix + name
                if member.offset_data + member.size > size:
                    there = max(0, size - member.offset_data)
                    reason = f"the tar file ends within it: {there} of {member.size} bytes are there"
                    findings.append(Finding(f"{path.name}: {name}", "shard", reason, key))
                yield key, Picture(key, path, member.offset_data, member.size)
    except tarfile.ReadError as error:
        if not any(finding.path.startswith(f"{path.name}: ") and finding.kind == "shard" for finding in findings):
            reason = f"it cannot be read after {count} files ({error}); tar files must be whole and not compressed"
            findings.append(Finding(path.name, "shard", reason))
    except OSError as error:
        findings.append(Finding(path.name, "unreadable", f"it cannot be read: {error.strerror}"))


# -- tables: parquet, and the hub -------------------------------------------------------------------------------------


def unpacked_parquet(paths: Iterable[Path], image: str, caption: str, cache: Path | None = None) -> Path:
    """A tar shard with the pictures and captions of these columns of parquet files, kept in the cache for next time.

    LdmError without pyarrow; UsageError for a column that is not there.
    """
    parquet = _module("pyarrow.parquet", "to read parquet files")
    paths = list(paths)
    known = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    for path in paths:
        try:
            columns = parquet.read_schema(path).names
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise LdmError(f"{path} is no parquet file that can be read: {error}") from error
        _refuse_without(columns, (image, caption), path)
    batches = (
        batch for path in paths for batch in parquet.ParquetFile(path).iter_batches(ROWS, columns=[image, caption])
    )
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    return _packed(rows, image, caption, repr(known), cache)


def unpacked_hub(name: str, image: str, caption: str, cache: Path | None = None) -> Path:
    """The same for the train split of a data set on the hub. LdmError without `datasets`, and for what it refuses."""
    datasets = _module("datasets", f"to fetch {name} from the hub, for no folder has that name")
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # whatever a network or a builder may raise
        reason = " ".join(str(error).split())[:300]
        raise LdmError(
            f"the data set {name} cannot be loaded ({reason}); a folder of that name is not there"
        ) from error
    _refuse_without(table.column_names, (image, caption), name)
    table = table.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))
    rows = ({**row, image: _local(row[image])} for row in table)
    return _packed(rows, image, caption, f"{name} {table._fingerprint}", cache)


def _local(value: Any) -> Any:
    """A picture that `datasets` fetched as a file of its own, with the bytes of that."""
    if isinstance(value, Mapping) and not value.get("bytes") and value.get("path"):
        return Path(value["path"]).read_bytes()
    return value


def _module(name: str, purpose: str) -> Any:
    package = name.split(".")[0]
    if find_spec(package) is None:
        raise LdmError(f"{package} is not installed, and is needed {purpose}; run: pip install {package}")
    return import_module(name)


def _refuse_without(columns: Iterable[str], wanted: Iterable[str], source: object) -> None:
    there = list(columns)
    for option, column in zip(("--image-column", "--caption-column"), wanted, strict=True):
        if column not in there:
            raise UsageError(f"{source} has no column {column!r} but {', '.join(there)}; name one with {option}")


def _packed(rows: Iterable[Mapping[str, Any]], image: str, caption: str, identity: str, cache: Path | None) -> Path:
    """Rows -> a tar shard, named by what it was made of. A row without a picture becomes an empty file, for the check
    to find.
    """
    from ldm.checkpoints.safe import atomic_write

    home = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "datasets"
    path = home / f"{hashlib.sha256(json.dumps([identity, image, caption]).encode()).hexdigest()[:32]}.tar"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number, row in enumerate(rows):
            data = _bytes(row[image])
            suffix = SUFFIXES.get(magic(data), (".png",))[0]
            _add(tar, f"{number:08}{suffix}", data)
            if isinstance(row[caption], str):
                _add(tar, f"{number:08}.txt", row[caption].encode("utf-8", "surrogatepass"))
    return path


def _bytes(value: Any) -> bytes:
    """A picture in a row: bytes, or as `datasets` has it a struct with them; b"" for anything else, paths too: a table
    from elsewhere has no say in which files of this machine are read.
    """
    data = value.get("bytes") if isinstance(value, Mapping) else value
    return data if isinstance(data, bytes) else b""


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))
