"""The noise that a picture comes from, in a file: what `ldm invert` writes and the field `noise` begins a run with."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ldm.checkpoints.load import finite
from ldm.checkpoints.safe import atomic_save_safetensors, read_header
from ldm.errors import ModelError, UsageError

NAME = "latents"  # of the one tensor
MOST_NUMBERS = 2**28  # 1 GiB; latents of 16384 x 16384 pixels have 2**24


class GivenNoise(NamedTuple):
    """Unit noise to begin with. name: of its file, without the folder. latents: [1, C, H, W] float32. sha256: of its
    shape and numbers in hex, so that the same noise in another file has the same.
    """

    name: str
    latents: Tensor
    sha256: str


def read_noise(given: "str | Path | GivenNoise") -> GivenNoise:
    """The noise in a safetensors file: one tensor "latents", [1, C, H, W] or [C, H, W], float32. A GivenNoise is
    returned as it is. UsageError: given is no path. ModelError: the file is missing, damaged or another, or a number is
    not finite.
    """
    if isinstance(given, GivenNoise):
        return given
    if not isinstance(given, str | Path):
        raise UsageError(f"noise is {type(given).__name__}; it must be the file that `ldm invert` wrote")
    path = Path(given)
    tensors = read_header(path).tensors
    entry = tensors.get(NAME)
    shape = entry.shape[-3:] if entry and entry.shape[:-3] in ((), (1,)) and len(entry.shape) >= 3 else ()
    count = torch.Size(shape).numel()
    if entry is None or len(tensors) > 1 or entry.dtype != torch.float32 or not 0 < count <= MOST_NUMBERS or not shape:
        held = ", ".join(f"{name} {list(one.shape)}" for name, one in list(tensors.items())[:3]) or "nothing"
        raise ModelError(
            f"{path} is no noise of one picture: it holds {held}, not one tensor {NAME!r} [1, channels, height, width] "
            "of float32; take a file that `ldm invert` wrote"
        )
    with safe_open(path, framework="pt") as file:
        latents: Tensor = file.get_tensor(NAME).reshape(1, *shape)
    if not finite(latents):
        raise ModelError(f"{path} has numbers that are not finite; write it again with `ldm invert`")
    return GivenNoise(path.name, latents, _digest(latents))


def write_noise(path: str | Path, latents: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write unit noise [1, C, H, W] as `read_noise` takes it, whole or not at all. metadata: what it is of (prompt,
    steps, scheduler, the model's digest), kept as JSON under "ldm". LdmError: the file cannot be written.
    """
    said = {"ldm": json.dumps(dict(metadata), allow_nan=False)}
    atomic_save_safetensors({NAME: latents.float()}, path, said)


def _digest(latents: Tensor) -> str:
    digest = hashlib.sha256(f"{list(latents.shape)}\n".encode())
    digest.update(latents.contiguous().numpy().data)
    return digest.hexdigest()
