"""Training states: saved whole or not at all, whatever the system does, and read back bit for bit.

Processes are killed at random moments; every call that writes is made to fail, or to be the last thing a process does;
disks are full; bits flip. What must come out is what a run without any of that gives.
"""

import dataclasses
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checkpoints import safe
from ldm.checkpoints.safe import read_json, write_manifest
from ldm.data.pictures import Digest
from ldm.errors import LdmError, ModelError
from ldm.training import state as module_under_test
from ldm.training.config import LoopConfig
from ldm.training.ema import EMA
from ldm.training.loop import Stage, train
from ldm.training.state import forget, load_state, newest, save_state, states

ROOT = Path(__file__).parents[1]
FILES = {"state.safetensors", "state.json", "manifest.sha256"}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory, where there is such a thing: a save syncs a dozen times, and the disk is not in question."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Trial:
    """A small network and its optimiser, whose every step is a function of the step's number."""

    def __init__(self, kind: str = "adamw", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        nn.init.zeros_(self.model[2].weight)
        self.optimizer = OPTIMIZERS[kind](self.model, **options)

    def step(self, number: int) -> None:
        numbers = torch.Generator().manual_seed(number)
        x = torch.randn(8, 3, generator=numbers)
        self.optimizer.zero_grad()
        (self.model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        self.optimizer.step()

    def save(self, folder: Path, step: int, keep: int = 2, **options: Any) -> Path:
        return save_state(folder, step, {"model": self.model}, self.optimizer, options.pop("run", {}), keep, **options)

    def load(self, path: Path, run: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        return load_state(path, {"model": self.model}, self.optimizer, run or {})

    def everything(self) -> list[Any]:
        """All that the next step depends on, and what lies in the optimiser's tables."""
        whole = self.optimizer.state_dict()
        return plain([self.model.state_dict(), whole["state"], whole["param_groups"]])


class Nested(torch.optim.SGD):
    """Says its state as bitsandbytes' optimisers do: tables within the tables. It takes them flat as well."""

    def state_dict(self) -> dict[str, Any]:
        told = super().state_dict()
        return told | {"state": {index: {"quantised": fields} for index, fields in told["state"].items()}}


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    "plain adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True),
    "nested": lambda model: Nested(model.parameters(), lr=0.01, momentum=0.9),
    "bare sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    "prodigy": lambda model, slice_p=1: prodigyopt.Prodigy(
        [{"params": model[0].parameters(), "weight_decay": 0.01}, {"params": model[1:].parameters()}],
        lr=1.0, use_bias_correction=True, safeguard_warmup=True, slice_p=slice_p,
    ),
    "sliced prodigy": lambda model: OPTIMIZERS["prodigy"](model, slice_p=3),
}  # fmt: skip


def plain(value: Any) -> Any:
    """Tensors as their type, shape and bytes; numbers as their type and exact digits."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().clone().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else (type(value).__name__, repr(value))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- going on as if never stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimiser_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """N steps are k steps, a state, and N - k steps by another that was elsewhere; Prodigy's d is growing meanwhile."""
    whole = Trial(kind)
    found: list[Any] = []
    for number in range(24):
        if number in (0, 1, 2, 13):
            whole.save(tmp_path / str(number), number)
        whole.step(number)
        found.append(plain([whole.optimizer.param_groups[0].get(key) for key in ("d", "d_numerator")]))
    if "prodigy" in kind:
        assert len({d for d, _ in found}) > 1 and len({numerator for _, numerator in found}) > 12
    for begun in (0, 1, 2, 13):
        again = Trial(kind)
        for number in range(100, 103):  # elsewhere, and with moments of its own
            again.step(number)
        assert again.load(tmp_path / str(begun) / f"state-{begun}") == (begun, {})
        for number in range(begun, 24):
            again.step(number)
        ours, theirs = again.everything(), whole.everything()
        assert ours[:2] == theirs[:2]
        assert [{k: g[k] for k in h} for g, h in zip(ours[2], theirs[2], strict=True)] == theirs[2]


def test_numbers_of_any_size_come_back(tmp_path: Path) -> None:
    """Prodigy's growth_rate is infinite; a d of 1e-300, and a count that no float holds, stay what they are."""
    odd = {"growth_rate": float("inf"), "d": 1e-300, "d_max": 0.1 + 0.2, "k": 2**60 + 1, "d_hat": float("nan")}
    trial, again = Trial("prodigy"), Trial("prodigy")
    trial.step(0)
    trial.optimizer.param_groups[1].update(odd)
    again.load(trial.save(tmp_path, 1))
    assert plain({key: again.optimizer.param_groups[1][key] for key in odd}) == plain(odd)
    assert again.everything() == trial.everything()


def test_what_is_frozen_is_not_kept(tmp_path: Path) -> None:
    """Buffers are; a network without anything to train is an average, and is kept whole."""
    trial = Trial()
    trial.model[0].requires_grad_(False)
    average = EMA(trial.model, 0.9).model
    path = save_state(tmp_path, 1, {"model": trial.model, "ema": average}, trial.optimizer, {}, 1)
    held = {key for key in load_file(path / "state.safetensors") if key.split("/")[0] in ("model", "ema")}
    every = set(trial.model.state_dict())
    assert held == {f"model/{key}" for key in every if not key.startswith("0.")} | {f"ema/{key}" for key in every}
    assert "model/1.running_mean" in held and "ema/0.weight" in held
    again = Trial()
    again.model[0].requires_grad_(False)
    with torch.no_grad():
        again.model[0].weight.fill_(7)
        again.model[2].weight.fill_(7)
    load_state(path, {"model": again.model, "ema": EMA(again.model, 0.9).model}, again.optimizer, {})
    assert float(again.model[0].weight.detach().min()) == 7 and float(again.model[2].weight.detach().max()) < 7
    with pytest.raises(ModelError, match=r"does not fit .*first model/0"):  # other parameters are trained now
        load_state(path, {"model": Trial().model, "ema": average}, Trial().optimizer, {})


def test_counters_and_the_scaler_come_back(tmp_path: Path) -> None:
    extra = {"skipped": 3, "scaler": {"scale": 65536.0, "growth": 0.1 + 0.2}, "name \udcff": [1, None, "ü"]}
    trial = Trial()
    assert trial.load(trial.save(tmp_path, 5, extra=extra)) == (5, extra)
    assert set(names(tmp_path / "state-5")) == FILES
    done = subprocess.run(["sha256sum", "--strict", "-c", "manifest.sha256"], cwd=tmp_path / "state-5", check=False)
    assert done.returncode == 0
    assert not any(file.read_bytes()[:2] in (b"PK", b"\x80\x02") for file in (tmp_path / "state-5").iterdir())


# -- what is refused ---------------------------------------------------------------------------------------------------

PICTURES = {"a.png": Digest("1", "2", ""), "b.png": Digest("3", "4", ""), "c.png": Digest("5", "6", "")}
RUN = {"rank": 8, "loop": {"seed": 0, "betas": (0.9, 0.99)}, "manifest": PICTURES}
CHANGED: dict[str, dict[str, Any]] = {  # what is said -> the run that is refused
    "by a run with rank 8, not 16; go on with the configuration": RUN | {"rank": 16},
    "with loop.seed 0, not 1; rank 8, not None; go on": {"loop": RUN["loop"] | {"seed": 1}, "manifest": PICTURES},
    "with alpha None, not 4; go on": RUN | {"alpha": 4},
    "with loop.betas [0.9, 0.99], not [0.9, 0.9]; go on": RUN | {"loop": {"seed": 0, "betas": (0.9, 0.9)}},
} | {
    f"on other pictures ({said}); go on with those it was begun with": RUN | {"manifest": other}
    for said, other in {
        "1 gone (c.png)": {key: PICTURES[key] for key in ("a.png", "b.png")},
        "1 new (d.png)": PICTURES | {"d.png": Digest("7", "8", "")},
        "1 with another caption (b.png)": PICTURES | {"b.png": Digest("3", "9", "")},
        "1 with another mask (a.png)": PICTURES | {"a.png": Digest("1", "2", "m")},
        "another order": dict(reversed(PICTURES.items())),
        "3 gone (a.png, b.png, c.png)": {},
    }.items()
}


@pytest.mark.parametrize("said", CHANGED)
def test_another_run_is_refused_and_nothing_is_changed(tmp_path: Path, said: str) -> None:
    trial, again = Trial(), Trial()
    trial.step(0)
    path = trial.save(tmp_path, 1, run=RUN)
    again.step(1)
    before, files = again.everything(), tree(tmp_path)
    with pytest.raises(LdmError, match=re.escape(said) + ".* or give another folder") as refused:
        again.load(path, CHANGED[said])
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    assert again.everything() == before and tree(tmp_path) == files
    assert again.load(path, RUN) == (1, {})
    assert again.everything() == trial.everything()


def test_other_networks_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    trial = Trial()
    trial.step(0)
    path = trial.save(tmp_path, 1)
    wide, kept = nn.Linear(5, 4), nn.Linear(3, 4)
    for modules, said in (
        ({"model": wide}, "first model/weight"),
        ({"model": trial.model, "more": kept}, "first more/weight"),
        ({}, "first model/"),
    ):
        before = plain([module.state_dict() for module in modules.values()])
        trained = [parameter for module in modules.values() for parameter in module.parameters()]
        optimizer = torch.optim.AdamW(trained or [torch.ones(1)])
        with pytest.raises(ModelError, match=rf"state.safetensors does not fit .*{said}"):
            load_state(path, modules, optimizer, {})
        assert plain([module.state_dict() for module in modules.values()]) == before and not optimizer.state
    whole = load_file(path / "state.safetensors")
    foreign = {"optimizer/0/exp_avg": (2, 2), "optimizer/99/step": (), "group/1/eps": (), "number/0/k": (1,)}
    for key, shape in foreign.items():
        safe.atomic_save_safetensors(whole | {key: torch.zeros(shape)}, path / "state.safetensors")
        with pytest.raises(ModelError, match=f"1 tensors, first {key}"):
            trial.load(path)


# -- the newest sound one ----------------------------------------------------------------------------------------------


def damage_cut(path: Path) -> None:
    os.truncate(path / "state.safetensors", 100)


def damage_other_step(path: Path) -> None:
    about = read_json(path / "state.json")
    (path / "state.json").write_text(json.dumps(about | {"step": 8}))
    write_manifest(path)


def damage_foreign(path: Path) -> None:
    (path / "state.safetensors").write_bytes(b"\x80\x02nothing")
    write_manifest(path)


def damage_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "state.safetensors is changed": damage_cut,
    "state.safetensors is missing": lambda path: (path / "state.safetensors").unlink(),
    "state.json is missing": lambda path: (path / "state.json").unlink(),
    "cannot check .* against manifest.sha256": lambda path: (path / "manifest.sha256").unlink(),
    "state.json is unlisted": lambda path: (path / "manifest.sha256").write_bytes(
        (path / "manifest.sha256").read_bytes().splitlines(keepends=True)[1]
    ),
    "state.json has no sound step": damage_other_step,
    "is a pickled PyTorch checkpoint": damage_foreign,
    "cannot check": damage_file,
}


