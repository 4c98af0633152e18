"""Where captioned pictures come from: what `--data` takes, told apart by what is there.

- A folder of pictures, with those in its subfolders; the caption of cats/7.png is in cats/7.txt, or 7.caption.
- A folder with metadata.jsonl or metadata.csv, as the imagefolder of `datasets` has it: a row names a picture below the
  file's own folder and its caption; pictures that no row names are not used.
- WebDataset tar shards, parquet files, and data sets of the hub (see `ldm.data.shards`).

Masks: cats/7.mask.png for cats/7.png, or masks/cats/7.png; in a tar alike. White space in a caption, line
breaks too, is one blank each. Names that begin with a dot are passed over.
"""

import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, NamedTuple

from ldm.data.pictures import Finding, Picture
from ldm.data.shards import Listed, expanded, listed_tars, split_member, unpacked_hub, unpacked_parquet
from ldm.errors import LdmError, UsageError
from ldm.inputs import IMAGE_SUFFIXES

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTIONS = (".txt", ".caption")  # the first that is there counts
TAR_CAPTIONS = (*CAPTIONS, ".json")
LIKELY = {"caption", "captions", "prompt", "text", "description"}  # columns that a caption may stand in
BYSTANDERS = {"thumbs.db", "desktop.ini", "__macosx"}  # what systems leave in folders
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
Source = str | Path
Groups = dict[str, dict[str, Picture]]  # what belongs together -> suffix -> file
Split = Callable[[str], tuple[str, str] | None]  # key -> to which group it belongs, and as what


class Caption(NamedTuple):
    """A caption, whence it came ("": there is none), and the kind and reason of its fault if it has one."""

    text: str = ""
    origin: str = ""
    fault: tuple[str, str] | None = None


class Gathered(NamedTuple):
    """Pictures with their captions' origins, and what was noticed."""

    pictures: list[Picture]
    origins: list[str]
    findings: list[Finding]


@dataclass(frozen=True)
class Found:
    """A data set as it was found: the pictures by key, a sentence about them, and what was noticed on the way to them;
    `ldm.data.check` looks at the pictures themselves.
    """

    pictures: tuple[Picture, ...]
    summary: str
    findings: tuple[Finding, ...] = ()


