"""One process and several train alike, and all of them survive what a machine does to them.

The everyday part runs in one process of its own, which forks all others after its imports. The slow part starts real
commands; last run: 13 passed.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import ldm.training.lora
from ldm.errors import LdmError
from ldm.training.lora import train_lora
from ldm.training.lora_batches import LoRABatches
from ldm.training.record import rows_of
from ldm.training.state import newest, states
from ldm.training.world import shard_frozen

ROOT = Path(__file__).parents[1]
SGD = {"optimizer": "sgd", "learning_rate": 0.5, "max_train_steps": 10}
SHORT = SGD | {"max_train_steps": 5, "checkpointing_steps": 2}
HARD = {  # whatever could get in the way of sharing networks among processes
    "train_text_encoder": True, "clip_skip": 1, "gradient_checkpointing": True, "use_dora": True, "ema_decay": 0.5,
    "targets": ("to_q", "attn2.to_v", "conv1", "v_proj"), "max_train_steps": 3, "validation_steps": 3,
}  # fmt: skip


def options(base: Path, out: str, **more: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "data": str(base / "pictures"), "model": str(base / "model"), "output_dir": str(base / out), "rank": 2,
        "train_batch_size": 1, "resolution": 16, "bucket_step": 8, "min_side": 8, "validation_prompt": ("an owl",),
        "validation_steps": 100, "checkpointing_steps": 100, "logging_steps": 1, "device": "cpu", "threads": 1,
        "num_held_out": 1, "lr_scheduler": "constant", "targets": ("attention",),
    }  # fmt: skip
    return told | more


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and six captioned pictures."""
    folder, draw = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    shutil.copytree(model, folder / "model")
    (folder / "pictures").mkdir()
    for i in range(6):
        size = (16, 24 if i > 3 else 16, 3)
        Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"an owl, number {i}")
    return folder


# -- what runs in processes of their own -------------------------------------------------------------------------------


def forked(report: Path, work: Callable[[dict[str, Any]], None], **environment: object) -> int:
    """The id of a process that does some work, and leaves what it put into a table, and how it failed, in a file."""
    if child := os.fork():
        return child
    os.environ.update({name: str(value) for name, value in environment.items()})
    code, told = 1, dict[str, Any]()
    AcceleratorState._reset_state(True)
    signal.alarm(900)  # where the other one is gone, this one may wait for it
    try:
        work(told)
        code = 0
    except LdmError as error:
        told["error"], code = str(error), error.exit_code
    except BaseException:
        told["error"] = traceback.format_exc()
    report.write_text(json.dumps(told))
    os._exit(code)


def pair(base: Path, name: str, work: Callable[[dict[str, Any]], None]) -> list[int]:
    """Two processes of one run."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [forked(base / f"{name}-{r}.json", work, RANK=r, LOCAL_RANK=r, **common) for r in range(2)]


def end_of(child: int) -> int:
    """Exit code of a process; less than 0: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watched(told: dict[str, Any], out: Path) -> None:
    """From now on a process tells which batches it was given (number: digest), what it encoded, and what it changes in
    the run's folder.
    """
    told |= {"batches": {}, "encoded": 0, "written": []}
    item, encoded, heard = LoRABatches.__getitem__, LoRABatches._encoded, LoRABatches._heard

    def getitem(self: LoRABatches, number: int) -> Any:
        batch = item(self, number)
        bits = [v.contiguous().numpy().tobytes() if isinstance(v, Tensor) else str(v).encode() for v in batch]
        told["batches"][number] = hashlib.sha256(b"|".join(bits)).hexdigest()
        return batch

    def counting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            told["encoded"] += 1
            return plain(*arguments)

        return counted

    LoRABatches.__getitem__ = getitem  # type: ignore[method-assign]
    LoRABatches._encoded, LoRABatches._heard = counting(encoded), counting(heard)  # type: ignore[method-assign]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        changes |= event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and str(arguments[0]).startswith(str(out)):
            told["written"].append(str(arguments[0]))

    sys.addaudithook(hear)