@pytest.mark.parametrize("said", DAMAGES)
def test_damaged_states_are_passed_over_with_a_warning(tmp_path: Path, caplog: Any, said: str) -> None:
    trial = Trial()
    for step in (3, 20, 100):  # in the order of numbers, not of letters
        trial.save(tmp_path, step, keep=3)
    (tmp_path / "state-20" / "notes.txt").write_text("mine")  # does not matter
    assert newest(tmp_path) == tmp_path / "state-100" and caplog.text == ""
    DAMAGES[said](tmp_path / "state-100")
    files = tree(tmp_path)
    assert newest(tmp_path) == tmp_path / "state-20" and tree(tmp_path) == files
    [record] = caplog.records
    assert record.levelname == "WARNING" and re.search(f"state-100 is passed over: .*{said}", record.getMessage())
    assert trial.save(tmp_path, 21, keep=1) == newest(tmp_path)  # and it does not count among those kept
    assert names(tmp_path) == ["state-100", "state-21"]
    if (tmp_path / "state-100").is_dir():
        trial.save(tmp_path, 100, keep=1)
        assert names(tmp_path) == ["state-100"] and newest(tmp_path) == tmp_path / "state-100"


def test_where_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere") is None and states(tmp_path / "nowhere") == []
    for name in ("states-9", "state-", "state-x", ".state-9.tmp", "result"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path) is None


