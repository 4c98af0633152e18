"""Everything a run needs to go on as if it had never stopped: saved whole or not at all, read back bit for bit.

A state is a folder `state-<step>` with `state.safetensors` (networks and optimiser) and `state.json` (step and
configuration). Random numbers are functions of (seed, step), so no generator's state has to be kept.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.checkpoints.safe import atomic_folder, atomic_json, atomic_save_safetensors, read_header, read_json
from ldm.errors import LdmError, ModelError

STATE = re.compile(r"state-(\d+)", re.ASCII)
LEFT_OVER = re.compile(r"\.(state-\d+|[0-9a-f]{12})\.(tmp|old)", re.ASCII)  # of a run that was killed while it wrote
TENSORS, ABOUT = "state.safetensors", "state.json"


def states(folder: Path) -> list[Path]:
    """The complete states in a run's folder, oldest first. Unfinished ones carry another name."""
    named = [(int(match[1]), path) for path in folder.glob("state-*") if (match := STATE.fullmatch(path.name))]
    return [path for _, path in sorted(named) if all((path / name).is_file() for name in (TENSORS, ABOUT))]


def save_state(
    folder: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
    keep: int,
) -> Path:
    """Write `state-<step>`, whole or not at all, then remove all but the newest `keep` (at least 1).

    modules: by name, whose parameters and buffers are kept. run: what must be equal on resuming (the configuration).
    A process killed at any moment leaves the states before this one as they were. LdmError when the system refuses.
    """
    tensors = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for index, kept in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in kept.items()}
    for item in folder.iterdir() if folder.is_dir() else ():
        if LEFT_OVER.fullmatch(item.name) and item.is_dir():
            shutil.rmtree(item, ignore_errors=True)
    with atomic_folder(folder / f"state-{step}") as staging:
        atomic_save_safetensors(tensors, staging / TENSORS)
        atomic_json(staging / ABOUT, {"step": step, "run": run})
    for path in states(folder)[:-keep]:
        hidden = path.with_name(f".{path.name}.old")  # so that no half-removed state is taken for a whole one
        shutil.rmtree(path.rename(hidden), ignore_errors=True)
    return folder / f"state-{step}"


def load_state(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> int:
    """Read a state back into the modules and the optimiser; -> its step.

    LdmError when it belongs to another configuration (the fields are named). ModelError when it is damaged, or made by
    networks of another shape; nothing is then changed.
    """
    about = read_json(path / ABOUT)
    before, now = _flat(about.get("run", {})), _flat(run)
    changed = [f"{key} {before.get(key)!r}, not {value!r}" for key, value in now.items() if before.get(key) != value]
    if changed:
        raise LdmError(
            f"{path} was saved by a run with {'; '.join(changed[:5])}; go on with the configuration it was begun with, "
            "or give another folder for `loop.out`"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _check(path / TENSORS, modules, parameters)
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}; remove it to go on from an earlier one") from error
    for name, module in modules.items():
        module.load_state_dict({key: tensors[f"{name}/{key}"] for key in module.state_dict()})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, field = key.split("/")
            # In the parameter's memory format: fused optimisers walk both as they lie in memory.
            like = torch.empty_like(parameters[int(index)] if value.ndim else value)
            state.setdefault(int(index), {})[field] = like.copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(path.name.removeprefix("state-"))


def _check(file: Path, modules: dict[str, nn.Module], parameters: list[Tensor]) -> None:
    """ModelError unless a state's file is sound and holds the tensors of these networks and their optimiser."""
    wanted = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    held = {key: entry.shape for key, entry in read_header(file).tensors.items()}
    wrong = [key for key, value in wanted.items() if held.get(key) != tuple(value.shape)]
    for key, shape in held.items():
        if match := re.fullmatch(r"optimizer/(\d+)/\w+", key):
            fits = int(match[1]) < len(parameters) and shape in ((), tuple(parameters[int(match[1])].shape))
        else:
            fits = key in wanted
        wrong += [] if fits else [key]
    if wrong:
        raise ModelError(
            f"{file} does not fit the networks of this run ({len(wrong)} tensors, first {wrong[0]}); "
            "go on with the code it was begun with, or give another folder for `loop.out`"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """A nested table as {"loop.steps": 10, ...}."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}