def both(base: Path, world: int) -> Callable[[dict[str, Any]], None]:
    """What one process and two do alike, each step of 2 batches: SGD, then AdamW with class pictures."""
    accumulation = {"gradient_accumulation_steps": 2 // world}

    def work(told: dict[str, Any]) -> None:
        train_lora(**options(base, f"sgd-{world}", **accumulation, **SGD))
        out = base / f"adamw-{world}"
        watched(told, out)
        prior = {"class_prompt": "an owl", "num_class_images": 2, "max_train_steps": 10, "learning_rate": 0.01}
        train_lora(**options(base, out.name, **prior, **accumulation))

    return work


def shared(base: Path) -> Callable[[dict[str, Any]], None]:
    """Two processes with whole networks, then with shared ones."""

    def sharded(networks: Any, device: torch.device) -> None:
        networks = list(networks)
        shard_frozen(networks, device)
        held = [p for network in networks for p in network.parameters()]
        parts = sum(p.to_local().numel() for p in held if isinstance(p, DTensor))
        whole = sum(p.numel() for p in held if isinstance(p, DTensor))
        (base / f"parts-{os.environ['RANK']}.json").write_text(json.dumps({"parts": parts, "whole": whole}))

    ldm.training.lora.shard_frozen = sharded

    def work(told: dict[str, Any]) -> None:
        for out, fsdp in (("whole", False), ("sharded", True)):
            train_lora(**options(base, out, **SGD | HARD, fsdp=fsdp))

    return work


def one_told(base: Path) -> Callable[[dict[str, Any]], None]:
    """Two processes, of which one is told to stop."""

    def work(told: dict[str, Any]) -> None:
        if os.environ["RANK"] == "1":
            stop_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train_lora(**options(base, "stopped", **SGD, checkpointing_steps=2))

    return work


def stop_at(step: int, act: Callable[[], None]) -> None:
    """From now on something happens while a step is taken."""
    forward = ldm.training.lora.LoRADiffusion.forward

    def acting(self: Any, batch: Any, number: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            act()
        return forward(self, batch, number)

    calls = 0
    ldm.training.lora.LoRADiffusion.forward = acting  # type: ignore[method-assign]


def all_told(base: Path) -> Callable[[dict[str, Any]], None]:
    """A run with two processes that prepare batches; all three are sent SIGTERM in its third step."""

    def act() -> None:
        workers = [worker.pid for worker in multiprocessing.active_children()]
        (base / "workers.json").write_text(json.dumps(workers))
        os.killpg(0, signal.SIGTERM)

    def work(told: dict[str, Any]) -> None:
        os.setpgid(0, 0)
        stop_at(3, act)
        train_lora(**options(base, "all-told", **SHORT, dataloader_num_workers=2))

    return work


def begun(folder: str) -> Path:
    """What begins a process that forks others."""
    torch.set_num_threads(1)
    ldm.training.record.plot = lambda log, path: None  # half the time, otherwise
    return Path(folder)


def run_worlds(folder: str) -> None:
    """Runs in a process of its own; prints how each of those that it forks ended, and which states it left."""
    base, ends = begun(folder), dict[str, list[int]]()
    train_lora(**options(base, "unbroken", **SHORT))  # first: what it imports late, all others have
    ends["one"] = [end_of(forked(base / "one-0.json", both(base, 1)))]
    for name, work in {"two": both(base, 2), "shared": shared(base)}.items():
        ends[name] = [end_of(child) for child in pair(base, name, work)]
    told = forked(base / "told-0.json", all_told(base))
    ends["all-told"] = [end_of(told)]
    left = [path.name for path in states(base / "all-told")]
    train_lora(**options(base, "all-told", **SHORT))
    print(json.dumps({"ends": ends, "left": left}))


def run_stopped(folder: str) -> None:
    """Runs in a process of its own; prints how two that it forks ended, which states they left, and the refusal of one
    that is to go on with other numbers; then one goes on.
    """
    base = begun(folder)
    train_lora(**options(base, "before", **SHORT))  # what it imports late, all others have
    ends = [end_of(child) for child in pair(base, "stopped", one_told(base))]
    left = [path.name for path in states(base / "stopped")]
    refused = ""
    try:
        train_lora(**options(base, "stopped", **SGD))
    except LdmError as error:
        refused = str(error)
    train_lora(**options(base, "stopped", **SGD, gradient_accumulation_steps=2))
    print(json.dumps({"ends": ends, "left": left, "refused": refused}))


def told_by(work: str, base: Path) -> dict[str, Any]:
    """What a function of this file prints in a process of its own, and what those told that it forked."""
    code = f"import sys, test_world; test_world.{work}(sys.argv[1])"
    where = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    where["CUDA_VISIBLE_DEVICES"] = ""  # autograd has threads for each, which no fork survives
    command = [sys.executable, "-W", "ignore", "-c", code, str(base)]
    done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
    reports = {path.stem: json.loads(path.read_text()) for path in base.glob("*-[01].json")}
    assert done.returncode == 0, (done.stderr, reports)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | reports


@pytest.fixture(scope="module")
def worlds(base: Path) -> dict[str, Any]:
    return told_by("run_worlds", base)


def differ(one: Path, other: Path) -> float:
    """The largest difference of two files' tensors."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def adapter(base: Path, out: str) -> Path:
    return base / out / f"{out}.safetensors"


# -- everyday ----------------------------------------------------------------------------------------------------------


def test_two_processes_do_what_one_does(base: Path, worlds: dict[str, Any]) -> None:
    assert worlds["ends"]["one"] == [0] and worlds["ends"]["two"] == [0, 0], worlds
    assert differ(adapter(base, "sgd-1"), adapter(base, "sgd-2")) <= 1e-5
    assert max(float(v.abs().max()) for k, v in load_file(adapter(base, "sgd-2")).items() if "up" in k) > 1e-3
    logs = [rows_of(base / f"adamw-{world}" / "log.jsonl") for world in (1, 2)]
    curves = [[row["loss"] for row in rows] for rows in logs]
    assert len(curves[0]) == 10 and np.abs(np.subtract(*curves)).max() <= 1e-3
    assert logs[0][-1]["held_out_loss"] == pytest.approx(logs[1][-1]["held_out_loss"], rel=1e-3)


def test_they_see_the_same_samples(worlds: dict[str, Any]) -> None:
    one, first, second = (worlds[name]["batches"] for name in ("one-0", "two-0", "two-1"))
    assert sorted(map(int, one)) == list(range(20))
    assert {int(number) % 2 for number in first} == {0} and {int(number) % 2 for number in second} == {1}
    assert first | second == one


def test_the_main_process_alone_prepares_and_writes(base: Path, worlds: dict[str, Any]) -> None:
    assert worlds["two-1"]["encoded"] == 0 < worlds["two-0"]["encoded"] == worlds["one-0"]["encoded"]
    assert worlds["two-1"]["written"] == [] != worlds["two-0"]["written"]
    assert len(list((base / "adamw-2" / "class").glob("*.png"))) == 2
    assert len((base / "adamw-2" / "log.jsonl").read_text().splitlines()) == 10


@pytest.mark.slow  # 25 s; last run 2026-11-21, passed
def test_a_run_goes_on_with_another_number_of_processes(base: Path, worlds: dict[str, Any]) -> None:
    """Of one that SIGTERM to the second process had ended."""
    stopped = told_by("run_stopped", base)
    assert stopped["ends"] == [-signal.SIGTERM, -signal.SIGTERM], stopped
    assert stopped["left"] == ["state-2", "state-3"]
    said = r"batches_per_step 2, .* have 1 \(.*: 1 x 1\); go on with 2 of the latter, or give .* folder"
    assert re.fullmatch(rf"[^\n]*{said}", stopped["refused"])
    assert differ(adapter(base, "stopped"), adapter(base, "sgd-1")) <= 1e-5
    assert newest(base / "stopped") == base / "stopped" / "state-10"


def test_shared_networks_train_the_same(base: Path, worlds: dict[str, Any]) -> None:
    assert worlds["ends"]["shared"] == [0, 0], worlds
    assert differ(adapter(base, "whole"), adapter(base, "sharded")) <= 1e-5
    logs = [rows_of(base / out / "log.jsonl") for out in ("whole", "sharded")]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in logs[0]] == pytest.approx([row[name] for row in logs[1]], rel=1e-5)
    assert logs[0][-1]["held_out_loss"] == pytest.approx(logs[1][-1]["held_out_loss"], rel=1e-5)
    for rank in range(2):
        sizes = worlds[f"parts-{rank}"]
        assert 0.45 < sizes["parts"] / sizes["whole"] < 0.55
    for name in ("0000000.png", "0000003.png"):
        with Image.open(base / "whole" / "samples" / name) as a, Image.open(base / "sharded" / "samples" / name) as b:
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_what_all_processes_are_told_ends_the_run_after_its_step(base: Path, worlds: dict[str, Any]) -> None:
    """Its workers wait for its own word; then none is left, and it goes on bit for bit."""
    assert worlds["ends"]["all-told"] == [-signal.SIGTERM] and worlds["left"] == ["state-2", "state-3"]
    workers = json.loads((base / "workers.json").read_text())
    assert len(workers) == 2 and all(map(gone, workers))
    assert differ(adapter(base, "all-told"), adapter(base, "unbroken")) == 0


def gone(pid: int) -> bool:
    """Whether a process has ended, or does so when it next looks for its parent (every 5 seconds)."""
    for _ in range(1200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# -- real commands -----------------------------------------------------------------------------------------------------

ENDLESS = 100_000  # steps
COMMAND = [sys.executable, "-m", "ldm"]
LAUNCHED = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ldm"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                   "--main_process_port", "0", "-m", "ldm"],
}  # fmt: skip


def words(base: Path, out: str, steps: int, *more: str) -> list[str]:
    """The command's arguments that `options` stand for."""
    told = options(base, out, max_train_steps=steps)
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in told.items()]
    return ["train-lora", *(str(v[0] if isinstance(v, tuple) else v) for pair in pairs for v in pair), *more]


def started(base: Path, command: list[str]) -> "subprocess.Popen[str]":
    where = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=where, text=True, cwd=base, start_new_session=True, **pipes)


