"""The one training loop. First stage, text encoder, denoiser and LoRA differ in the Stage they bring, and in nothing
else.
"""

import dataclasses
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from ldm.errors import LdmError, NumericalError, UsageError
from ldm.training.config import LoopConfig
from ldm.training.ema import EMA
from ldm.training.optimizers import RATES, Group, make_optimizer
from ldm.training.posthoc import Profiles
from ldm.training.record import Record
from ldm.training.state import load_state, newest, save_state
from ldm.training.world import agreed, averaged, common_state, joined, told_by_main

Batch = tuple[Any, ...]
"""What a step is made of: tensors, which are brought to the device, and other things, which are not."""
log = logging.getLogger(__name__)
RESULT = "result"  # the folder in a run's own that a stage of a new model is exported to
TROUBLE = {  # words of an exception, in lower case -> what it means, and what to do
    "dataloader worker": "a process that prepares batches was killed; the same command goes on from the last state, "
    "with fewer workers if memory was short",
    "gloo/transport": "another process of this run ended, and says why itself; the same command goes on from the last "
    "state",
    "allocate memory": "memory does not suffice; go on with gradient checkpointing, or begin anew with a lower batch "
    "size (and more accumulation), resolution or rank",
}
TROUBLE |= {"out of memory": TROUBLE["allocate memory"], "nccl": TROUBLE["gloo/transport"]}


