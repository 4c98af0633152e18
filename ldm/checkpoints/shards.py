"""Weights in one file or in several with an index, under the names that diffusers and transformers give them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ldm.checkpoints.safe import atomic_json, atomic_save_safetensors, read_json
from ldm.errors import ModelError, UsageError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def choose_file(
    names: Iterable[str], stem: str, variant: str | None, kind: str = "safetensors"
) -> tuple[str, str | None] | None:
    """The weights file, or the index of shards, to open among a component's file names, and which variant it is.

    stem: "model", "diffusion_pytorch_model", or a regular expression for several. kind: "safetensors" or "bin". The
    variant asked for comes first, then the plain weights, fp16, bf16, then any other; a whole file before shards of its
    variant. None: no weights.
    """
    whole = re.compile(rf"(?:{stem})(?:\.(\w+))?\.{kind}", re.ASCII)
    index = re.compile(rf"(?:{stem})\.{kind}\.index(?:\.(\w+))?\.json", re.ASCII)
    ordered = sorted(names)
    found = {match[1]: name for pattern in (index, whole) for name in ordered if (match := pattern.fullmatch(name))}
    wishes = (variant, None, "fp16", "bf16", *sorted(filter(None, found)))
    return next(((found[wish], wish) for wish in wishes if wish in found), None)


def read_index(path: Path, kind: str = "safetensors") -> list[Path]:
    """The shards that an index names, in order. ModelError when it is damaged, names a file that is not beside it or of
    another kind, or a shard is missing.
    """
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{path} has no weight_map of file names; fetch it again")
    names = sorted(set(table.values()))
    for name in names:
        if not re.fullmatch(rf"[\w.\-]+\.{kind}", name, re.ASCII):
            raise ModelError(f"{path} names the file {name!a:.80}; shards lie beside their index as *.{kind}")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ModelError(f"{path} lacks {len(missing)} of {len(names)} shards, first {missing[0]}; fetch them")
    return [path.parent / name for name in names]


def save_sharded(
    tensors: Mapping[str, Tensor], folder: str | Path, stem: str, variant: str | None = None, largest: int | str = "5GB"
) -> list[Path]:
    """Writes tensors into `folder` as one safetensors file, or as shards with an index (written last), and returns the
    files.

    stem: "diffusion_pytorch_model" (diffusers' networks) or "model" (transformers'). variant: "fp16" stands before the
    number of a shard and at the end of an index's name, where diffusers looks for it. largest: bytes of tensors in a
    file, or "300MB", "5GB" (powers of ten); a tensor larger than that has a file of its own. The folder must hold no
    other weights of this stem and variant. UsageError for a size that is none, LdmError when it cannot be written.
    """
    limit, total = _bytes(largest), sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    start, ending = ".".join(filter(None, (stem, variant))), ".".join(filter(None, ("index", variant, "json")))
    count = len(shards)
    parts = [f"-{number:05d}-of-{count:05d}" for number in range(1, count + 1)] if count > 1 else [""]
    files = [Path(folder) / f"{start}{part}.safetensors" for part in parts]
    for file, shard in zip(files, shards, strict=True):
        atomic_save_safetensors(shard, file)
    if count == 1:
        return files
    places = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    index = Path(folder) / f"{stem}.safetensors.{ending}"
    atomic_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    return [*files, index]


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?B?)", str(size).strip().upper(), re.ASCII)
    unit = UNITS.get(match[2] if match[2] != "B" else "") if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if count < 1:
        raise UsageError(f"a largest file of {size!a:.40}; give bytes, or a size such as 300MB or 5GB")
    return count
