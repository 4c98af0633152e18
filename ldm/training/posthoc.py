"""Averages of any length after the run (post-hoc EMA: Karras et al. 2024, arXiv:2312.02696, sec. 3 and appendix C).

How long an average should be is known only when a model is done, and depends on all else. So a run tracks averages of
two lengths and keeps snapshots of them; afterwards that sum of snapshots whose profile is nearest to a wanted one
stands for it. A profile says what share of an average the weights of each moment have, here a power of its time: the
longer a run, the longer the averages, always the same share of it.
"""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import nn

from ldm.checkpoints.load import load_into
from ldm.checkpoints.safe import atomic_save_safetensors, read_header, read_json
from ldm.errors import LdmError
from ldm.training.config import LoopConfig, checked
from ldm.training.ema import EMA, gamma_of
from ldm.training.state import ABOUT, newest

SNAPSHOTS = "snapshots"  # the folder in a run's own; files are named by the updates that the averages had


class Profiles(nn.Module):
    """The averages that a run tracks, one for each of c.ema_profiles; a part of its states. Without any, nothing."""

    def __init__(self, model: nn.Module, c: LoopConfig) -> None:
        super().__init__()
        self.c = c
        self._tracked = [(gamma_of(sigma_rel), EMA(model, 0.0)) for sigma_rel in c.ema_profiles]
        self.models = nn.ModuleList(average.model for _, average in self._tracked)

    def after(self, steps: int) -> None:
        """What is due after so many steps: an update of the averages; a snapshot of them, before the state is saved, so
        that a run that goes on from there has it. A run that begins anew forgets those of another.
        """
        c, folder = self.c, Path(self.c.out) / SNAPSHOTS
        t, rest = divmod(steps, c.ema_every)
        if t and not rest:
            for gamma, average in self._tracked:
                average.keep((1 - 1 / t) ** (gamma + 1))  # sec. 3.1 there
        if not self._tracked or not PartialState().is_main_process:
            return
        if steps == 1:
            shutil.rmtree(folder, ignore_errors=True)
        if t and (steps % c.ema_snapshots_every == 0 or steps == c.steps):
            folder.mkdir(parents=True, exist_ok=True)
            tracked = zip(c.ema_profiles, self.models, strict=True)
            tensors = {f"{sigma}/{key}": value for sigma, m in tracked for key, value in m.state_dict().items()}
            atomic_save_safetensors(tensors, folder / f"{t:07}.safetensors", dtype=torch.float16)


def overlap(
    t_a: NDArray[np.float64], gamma_a: NDArray[np.float64], t_b: NDArray[np.float64], gamma_b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The integral of the product of two profiles, of averages at the times t_a and t_b (appendix C there)."""
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def shares(times: Sequence[float], gammas: Sequence[float], end: float, gamma: float) -> NDArray[np.float64]:
    """What share each snapshot has in the sum whose profile is nearest, in least squares, to that of gamma at `end`.
    Their sum is 1.
    """
    t, g = np.array(times, np.float64), np.array(gammas, np.float64)
    among = overlap(t[:, None], g[:, None], t[None], g[None])
    with_wanted = overlap(t, g, np.array(end, np.float64), np.array(gamma, np.float64))
    found = np.linalg.lstsq(among, with_wanted, rcond=None)[0]
    return np.asarray(found / found.sum())


def summands(run: Path, sigma_rel: float) -> list[tuple[Path, str, float]]:
    """The snapshots of a run (files, and the prefix of the tensors' names), and the share of each in the average of
    this length at the last of them.

    LdmError when the run's folder holds none, UsageError as of `gamma_of`, ModelError for a damaged one.
    """
    gamma = gamma_of(sigma_rel)
    paths = sorted((run / SNAPSHOTS).glob("[0-9]*.safetensors"), key=lambda path: int(path.stem))
    if not paths:
        raise LdmError(
            f"{run} holds no snapshots of averages; a run keeps them that has ema_profiles (such as 0.05 and 0.1) and "
            "ema_snapshots_every"
        )
    found = [(path, sigma) for path in paths for sigma in sorted({n.split("/")[0] for n in read_header(path).tensors})]
    times, gammas = [int(path.stem) for path, _ in found], [gamma_of(float(sigma)) for _, sigma in found]
    own = shares(times, gammas, times[-1], gamma).tolist()
    return [(path, f"{sigma}/", share) for (path, sigma), share in zip(found, own, strict=True)]


@torch.no_grad()
def averaged(model: nn.Module, parts: Sequence[tuple[Path, str, float]]) -> nn.Module:
    """The sum of `summands`, in float32. model: the run's own, with whatever weights; it stays as it is.

    ModelError for snapshots that are damaged, or of another network.
    """
    made, one = (copy.deepcopy(model).eval().requires_grad_(False) for _ in range(2))
    for p in made.parameters():
        p.zero_()
    for path, prefix, share in parts:
        load_into(one, path, torch.float32, prefix=prefix)
        for p, snapshot in zip(made.parameters(), one.parameters(), strict=True):
            p.add_(snapshot, alpha=share)
    return made


def configuration(run: Path, kinds: Mapping[str, type[Any]]) -> tuple[str, Any]:
    """The kind of a run, and what it was told, as its newest state has it; its folder is `run`, wherever it was, and it
    has no second place for results (`weights`). LdmError when that is no run of one of these kinds.
    """
    state = newest(run)
    if state is None:
        raise LdmError(f"{run} holds no state of a run; give the folder of one, its `loop.out`")
    told = read_json(state / ABOUT)["run"]
    for beside in ("batches_per_step", "base"):
        told.pop(beside, None)
    name = next((n for n, kind in kinds.items() if told.keys() <= {field.name for field in fields(kind)}), None)
    if name is None or "loop" not in told:
        raise LdmError(f"{run} is no run of ldm train {', '.join(kinds)}; give the folder of one")
    told["loop"]["out"] = str(run)
    return name, checked({key: value for key, value in told.items() if key != "weights"}, kinds[name], str(state))
