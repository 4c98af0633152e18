"""Everything a run needs to go on as if it had never stopped: saved whole or not at all, read back bit for bit.

A state is a folder `state-<step>` with `state.safetensors` (networks and optimiser), `state.json` (step, configuration,
counters) and `manifest.sha256` of both. Random numbers are functions of (seed, step), so no generator's state has to be
kept; nor has the learning rate, which is a function of the step.
"""

import errno
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.checkpoints.safe import (
    atomic_folder,
    atomic_save_safetensors,
    atomic_text,
    check_manifest,
    read_header,
    read_json,
    write_manifest,
)
from ldm.data.pictures import difference
from ldm.errors import LdmError, ModelError

log = logging.getLogger(__name__)
STATE = re.compile(r"state-(\d+)", re.ASCII)
LEFT_OVER = re.compile(r"\.(?:state-\d+|[0-9a-f]{12})\.(tmp|old)", re.ASCII)  # of a run that was killed while it wrote
# The optimiser's tensors: of a parameter (number in the order of the groups), a Python number of one, one of a group.
OWN = re.compile(r"(optimizer|number|group)/(\d+)/(\w+)", re.ASCII)
TENSORS, ABOUT = "state.safetensors", "state.json"
DATA = "manifest"  # of a run's fields: the digests of its pictures, `ldm.data.pictures.manifest`
FREE = {  # ... that may differ when a run goes on: they do not change what is trained (train() keeps batches_per_step)
    "weights", "loop.out", "loop.workers", "loop.threads", "loop.device", "loop.log_every", "loop.save_every",
    "loop.sample_every", "loop.sample_first", "loop.keep_states", "loop.report_to", "loop.max_skipped_steps",
    "loop.gradient_accumulation_steps",
}  # fmt: skip
ROOM, NAME = 64 * 1024, 256  # bytes that a state needs beside tensors and JSON: manifest and whole blocks; each tensor
OR_ELSEWHERE = "or give another folder (`loop.out`, `output_dir`)"


def states(folder: Path) -> list[Path]:
    """The states in a run's folder that have their files, oldest first. Unfinished ones carry another name."""
    return [path for path in _named(folder) if all((path / name).is_file() for name in (TENSORS, ABOUT))]


def newest(folder: Path) -> Path | None:
    """The newest state in a run's folder that is sound: as its manifest says, a whole header, the step of its name.

    Others are passed over with a warning. Nothing is removed or changed. Where none is sound, one that a killed process
    had put aside to save the same step again, or to remove it, is taken.
    """
    for path in reversed(_named(folder)):
        if not (fault := _fault(path)):
            return path
        log.warning("%s is passed over: %s", path, fault)
    return next((path for path in _left_over(folder, "old") if not _fault(path)), None)


