"""Everything a run needs to go on as if it had never stopped: saved whole or not at all, read back bit for bit.

Random numbers are functions of (seed, step), so no generator's state has to be kept.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.errors import LdmError

STATE = re.compile(r"state-(\d+)$")


def states(folder: Path) -> list[Path]:
    """The complete states in a run's folder, oldest first. Unfinished ones carry another name."""
    found = [p for p in folder.glob("state-*") if STATE.search(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save_state(
    folder: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
    keep: int,
) -> Path:
    """Write `state-<step>` atomically (temporary folder, fsync, rename), then remove all but the newest `keep`.

    modules: by name, whose parameters and buffers are kept. run: what must be equal on resuming (the configuration).
    """
    tensors = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for index, kept in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in kept.items()}
    target, temporary = folder / f"state-{step}", folder / f".state-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, "run": run}, indent=1))
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    if target.exists():  # the same step saved again, by a run that was set back
        shutil.rmtree(target)
    temporary.rename(target)
    sync(folder)
    for old in states(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_state(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> int:
    """Read a state back into the modules and the optimiser; -> its step. LdmError when it belongs to another
    configuration.
    """
    about = json.loads((path / "state.json").read_text())
    if changed := [key for key in run if about["run"].get(key) != run[key]]:
        raise LdmError(
            f"{path} was saved by a run with another {', '.join(changed)}; go on with the configuration it was "
            f"begun with, "
            "or give another folder for `loop.out`"
        )
    tensors = load_file(path / "state.safetensors")
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        module.load_state_dict(own)
    kept: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, field = key.split("/")
            kept.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(about["step"])


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