def test_a_run_is_forgotten(tmp_path: Path) -> None:
    trial = Trial()
    for name in (".state-1.old", ".0123456789ab.tmp"):
        (tmp_path / name / "inner").mkdir(parents=True)
    for step in (1, 2):
        trial.save(tmp_path, step)
    (tmp_path / "log.jsonl").touch()
    forget(tmp_path)
    forget(tmp_path)
    assert names(tmp_path) == ["log.jsonl"]


@pytest.mark.parametrize("count", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_taken(tmp_path: Path, caplog: Any, count: int) -> None:
    """1,000 of 1,000 found (slow), in any of the three files."""
    trial, rng = Trial(), random.Random(7)
    trial.step(0)
    trial.save(tmp_path, 1)
    trial.step(1)
    files = [trial.save(tmp_path, 2) / name for name in sorted(FILES)]
    for number in range(count):
        file = files[number % 3]
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        assert newest(tmp_path) == tmp_path / "state-1", (file, flipped)
        file.write_bytes(whole)
    assert newest(tmp_path) == tmp_path / "state-2"
    assert len(caplog.records) == count


# -- every call that writes fails in turn, or is the last one ----------------------------------------------------------

Before = Callable[[str, Callable[[], object]], None]  # told what comes, and how to do the half of it


class Raw(io.FileIO):
    """A file that tells of every write before it is done."""

    def __init__(self, handle: int, before: Before) -> None:
        super().__init__(handle, "wb")
        self.before = before

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.before("write", lambda: super(Raw, self).write(view[: len(view) // 2]))
        return super().write(data)


@contextmanager
def shim(before: Before) -> Iterator[None]:
    """While it lasts, `before` is told of every call that changes the disk, and may raise in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safe, "open", lambda handle, mode: io.BufferedWriter(Raw(handle, before)), raising=False)
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, told(name, getattr(os, name), before))
        yield


def told(name: str, real: Callable[..., Any], before: Before) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        before(name, lambda: None)
        return real(*args, **options)

    return call


class Stopped(BaseException):
    """The end of the process, as the disk sees it: not a call is made any more, not even to clean up."""


def refused(code: int) -> OSError:
    return OSError(code, os.strerror(code))


FULL = {"write", "fsync", "mkdir"}  # what a full disk refuses; it lets names be changed and removed
FAILURES: dict[str, tuple[BaseException, bool, set[str]]] = {  # the failure; whether it stays so; of which calls
    "EIO once": (refused(errno.EIO), False, set()),
    "EIO from then on": (refused(errno.EIO), True, set()),
    "ENOSPC once": (refused(errno.ENOSPC), False, FULL),
    "ENOSPC from then on": (refused(errno.ENOSPC), True, FULL),
    "EDQUOT once": (refused(errno.EDQUOT), False, FULL),
    "stopped": (Stopped(), True, set()),
}
CASES = {  # steps that are there; the one saved; how many are kept
    "a new state": ((1, 2), 3, 2),
    "the same step again": ((3,), 3, 1),
    "the same after a stop": ((3,), 3, 1),  # between two renames: the old one has not come back under its name
}


class Scene:
    """A folder with states and a run that saves one more, over and over from the same beginning."""

    def __init__(self, base: Path, case: str) -> None:
        self.case, (self.there, self.step, self.keep) = case, CASES[case]
        self.trial, self.base, self.folder = Trial(), base, base / "run"
        for step in self.there:
            self.trial.step(step)
            self.trial.save(base / "before", step, keep=9)
        self.trial.step(self.step)
        path = self.trial.save(base / "after", self.step)
        self.sound = {path.name: tree(path) for path in (*(base / "before").iterdir(), path)}
        self.replaced = tree(base / "before" / path.name) if self.step in self.there else {}

    def begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.base / "before", self.folder)
        if self.case == "the same after a stop":
            (self.folder / "state-3").rename(self.folder / ".0123456789ab.old")

    def save(self) -> None:
        self.trial.save(self.folder, self.step, self.keep)

    def fault(self) -> str:
        """What is wrong with the folder after a save that may have failed; "" if nothing is."""
        found = newest(self.folder)
        if found is None:
            return "no sound state"
        step = read_json(found / "state.json")["step"]
        if step < max(self.there) or tree(found) not in (self.sound[f"state-{step}"], self.replaced):
            return f"{found.name} is not what was saved"
        for path in self.folder.glob("state-*"):  # not one of them is half a state
            if tree(path) not in (self.sound[path.name], self.replaced):
                return f"{path.name} is damaged"
        return ""

    def next_fault(self) -> str:
        """Likewise, after another save in which nothing fails."""
        self.trial.save(self.folder, 4, 2)
        left = names(self.folder)
        sound = newest(self.folder) == self.folder / "state-4"
        return "" if sound and len(left) <= 2 and all(name.startswith("state-") for name in left) else f"left: {left}"


NEW, AGAIN, _ = CASES
EVERYDAY = {
    ("EIO once", NEW),
    ("ENOSPC from then on", NEW),
    ("EDQUOT once", AGAIN),
    *(("stopped", case) for case in CASES),
}


@pytest.mark.parametrize(
    ("failure", "case"),
    [
        pytest.param(failure, case, marks=[pytest.mark.slow] * ((failure, case) not in EVERYDAY))
        for failure in FAILURES
        for case in CASES
    ],
)
def test_every_call_that_writes_fails_in_turn(tmp_path: Path, failure: str, case: str) -> None:
    scene, (error, stays, which) = Scene(tmp_path, case), FAILURES[failure]
    calls: list[str] = []
    for moment in range(1000):
        scene.begin()
        calls = []

        def before(name: str, half: Callable[[], object]) -> None:
            if not which or name in which:
                calls.append(name)  # noqa: B023  # of this round
                if len(calls) - 1 == moment or (stays and len(calls) > moment):  # noqa: B023
                    half()
                    raise error

        try:
            with shim(before):
                scene.save()
        except Stopped:
            assert failure == "stopped"
        except LdmError as said:
            assert "cannot" in str(said) and "\n" not in str(said)
            if which:
                assert re.search(r"cannot save .*state-3: it needs [\d,]+ bytes and [\d,]+ are free", str(said))
        else:
            assert (scene.folder / "state-3").is_dir()
        assert (scene.fault(), scene.next_fault()) == ("", ""), calls
        if len(calls) <= moment:
            break
    assert len(calls) == moment >= (15 if which else 22)
    assert {"write", "fsync", "mkdir"} | (set() if which else {"rename", "replace", "unlink", "rmdir"}) == set(calls)


def be_stopped(base: str) -> None:
    """Runs in a process of its own. A fork of it saves, and stops (with nothing flushed or cleaned up) at the k-th
    call that changes the disk, k = 1, 2 ... Prints, for each case, the calls and the faults after each.
    """
    torch.set_num_threads(1)
    told_of: dict[str, Any] = {}
    for case in CASES:
        scene = Scene(Path(base) / case, case)
        calls, faults, status = [], [], 1
        for moment in range(1000):
            scene.begin()
            reader, writer = os.pipe()
            if (child := os.fork()) == 0:
                count = 0

                def before(name: str, half: Callable[[], object]) -> None:
                    nonlocal count
                    count += 1
                    if count > moment:  # noqa: B023  # this round's
                        half()
                        os.write(writer, name.encode())  # noqa: B023
                        os._exit(1)

                with shim(before):
                    scene.save()
                os._exit(0)
            os.close(writer)
            with open(reader) as file:
                calls.append(file.read())
            status = os.waitpid(child, 0)[1]
            faults.append(scene.fault() or scene.next_fault())
            if status == 0:
                break
        told_of[case] = {"calls": calls, "faults": faults, "status": status}
    print(json.dumps(told_of))


def in_a_process(call: str, *words: object) -> Any:
    """What a function of this file prints, run in a process with one thread that nothing was done in before."""
    code = f"import sys, test_state; test_state.{call}(*sys.argv[1:])"
    where = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, words)]
    done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # the same without processes is "stopped" above
def test_every_call_that_writes_is_the_last_one_in_turn(tmp_path: Path) -> None:
    """Last: 25, 24 and 25 moments, nothing lost."""
    report = in_a_process("be_stopped", tmp_path)
    for case in CASES:
        calls, faults = report[case]["calls"], report[case]["faults"]
        assert [(call, fault) for call, fault in zip(calls, faults, strict=True) if fault] == []
        assert report[case]["status"] == 0 and calls[-1] == "" and "" not in calls[:-1]
        assert len(calls) > 22 and {"write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"} <= set(calls)


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    trial = Trial()
    trial.step(0)
    trial.save(tmp_path, 1, keep=1)
    files = tree(tmp_path)
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return types.SimpleNamespace(free=1000)

    with monkeypatch.context() as patch:
        patch.setattr(module_under_test.shutil, "disk_usage", usage)
        patch.setattr(module_under_test, "atomic_folder", None)
        for folder in (tmp_path, tmp_path / "not" / "there" / "yet"):
            with pytest.raises(
                LdmError, match=r"cannot save .*state-2: it needs [\d,]+ bytes and 1,000 are free"
            ) as full:
                trial.save(folder, 2, keep=1)
    assert tree(tmp_path) == files and set(asked) == {tmp_path}
    needed = int(re.search(r"needs ([\d,]+) bytes", str(full.value))[1].replace(",", ""))  # type: ignore[index]
    size = sum(file.stat().st_size for file in trial.save(tmp_path, 2, keep=1).iterdir())
    assert size <= needed <= size + 100_000


@contextmanager
def small_disk(where: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes. Skips where none may be mounted."""
    where.mkdir()
    command = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", f"size={size}", "ldm", str(where)]
    done = subprocess.run(command, check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: Any) -> None:
    """A real one, asked before writing and not; room made by hand, and the same save is done."""
    trial = Trial()
    trial.model.register_buffer("ballast", torch.randn(1 << 18))  # 1 MB
    with small_disk(tmp_path / "disk", 5 << 19) as disk:  # 2.5 MB
        trial.save(disk / "run", 1)
        trial.save(disk / "run", 2)
        files = tree(disk)
        for asks in (True, False):
            with monkeypatch.context() as patch:
                if not asks:
                    real = shutil.disk_usage
                    free = iter([1 << 40])  # as it was before somebody else wrote
                    patch.setattr(
                        module_under_test.shutil, "disk_usage",
                        lambda path: types.SimpleNamespace(free=next(free, None) or real(path).free),  # noqa: B023
                    )  # fmt: skip
                with pytest.raises(LdmError, match=r"it needs 1,1[\d,]+ bytes and [345]\d\d,\d+ are free .*make room"):
                    trial.save(disk / "run", 3)
            assert tree(disk) == files and newest(disk / "run") == disk / "run" / "state-2"
        shutil.rmtree(disk / "run" / "state-1")
        assert trial.save(disk / "run", 3) == newest(disk / "run")
        assert names(disk / "run") == ["state-2", "state-3"]


# -- killed at any moment ----------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """Least squares, whose loss depends on the number of the batch, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.base = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("ballast", torch.randn(1 << 17))  # so that about half of the time goes into saving

    def forward(self, batch: tuple[Tensor, ...], number: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        return (self.model(self.base(x) + 0.01 * (number % 7)) - y).square().mean(), {}


class Batches(Dataset[tuple[Tensor, ...]]):
    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        return x, x.sum(1, keepdim=True)


def small_run(folder: Path, steps: int, workers: int) -> Iterator[tuple[int, bytes]]:
    """A run that saves after every step, two batches each; -> the step, and a digest of the network and its average as
    they then are and of the state as it was written.
    """
    c = LoopConfig(
        str(folder), steps=steps, batch_size=4, learning_rate=0.01, warmup_steps=5, ema_decay=0.9, ema_every=2,
        gradient_accumulation_steps=2, workers=workers, threads=1, device="cpu", log_every=7, save_every=1,
    )  # fmt: skip
    objective = Objective()
    ema = EMA(objective.model, c.ema_decay)
    stage: Any = Stage(objective, objective.model, Batches(), *3 * [lambda *_: {}])
    known = {"loop": dataclasses.asdict(c) | {"workers": 0, "out": ""}}
    for progress in train(stage, c, known, ema):
        live = repr(plain([objective.model.state_dict(), ema.model.state_dict()])).encode()
        yield progress.step, hashlib.sha256(live + digest(folder / f"state-{progress.step}")).digest()


def digest(path: Path) -> bytes:
    return hashlib.sha256((path / "state.safetensors").read_bytes()).digest()


def be_killed(base: str, kills: str, steps: str) -> None:
    """Runs in a process of its own. Forks runs that save as fast as they can, each in a group with its two workers, and
    kills it at a random moment after its first save. Prints what was found after each, and what the last run did.
    """
    torch.set_num_threads(1)
    unbroken, folder, rng = Path(base) / "unbroken", Path(base) / "killed", random.Random(11)
    right, states_of = {}, {}
    for step, live in small_run(unbroken, int(steps), 0):
        right[step], states_of[step] = live, digest(unbroken / f"state-{step}")
    found: list[dict[str, Any]] = []
    while len(found) < int(kills):
        told, status = killed_run(folder, int(steps), rng)
        state = newest(folder)
        step = int(state.name.removeprefix("state-")) if state else 0
        faults = [number for number, live in told if right[number] != live]
        faults += [] if step and digest(state) == states_of[step] else [step]
        faults += [] if step >= max((number for number, _ in told), default=0) else ["lost"]
        faults += [] if status in (0, signal.SIGKILL) else [f"status {status}"]
        if status or faults:
            found.append({"faults": faults, "saving": any(name.startswith(".") for name in names(folder))})
        else:  # it came to its end before
            shutil.rmtree(folder)
    last = [[step, right[step] == live] for step, live in small_run(folder, int(steps), 2)]
    print(json.dumps({"found": found, "last": last}))


def killed_run(folder: Path, steps: int, rng: random.Random) -> tuple[list[tuple[int, bytes]], int]:
    """What a run in a process of its own told until it was killed after a few steps; and how it ended (0: well)."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        for step, live in small_run(folder, steps, 2):
            os.write(writer, bytes([step]) + live)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb", buffering=0) as file:
        begun, told = time.monotonic(), [file.read(33)]
        for _ in range(rng.randint(1, 3)):
            begun, told = time.monotonic(), [*told, file.read(33)]
        time.sleep(rng.uniform(0, 1.5) * (time.monotonic() - begun))  # of a step and its save, as long as they take now
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            workers = Path(f"/proc/{child}/task/{child}/children")
            group = [str(child), *(workers.read_text().split() if workers.is_file() else ())]
            os.killpg(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            for left in (path for pid in group for path in Path("/dev/shm").glob(f"torch_{pid}_*")):
                left.unlink(missing_ok=True)  # a batch that was handed over just then
    return [(one[0], one[1:]) for one in told if one], status


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    """Never without a sound state; network, average and state are those of an unbroken run at every step that any of
    them makes. Last (slow): 100 of 100, 17 of them while a state was being written.
    """
    report = in_a_process("be_killed", tmp_path, kills, 40)
    assert [one["faults"] for one in report["found"]] == kills * [[]]
    assert all(right for _, right in report["last"]) and (report["last"] or [[40]])[-1][0] == 40