def save_state(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, Any],
    keep: int,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `state-<step>`, whole or not at all, then remove all but the newest `keep` (at least 1) up to this one.

    modules: by name; of each its buffers and the parameters that require gradients, or all if none does (an average).
    run: JSON, what must be equal on resuming (the configuration; under DATA the digests of the pictures).
    extra: JSON, what else is to be known then (counters, the state of a gradient scaler).
    A process killed at any moment leaves the states before this one as they were. LdmError when the system refuses; it
    says how much is needed and free when the disk is full.
    """
    tensors = dict(_tensors(modules, optimizer))
    about = json.dumps({"step": step, "run": run, "extra": extra or {}}, indent=2, allow_nan=False) + "\n"
    path = folder / f"state-{step}"
    _sweep(folder)
    needed = sum(value.nbytes + NAME for value in tensors.values()) + len(about) + ROOM
    if _free(folder) < needed:
        raise _full(path, needed)
    try:
        with atomic_folder(path) as staging:
            atomic_save_safetensors(tensors, staging / TENSORS)
            atomic_text(staging / ABOUT, about)
            write_manifest(staging)
    except LdmError as error:
        if getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path, needed) from error
        raise
    _sweep(folder)
    # Later steps than this one are of states that were passed over; they do not count.
    for item in [other for other in _named(folder) if _step(other) <= step][:-keep]:
        _remove(item)
    return path


def forget(folder: Path) -> None:
    """Remove all states of a run, so that it begins anew."""
    for path in (*_left_over(folder, "tmp"), *_left_over(folder, "old"), *_named(folder)):
        _remove(path)


def load_state(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, run: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Read a state (one that `newest` gave) back into the modules and the optimiser; -> its step and `extra`.

    LdmError when it belongs to another configuration (the fields are named) or to other pictures (what changed is
    named). ModelError when it is damaged, or made by networks of another shape. Nothing is then changed.
    """
    about = _about(path)
    _check_run(path, about["run"], json.loads(json.dumps(run)))
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _check_shapes(path / TENSORS, modules, parameters, len(groups))
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}; remove it to go on from an earlier one") from error
    for name, module in modules.items():
        module.load_state_dict({key: tensors[f"{name}/{key}"] for key in _kept(module)}, strict=False)
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if match := OWN.fullmatch(key):
            kind, index, field = match[1], int(match[2]), match[3]
            table = groups[index] if kind == "group" else state.setdefault(index, {})
            table[field] = _laid_like(parameters[index], value) if kind == "optimizer" else value.item()
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return about["step"], about["extra"]


# -- what is kept ------------------------------------------------------------------------------------------------------