def find(
    source: Source | Sequence[Source],
    *,
    image_column: str = "image",
    caption_column: str = "text",
    alpha_masks: bool = False,
    cache: Path | None = None,
) -> Found:
    """The pictures of a folder, of tar shards (one path, several, or a brace pattern), of parquet files, or of a data
    set on the hub ("owner/name"), in the order of their keys.

    image_column, caption_column: of metadata, parquet and the hub, and of a tar sample's .json; metadata may name the
    picture by file_name as well. alpha_masks: a picture without a mask has its alpha for one. cache: where tables are
    unpacked to; None = ldm/datasets in the user's cache.
    UsageError when there is nothing of the kind, or no picture in it; LdmError when a package is missing.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    name = " ".join(map(str, sources))
    paths = [Path(path).expanduser() for one in sources for path in _expanded(one)]
    whole, place = walked(paths[0]) if len(paths) == 1 and paths[0].is_dir() else None, ""
    if whole and not _rows_files(whole) and not any(map(is_image, whole.parts)):
        ends = (".tar", ".parquet")
        inside = [sorted(part.path for part in whole.parts.values() if part.path.suffix == end) for end in ends]
        whole, paths = (None, inside[0] or inside[1]) if any(inside) else (whole, paths)
    if whole and _rows_files(whole):
        found = _by_rows(whole, image_column, caption_column)
    elif whole:
        found = _by_groups(whole, split_file, CAPTIONS)
    else:
        shards, place = _shards(name, paths, image_column, caption_column, cache)
        found = _by_groups(listed_tars(shards), split_member, TAR_CAPTIONS, caption_column)
        if shards != paths:  # unpacked
            found = found._replace(origins=[caption_column])
    if not found.pictures:
        why = next((f"{finding.path}: {finding.reason}; " for finding in found.findings), "")
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"there are no pictures in {name}; {why}it takes {kinds}, .tar, .parquet, metadata.jsonl|csv")
    pictures = [replace(p, mask=p.mask or "alpha") if alpha_masks else p for p in found.pictures]
    return Found(tuple(pictures), _summary(found, place), tuple(sorted(found.findings)))


def _expanded(source: Source) -> list[str]:
    return [str(source)] if Path(source).expanduser().exists() else expanded(str(source))


def _shards(name: str, paths: Sequence[Path], image: str, caption: str, cache: Path | None) -> tuple[list[Path], str]:
    """The tar shards of what is no folder, unpacked if need be, and the words for them."""
    kinds = {path.suffix for path in paths}
    if kinds == {".tar"}:
        return list(paths), f" in {_counted(len(paths), 'tar shard')}"
    missing = [path for path in paths if not path.exists()]
    if missing and HUB_NAME.fullmatch(name):
        return [unpacked_hub(name, image, caption, cache)], f" of {name} on the hub"
    if missing:
        raise UsageError(
            f"{missing[0]} is not there; give a folder, tar shards, parquet files, or owner/name on the hub"
        )
    if kinds == {".parquet"}:
        return [unpacked_parquet(paths, image, caption, cache)], f" in {_counted(len(paths), 'parquet file')}"
    what = f"{len(paths)} things" if len(paths) > 1 else "no folder"
    raise UsageError(f"{name}: {what}; pictures come from one folder, or from .tar files, or from .parquet files")


def _summary(found: Gathered, place: str) -> str:
    """For example "312 images, 310 captions (.txt), 2 masks in 3 tar shards"."""
    captioned = sum(bool(picture.caption) for picture in found.pictures)
    origins = f" ({', '.join(sorted({*found.origins} - {''}))})" if captioned else ""
    masks = sum(picture.mask is not None for picture in found.pictures)
    parts = [_counted(len(found.pictures), "image"), _counted(captioned, "caption") + origins]
    return ", ".join(parts + [_counted(masks, "mask")] * bool(masks)) + place


def _counted(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'s' * (number != 1)}"


# -- files ------------------------------------------------------------------------------------------------------------


def walked(root: Path) -> Listed:
    """Every file below a folder by its path in it, whatever order the file system has. Links are followed, a folder
    that is met again is not; what begins with a dot is passed over.
    """
    whole, seen, pending = Listed({}, []), set(), [(root, "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            whole.findings.append(Finding(prefix or str(root), "unreadable", f"it cannot be listed: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in BYSTANDERS:
                continue
            key, path = prefix + entry.name, root / prefix / entry.name
            try:
                state = entry.stat()
            except OSError:
                whole.findings.append(Finding(key, "link", f"it is a link to {os.readlink(path)}, which is not there"))
                continue
            if S_ISDIR(state.st_mode) and (state.st_dev, state.st_ino) not in seen:
                seen.add((state.st_dev, state.st_ino))
                pending.append((path, f"{key}/"))
            elif S_ISREG(state.st_mode):
                whole.parts[key] = Picture(key, path)
            elif not S_ISDIR(state.st_mode):
                whole.findings.append(Finding(key, "unknown", "it is neither a file nor a folder"))
    return whole


def is_image(name: str) -> bool:
    """By the suffix."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def split_file(key: str) -> tuple[str, str]:
    """A file's group and what it is of it: ("cats/7.v2", ".png"); for a mask by either name ("cats/7", ".mask.png")."""
    stem, suffix = posixpath.splitext(key)
    if not is_image(key):
        return stem, suffix
    if key.startswith("masks/"):
        return stem.removeprefix("masks/"), f".mask{suffix}"
    return (stem.removesuffix(".mask"), f".mask{suffix}") if stem.endswith(".mask") else (stem, suffix)


def _grouped(parts: Mapping[str, Picture], split: Split) -> Groups:
    groups: Groups = {}
    for key in sorted(parts):
        if (place := split(key)) is not None:
            groups.setdefault(place[0], {})[place[1]] = parts[key]
    return groups