class Objective(Protocol):
    """What is minimised: an nn.Module whose call gives the loss of batch `number` of the stream and figures to log."""

    def __call__(self, batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Stage:
    """One stage of the model's life, as the loop sees it."""

    objective: nn.Module  # an Objective; all its parameters that require gradients are trained
    model: nn.Module  # the part of the objective whose running average is the result
    batches: Dataset[Any]  # batches[i] depends on i alone, so that a resumed run sees the same ones
    held_out: Callable[[nn.Module], dict[str, float]]  # figures of the averaged model on fixed held-out data and noise
    picture: Callable[[nn.Module], Image.Image]  # what the averaged model draws now
    export: Callable[[nn.Module, Path], None]  # writes the result into the run's folder
    groups: Sequence[Group] = ()  # parameters with peak learning rates of their own; (): all, with the configured one
    spare: bool = False  # some of what is trained has no part in the loss: layers that are left out
    shared: bool = False  # networks are shared among the processes: all take part in held_out and picture
    base: str = ""  # a digest of the networks that it begins with


class Progress(NamedTuple):
    """What the loop tells after every step."""

    step: int  # steps done
    figures: dict[str, float]  # empty except every log_every steps and on saving: reading them waits for the device
    saved: Path | None  # the state written after this step, told in all processes
    stopped: int = 0  # the signal that ended the run after this step, its state saved; 0: none did
    preparing: str = ""  # before the first step: what is being made ready; `step` then counts how much of it is
    of: int = 0  # of how much


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, on the CPU: the same for any device, and after any interruption."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)  # torch's own heeds 32 bits alone


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that a first SIGTERM or SIGINT is put into while the block lasts; a second one acts at once.

    Outside the main thread, where Python takes no signals, it stays empty.
    """
    seen: list[int] = []
    kept: dict[int, Any] = {}

    def remember(number: int, frame: object) -> None:
        seen.append(number)
        for one, before in kept.items():
            signal.signal(one, before)

    if threading.current_thread() is threading.main_thread():
        kept |= {one: signal.signal(one, remember) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for one, before in kept.items():
            signal.signal(one, before)


def undisturbed(worker: int) -> None:
    """A process that prepares batches heeds its run alone, which ends it after its step: not Ctrl-C, nor what is sent
    to all processes of a job (by torchrun, a scheduler of clusters, systemd).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # where a signal says who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=heed, args=(os.getppid(),), daemon=True).start()


def heed(parent: int) -> None:
    """Wait for the parent's SIGTERM, and end this process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def explained() -> Iterator[None]:
    """LdmError with what to do, in place of torch's error where memory or a worker process gave out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = f"out of memory {error}" if isinstance(error, MemoryError) else str(error)
        meaning = next((text for words, text in TROUBLE.items() if words in said.lower()), None)
        if meaning is None:
            raise
        raise LdmError(f"{meaning} ({said.splitlines()[0]})") from error


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    parts = [part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in batch]
    made: Batch = batch._make(parts) if hasattr(batch, "_make") else tuple(parts)
    return made


def train(stage: Stage, c: LoopConfig, run: dict[str, Any], ema: EMA) -> Iterator[Progress]:
    """Train from the newest sound state in `c.out` (or from nothing) to `c.steps`; yields after every step.

    run: the whole configuration, kept in every state: a state of another configuration is refused. A step whose loss
    or gradient is not finite is left out and counted; NumericalError after c.max_skipped_steps of them, and the states
    already written are left as they are. SIGTERM and SIGINT end the run after the step, its state saved.
    """
    accelerator = accelerated(c, stage.spare)
    trained = [p for p in stage.objective.parameters() if p.requires_grad]
    groups = list(stage.groups) or [Group(trained, c.learning_rate)]
    optimizer = make_optimizer(c.optimizer, groups, c)
    ema.model.to(accelerator.device)
    objective, optimizer = accelerator.prepare(stage.objective, optimizer)
    profiles = Profiles(stage.model, c).to(accelerator.device)
    modules = {"objective": accelerator.unwrap_model(objective), "ema": ema.model, "profiles": profiles}
    # `passes` batches a step, made ahead by the workers. Process r of n takes every n-th.
    passes, n = c.gradient_accumulation_steps, accelerator.num_processes
    run = run | {"batches_per_step": passes * n}
    done, skipped = resumed(accelerator, c, modules, optimizer.optimizer, run)
    numbers = range(done * passes * n + accelerator.process_index, c.steps * passes * n, n)
    good, mean, stopped = True, torch.zeros(()), 0
    with stopping() as signals, explained():
        for index, (number, batch) in enumerate(ahead(stage.batches, numbers, c.workers), done * passes):
            step, rest = divmod(index, passes)
            for group, own in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = own.learning_rate * RATES[c.lr_scheduler](step, c)
            with accelerator.accumulate(objective):
                loss, figures = objective(moved(batch, accelerator.device), number)
                good = (good if rest else True) and math.isfinite(loss.detach())
                mean = loss.detach() / passes + (mean if rest else 0.0)
                accelerator.backward(loss)
                if rest + 1 < passes:
                    continue
                norm = accelerator.clip_grad_norm_(trained, c.max_grad_norm or math.inf)
                # In fp16 a gradient may overflow: the scaler leaves that step out, and scales the next ones down.
                good = good and (math.isfinite(norm) or c.mixed_precision == "fp16")
                bad, stopped = agreed(accelerator, not good, signals[0] if signals else 0)
                if not bad:
                    optimizer.step()
                optimizer.zero_grad()
            if bad:
                skipped += 1
                leave_out(accelerator, step + 1, skipped, c)
            elif (step + 1) % c.ema_every == 0:
                ema.update(step // c.ema_every)
            profiles.after(step + 1)
            last, logged, saved = step + 1 == c.steps, dict[str, float](), None
            saving = last or bool(stopped) or (step + 1) % c.save_every == 0
            if saving or (step + 1) % c.log_every == 0 or (step + 1) % c.sample_every == 0:
                logged = averaged(accelerator, figures | {"loss": mean, "grad_norm": norm})
                logged |= {"lr": optimizer.param_groups[0]["lr"], "skipped": skipped}
            if saving:
                whole = (modules, optimizer.optimizer, run, c.keep_states, {"skipped": skipped} | scaling(accelerator))
                saved = told_by_main(partial(save_state, Path(c.out), step + 1, *whole))
            progress = Progress(step + 1, logged, saved, 0 if last else stopped)
            if stopped:
                break
            yield progress
    if stopped:  # signals are again what they were
        yield progress


def ahead(batches: Dataset[Any], numbers: range, workers: int) -> Iterator[tuple[int, Batch]]:
    """These batches of the stream with their numbers, prepared by so many processes; 0: by this one, when asked."""
    loader = DataLoader(
        batches, batch_size=None, sampler=numbers, num_workers=workers, prefetch_factor=4 if workers else None,
        worker_init_fn=undisturbed,
    )  # fmt: skip
    return zip(numbers, loader, strict=True)


def accelerated(c: LoopConfig, spare: bool) -> Accelerator:
    """What makes one process or several of a run. spare: of a Stage. UsageError as of `joined`."""
    AcceleratorState._reset_state()  # a run before it in this process may have had another precision
    return Accelerator(
        cpu=joined(device_of(c.device, c.threads)).device.type == "cpu",
        mixed_precision=c.mixed_precision,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=spare)],
    )