def _tensors(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """All that is kept, by the names it has in the file."""
    for name, module in modules.items():
        yield from ((f"{name}/{key}", value) for key, value in _kept(module).items())
    whole = optimizer.state_dict()
    for index, nested in whole["state"].items():
        fields = dict(_level(nested))
        yield from ((f"optimizer/{index}/{key}", v) for key, v in fields.items() if isinstance(v, Tensor))
        yield from ((f"number/{index}/{key}", v) for key, v in _numbers(fields))
    for index, group in enumerate(whole["param_groups"]):
        yield from ((f"group/{index}/{key}", v) for key, v in _numbers(group) if key != "lr")


def _kept(module: nn.Module) -> dict[str, Tensor]:
    """A module's buffers and the parameters that require gradients, so that frozen networks do not fill the disk; all
    of them where none does.
    """
    named = list(module.named_parameters(remove_duplicate=False))
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    left_out = frozen if len(frozen) < len(named) else set()
    return {key: value for key, value in module.state_dict().items() if key not in left_out}


def _level(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """An optimiser's fields, with those in tables of their own (bitsandbytes' quantised moments), which it also takes
    beside the others.
    """
    for key, value in fields.items():
        yield from _level(value) if isinstance(value, dict) else ((key, value),)


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The Python numbers among an optimiser's fields (counters; Prodigy's d), bit for bit; not its switches."""
    for key, value in fields.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _laid_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A value in the memory format of its parameter: fused optimisers walk both as they lie in memory."""
    if value.ndim == 0 or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


# -- what is looked at before it is taken ------------------------------------------------------------------------------


def _fault(path: Path) -> str:
    """Why a folder is no sound state; "" if it is one. Files that are not the state's own do not matter."""
    try:
        changed = check_manifest(path)
        ours = {name: what for name, what in changed.items() if what != "unlisted" or name in (TENSORS, ABOUT)}
        if not ours:
            _about(path)
            read_header(path / TENSORS)
    except ModelError as error:
        return str(error)
    return ", ".join(f"{name} is {what}" for name, what in ours.items())


def _about(path: Path) -> dict[str, Any]:
    """What a state says of itself. ModelError when it lacks something, or has the step of another."""
    about = read_json(path / ABOUT)
    kinds = {"step": int, "run": dict, "extra": dict}
    wrong = [name for name, kind in kinds.items() if type(about.get(name)) is not kind]
    if wrong or (STATE.fullmatch(path.name) and about["step"] != _step(path)):
        raise ModelError(f"{path / ABOUT} has no sound {wrong[0] if wrong else 'step'}; remove that state")
    return about


def _check_run(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """LdmError unless both say the same, but for FREE fields. One that only one of them knows is newer or gone, and
    does no harm where the other has it empty, 0 or false: that is how things are without it.
    """
    pictures = before.pop(DATA, {}), now.pop(DATA, {})
    old, new = _flat(before), _flat(now)
    idle = {key for key in old.keys() ^ new.keys() if not (old.get(key) or new.get(key))}
    fields = [key for key in dict.fromkeys([*new, *old]) if key not in idle | FREE]
    changed = [f"{key} {old.get(key)!r}, not {new.get(key)!r}" for key in fields if old.get(key) != new.get(key)]
    if changed:
        raise LdmError(
            f"{path} was saved by a run with {'; '.join(changed[:5])}; go on with the configuration it was begun with, "
            f"{OR_ELSEWHERE}"
        )
    if said := difference(*pictures):
        raise LdmError(
            f"{path} was saved by a run on other pictures ({said}); go on with those it was begun with, {OR_ELSEWHERE}"
        )


def _check_shapes(file: Path, modules: Mapping[str, nn.Module], parameters: list[Tensor], groups: int) -> None:
    """ModelError unless a state's file is sound and holds the tensors of these networks and their optimiser."""
    wanted = {f"{name}/{key}": tuple(v.shape) for name, module in modules.items() for key, v in _kept(module).items()}
    held = {key: entry.shape for key, entry in read_header(file).tensors.items()}
    wrong = [key for key, shape in wanted.items() if held.get(key) != shape]
    for key, shape in held.items():
        match = OWN.fullmatch(key)
        if match is None:
            fits = key in wanted
        elif match[1] == "optimizer":  # of the parameter's shape, a single number, or a row of some (Prodigy's slices)
            index = int(match[2])
            fits = index < len(parameters) and (len(shape) < 2 or shape == tuple(parameters[index].shape))
        else:
            fits = shape == () and int(match[2]) < (groups if match[1] == "group" else len(parameters))
        wrong += [] if fits else [key]
    if wrong:
        raise ModelError(
            f"{file} does not fit the networks of this run ({len(wrong)} tensors, first {wrong[0]}); "
            f"go on with the code it was begun with, {OR_ELSEWHERE}"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """A nested table as {"loop.steps": 10, ...}."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}


# -- folders -----------------------------------------------------------------------------------------------------------


def _named(folder: Path) -> list[Path]:
    """What is named as a state, oldest first."""
    return sorted((path for path in folder.glob("state-*") if STATE.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("state-"))


def _left_over(folder: Path, kind: str) -> list[Path]:
    """Folders that a killed process left: half-written ones ("tmp"), or ones put aside ("old")."""
    found = [(path, LEFT_OVER.fullmatch(path.name)) for path in folder.glob(f".*.{kind}")]
    return sorted(path for path, match in found if match and match[1] == kind and path.is_dir())


def _sweep(folder: Path) -> None:
    """Remove what killed processes left, but for the only sound state."""
    aside = _left_over(folder, "old")
    for path in _left_over(folder, "tmp") + (aside if aside and newest(folder) not in aside else []):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder; out of sight first, so that no half-removed state is taken for a whole one. What cannot be
    removed stays, with a warning.
    """
    hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(path.rename(hidden))
    except FileNotFoundError:
        pass  # another process of this run did it
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error.strerror)


def _free(folder: Path) -> int:
    """Bytes that may be written on the disk of a folder, which need not be there yet."""
    whole = folder.absolute()
    try:
        return shutil.disk_usage(next(path for path in (whole, *whole.parents) if path.exists())).free
    except OSError as error:
        raise LdmError(f"cannot write {folder}: {error.strerror}; check that folder") from error


def _full(path: Path, needed: int) -> LdmError:
    free = _free(path.parent)
    return LdmError(
        f"cannot save {path}: it needs {needed:,} bytes and {free:,} are free on its disk (or fewer, by a quota); make "
        "room and start the same command again, the states before it are as they were"
    )