def _mask_of(group: Mapping[str, Picture]) -> Picture | None:
    return next((part for suffix, part in group.items() if _is_mask(suffix)), None)


def _is_mask(suffix: str) -> bool:
    return suffix.lower().startswith(".mask.") and is_image(suffix)


# -- captions in files of their own -----------------------------------------------------------------------------------


def _by_groups(whole: Listed, split: Split, kinds: Sequence[str], column: str = "") -> Gathered:
    """Pictures of a folder or of tar shards, with the captions and masks that share their names."""
    groups, found = _grouped(whole.parts, split), Gathered([], [], list(whole.findings))
    captions: dict[str, Caption] = {}
    used = set()
    for group in groups.values():
        images = [part for suffix, part in group.items() if is_image(part.key) and not _is_mask(suffix)]
        if not images:
            continue
        mask, caption = _mask_of(group), _sidecar(group, kinds, column)
        captions |= {part.key: caption for part in images}
        found.pictures.extend(replace(part, caption=caption.text, mask=mask) for part in images)
        used |= {part.key for suffix, part in group.items() if suffix.lower() in kinds or part in (*images, mask)}
    found.pictures.sort(key=lambda picture: picture.key)
    found.origins.extend(caption.origin for caption in captions.values())
    found.findings.extend(_caption_faults(found.pictures, captions))
    in_folder = split is split_file
    for key in sorted(whole.parts.keys() - used):
        kind, reason = _unused(key, kinds)
        if kind != "unknown" or in_folder:
            found.findings.append(Finding(whole.parts[key].where, kind, reason))
    return found


def _unused(key: str, kinds: Sequence[str]) -> tuple[str, str]:
    """What is said of a file that belongs to no picture."""
    suffix = posixpath.splitext(key)[1].lower()
    if is_image(key):
        return "mask-alone", "it is a mask, and no picture has its name"
    if suffix in kinds:
        return "caption-alone", f"no picture has the name of this {suffix} file"
    return "unknown", f"files {suffix or 'without a suffix'} are not read"


def _sidecar(group: Mapping[str, Picture], kinds: Sequence[str], column: str) -> Caption:
    """The caption that lies beside a picture."""
    files = {suffix.lower(): part for suffix, part in group.items()}
    for suffix in kinds:
        if suffix not in files:
            continue
        try:
            text = files[suffix].read().decode("utf-8-sig")
            if suffix != ".json":
                return _checked(text, suffix)
            value = json.loads(text).get(column)
        except UnicodeDecodeError as error:
            return Caption("", suffix, ("caption-encoding", f"its {suffix} is not UTF-8: byte {error.start + 1}"))
        except LdmError as error:
            return Caption("", suffix, ("unreadable", f"its {suffix}: {error}"))
        except (ValueError, AttributeError, RecursionError):
            return Caption("", suffix, ("metadata-line", "its .json is no JSON object"))
        if isinstance(value, str):
            return _checked(value, suffix)
    return Caption()