def ended(base: Path, command: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that ends by itself."""
    process = started(base, command)
    out, err = process.communicate()
    return process.returncode, out, err


def interrupted(base: Path, out: str, command: list[str], *acts: Callable[[int], None]) -> tuple[int, str, list[int]]:
    """What comes of a command that something happens to after two steps: exit code, stderr, its descendants then."""
    process, log = started(base, [*command, *words(base, out, ENDLESS, "--dataloader-num-workers", "2")]), base / out
    while process.poll() is None and not (
        (log / "log.jsonl").is_file() and len((log / "log.jsonl").read_text().splitlines()) > 1
    ):
        time.sleep(0.05)
    below = descendants(process.pid)
    for act in acts:
        act(process.pid)
    err = process.communicate()[1]
    return process.returncode, err, below


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *descendants(child))]


def signalled(number: int) -> Callable[[int], None]:
    return lambda pid: os.kill(pid, number)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_told_to_stop_goes_on(base: Path, number: int, code: int) -> None:
    """Bit for bit, as if it had not stopped; its workers end with it."""
    out = f"command-{number}"
    was, said, below = interrupted(base, out, COMMAND, signalled(number))
    assert was == code and all(map(gone, below)), said
    state = newest(base / out)
    assert state is not None and int(state.name.split("-")[1]) >= 3
    assert f"stopped; the same command goes on from step {state.name.split('-')[1]} ({state})" in said
    total = int(state.name.split("-")[1]) + 2
    was, path, said = ended(base, [*COMMAND, *words(base, out, total)])
    assert (was, path.strip()) == (0, str(adapter(base, out))), said
    assert ended(base, [*COMMAND, *words(base, f"{out}-unbroken", total)])[0] == 0
    assert differ(adapter(base, out), adapter(base, f"{out}-unbroken")) == 0


@pytest.mark.slow
def test_a_command_that_is_told_twice_stops_at_once(base: Path) -> None:
    """A step that takes forever cannot keep it; here the first signal is heeded before the second is sent."""
    wait = "import ldm.training.lora as l, time; l.LoRADiffusion.forward = lambda *a: time.sleep(1000); "
    command = [sys.executable, "-c", f"{wait}from ldm.cli import main; main()"]
    process = started(base, [*command, *words(base, "twice", ENDLESS)])
    while not (base / "twice" / "samples" / "0000000.png").is_file():
        time.sleep(0.05)
    for _ in range(2):
        time.sleep(2)
        process.terminate()
    process.communicate()
    assert process.returncode == -signal.SIGTERM
    assert newest(base / "twice") is None


@pytest.mark.slow
def test_a_command_whose_worker_is_killed_says_so(base: Path) -> None:
    was, said, below = interrupted(base, "lost", COMMAND, lambda pid: os.kill(children(pid)[0], signal.SIGKILL))
    assert was == 1 and all(map(gone, below))
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "a process that prepares batches was killed; the same command goes on from the last state" in line
    assert "Traceback" not in said


@pytest.mark.slow
def test_workers_do_not_outlive_their_command(base: Path) -> None:
    was, _, below = interrupted(base, "murdered", COMMAND, signalled(signal.SIGKILL))
    assert was == -signal.SIGKILL and len(below) == 2 and all(map(gone, below))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHED)
@pytest.mark.parametrize("place", [0, 1, None])
def test_told_in_one_process_both_stop(base: Path, launcher: str, place: int | None) -> None:
    """The main one, the other one, or the launcher, which tells all. They end with 143, or, where
    the launcher finds the other one gone, by its SIGTERM (-15); the launcher with 1.
    """
    out = f"{launcher}-{place}"

    def act(pid: int) -> None:
        os.kill(pid if place is None else sorted(children(pid))[place], signal.SIGTERM)

    was, said, below = interrupted(base, out, LAUNCHED[launcher], act)
    assert was == 1 and all(map(gone, below)), said
    state = newest(base / out)
    assert state is not None, said
    assert said.count("stopped; the same command goes on from step") == 1
    codes = re.findall(r"exitcode +: (-?\d+)", said)  # none where the launcher itself was told
    assert place is None or ("143" in codes and len(codes) == 2 and {*codes} <= {"143", "-15"}), said
    total = int(state.name.split("-")[1]) + 2
    was, path, said = ended(base, [*LAUNCHED[launcher], *words(base, out, total)])
    assert (was, path.strip()) == (0, str(adapter(base, out))), said  # told once, by the main process
    single = words(base, f"{out}-alone", total, "--gradient-accumulation-steps", "2")
    assert ended(base, [*COMMAND, *single])[0] == 0
    assert differ(adapter(base, out), adapter(base, f"{out}-alone")) <= 1e-5
    rows = [rows_of(base / name / "log.jsonl")[-1]["loss"] for name in (out, f"{out}-alone")]
    assert rows[0] == pytest.approx(rows[1], abs=1e-3)


@pytest.mark.slow
def test_a_process_that_loses_the_other_says_so(base: Path) -> None:
    was, said, below = interrupted(
        base, "alone", LAUNCHED["torchrun"], lambda pid: os.kill(sorted(children(pid))[0], signal.SIGKILL)
    )
    assert was == 1 and all(map(gone, below))
    assert "error: another process of this run ended" in said and "fault of ldm" not in said


@pytest.mark.slow
def test_launching_one_process_in_place_of_several_is_said(base: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "ldm"]
    was, _, said = ended(base, [*command, *words(base, "cpu", 1)])
    assert was == 0 and "accelerate launch --cpu starts one process" in said
    configured = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "2",
                  "--main_process_port", "0", "-m", "ldm"]  # fmt: skip
    was, _, said = ended(base, [*configured, *words(base, "cut", 1)])
    assert was == 1 and ("give --fsdp to the command" in said), said