def resumed(
    accelerator: Accelerator, c: LoopConfig, modules: dict[str, nn.Module], optimizer: Optimizer, run: dict[str, Any]
) -> tuple[int, int]:
    """Go on from the newest sound state, if there is one; -> steps done, and how many of them were left out."""
    found = common_state(Path(c.out), c.gradient_accumulation_steps)
    if found is None:
        return 0, 0
    done, kept = load_state(found, modules, optimizer, run)
    if accelerator.scaler is not None and "scaler" in kept:
        accelerator.scaler.load_state_dict(kept["scaler"])
    return done, int(kept["skipped"])


def scaling(accelerator: Accelerator) -> dict[str, Any]:
    """What a state keeps of the scaler of gradients in fp16."""
    return {} if accelerator.scaler is None else {"scaler": accelerator.scaler.state_dict()}


def leave_out(accelerator: Accelerator, step: int, skipped: int, c: LoopConfig) -> None:
    """Say that a step is left out; NumericalError when that has happened too often."""
    if skipped > c.max_skipped_steps:
        raise NumericalError(
            f"the loss or its gradient is not finite at step {step}"
            f"{f', for the {skipped}th time' * (skipped > 1)}; lower the learning rate and begin anew"
        )
    if is_main():
        log.warning("step %d is left out: its loss or gradient is not finite (%d so far)", step, skipped)
    if accelerator.scaler is not None:
        accelerator.scaler.update()  # it has looked at these gradients; without this it refuses to look at the next


def run_stage(stage: Stage, config: Any) -> Iterator[Progress]:
    """`recorded`, of a stage whose whole configuration, with its `loop`, must be the same when it goes on (but for FREE
    fields of `ldm.training.state`), and the networks that it begins with.
    """
    yield from recorded(stage, config.loop, json.loads(json.dumps(dataclasses.asdict(config))) | {"base": stage.base})


def recorded(stage: Stage, c: LoopConfig, run: dict[str, Any]) -> Iterator[Progress]:
    """`train`, keeping a log (JSONL), a loss curve and sample pictures in the run's folder, and at the end the
    result.
    """
    ema, state = EMA(stage.model, c.ema_decay), joined(device_of(c.device, c.threads))
    record = Record(Path(c.out), c.report_to) if state.is_main_process else None
    looks = record is not None or stage.shared
    begun, first = time.perf_counter(), None
    if c.sample_first and looks and newest(Path(c.out)) is None:
        drawn = stage.picture(ema.model)
        if record is not None:
            record.picture(0, drawn)
    for progress in train(stage, c, run, ema):
        first = progress.step - 1 if first is None else first
        looking = looks and (progress.step == c.steps or progress.step % c.sample_every == 0)
        rows = dict(progress.figures)
        if looking or (looks and progress.saved and not progress.stopped):
            rows |= {f"held_out_{k}": v for k, v in stage.held_out(ema.model).items()}
        if record is not None and rows:
            images = (progress.step - first) * c.batch_size * c.gradient_accumulation_steps * state.num_processes
            rows |= {"images_per_second": images / (time.perf_counter() - begun)}
            record.write(progress.step, rows)
            progress = progress._replace(figures=rows)
        image = stage.picture(ema.model) if looking else None
        if record is not None and image is not None:
            record.picture(progress.step, image)
        if progress.stopped:  # launchers end the others as soon as one has ended: not before this is written
            state.wait_for_everyone()
        yield progress
        if progress.stopped:
            return
    if record is not None:
        record.sheet()
        stage.export(ema.model, Path(c.out))


def is_main() -> bool:
    """Whether this is the process of a run that writes."""
    return bool(PartialState().is_main_process)


def device_of(device: str, threads: int = 0) -> torch.device:
    """The device a run asks for: "cpu", "cuda" or "auto". UsageError when it asks for CUDA and there is none.

    threads: of the CPU; 0 leaves torch's choice.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device is {device!r}; use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "cuda was asked for, but torch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    if name == "cpu":
        torch.set_flush_denormal(True)  # denormals make CPU convolutions many times slower
        if threads:
            torch.set_num_threads(threads)
    return torch.device(name)