def _checked(text: str, origin: str) -> Caption:
    """A caption in one line, or what is wrong with it."""
    text = " ".join(text.split())
    if not text:
        return Caption("", origin, ("caption-empty", f"its caption ({origin}) is empty"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return Caption("", origin, ("caption-encoding", f"its caption ({origin}) has half a surrogate pair"))
    return Caption(text, origin)


def _caption_faults(pictures: Iterable[Picture], captions: Mapping[str, Caption]) -> Iterator[Finding]:
    """Faults of captions; that there is none is one only where another picture has one."""
    some = any(caption.origin for caption in captions.values())
    for picture in pictures:
        caption = captions[picture.key]
        fault = caption.fault or (("caption-missing", "it has no caption") if some and not caption.origin else None)
        if fault:
            yield Finding(picture.where, *fault, picture.key)


# -- captions in rows -------------------------------------------------------------------------------------------------


def _rows_files(whole: Listed) -> list[str]:
    return sorted(key for key in whole.parts if posixpath.basename(key) in METADATA)


def _by_rows(whole: Listed, image_column: str, caption_column: str) -> Gathered:
    """Pictures that metadata.jsonl or metadata.csv name."""
    files, groups = _rows_files(whole), _grouped(whole.parts, split_file)
    found, captions = Gathered([], [], list(whole.findings)), dict[str, Caption]()
    named, columns = dict[str, str](), dict[str, None]()
    for file in files:
        base, origin = posixpath.dirname(file), posixpath.basename(file)
        if file == posixpath.join(base, METADATA[1]) and posixpath.join(base, METADATA[0]) in files:
            raise UsageError(f"{base or '.'} has both {METADATA[0]} and {METADATA[1]}; keep one of them")
        for number, row in _rows(whole.parts[file]):
            where = f"{file}:{number}"
            if isinstance(row, str):
                found.findings.append(Finding(where, "metadata-line", row))
                continue
            columns |= dict.fromkeys(map(str, row))
            key, fault = _named(row, image_column, base, whole.parts)
            if key in named:
                fault = ("twice", f"it names {key}, as {named[key]} does")
            if fault:
                found.findings.append(Finding(where, *fault))
                continue
            named[key] = where
            text = row.get(caption_column)
            captions[key] = _checked(text, origin) if isinstance(text, str) else Caption("", *_no_string(text, origin))
            mask = _mask_of(groups[split_file(key)[0]])
            found.pictures.append(replace(whole.parts[key], caption=captions[key].text, mask=mask))
    likely = [column for column in columns if column.lower() in LIKELY]
    if likely and caption_column not in columns:
        raise UsageError(
            f"{files[0]} has no column {caption_column!r} but {', '.join(columns)}; name the captions' with "
            f"--caption-column, for example --caption-column {likely[0]}"
        )
    found.pictures.sort(key=lambda picture: picture.key)
    found.origins.extend(caption.origin for caption in captions.values())
    found.findings.extend(_caption_faults(found.pictures, captions))
    for key in sorted(filter(is_image, whole.parts.keys() - named.keys())):
        if not _is_mask(split_file(key)[1]):
            found.findings.append(Finding(key, "unlisted", "no row of the metadata names it"))
    return found


def _no_string(value: object, origin: str) -> tuple[str, tuple[str, str] | None]:
    """The rest of a caption that is no string: absent, or of another kind."""
    return ("", None) if value is None else (origin, ("caption-missing", f"its caption is no string: {value!r:.40}"))


def _named(row: Mapping[str, Any], column: str, base: str, parts: Mapping[str, Picture]) -> tuple[str, Any]:
    """The key of the picture that a row names, and the fault if it names none."""
    values = [row.get(name) for name in (column, f"{column}_file_name", "file_name")]
    names = [value for value in values if isinstance(value, str) and value]
    if not names:
        return "", ("metadata-line", f"it names no picture: neither {column} nor file_name is in {[*map(str, row)]}")
    key = posixpath.normpath(posixpath.join(base, names[0]))
    if key.startswith(("../", "/")):
        return key, ("metadata-missing", f"it names {names[0]}, which is outside of this folder")
    return key, None if key in parts else ("metadata-missing", f"it names {names[0]}, which is not there")


def _rows(part: Picture) -> Iterator[tuple[int, dict[Any, Any] | str]]:
    """Number and row of each line of metadata; in place of a row that cannot be read, why."""
    data = part.read()
    if part.key.endswith(".csv"):
        try:
            reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
            yield from ((reader.line_num, row) for row in reader)
        except UnicodeDecodeError as error:
            yield data.count(b"\n", 0, error.start) + 1, f"it is not UTF-8: byte {error.start + 1} of the file"
        except csv.Error as error:
            yield reader.line_num, f"it is no CSV: {error}"
        return
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
        except UnicodeDecodeError as error:
            yield number, f"it is not UTF-8: byte {error.start + 1} of the line"
        except (ValueError, RecursionError) as error:
            yield number, f"it is no JSON: {error}"
        else:
            if row is not None or line.strip():
                yield number, row if isinstance(row, dict) else "it is JSON, but no object {...}"
