"""The one training loop. First stage, text encoder and denoiser differ in the Stage they bring, and in nothing else."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.errors import NumericalError, UsageError
from ldm.training.config import LoopConfig
from ldm.training.ema import EMA
from ldm.training.state import load_state, save_state, states

Batch = tuple[Tensor, ...]


class Objective(Protocol):
    """What is minimised: an nn.Module whose call gives the loss of batch number `step` and figures to log."""

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Stage:
    """One stage of the model's life, as the loop sees it."""

    objective: nn.Module  # an Objective; all its parameters that require gradients are trained
    model: nn.Module  # the part of the objective whose running average is the result
    batches: Dataset[Batch]  # batches[i] depends on i alone, so that a resumed run sees the same ones
    held_out: Callable[[nn.Module], dict[str, float]]  # figures of the averaged model on fixed held-out data and noise
    picture: Callable[[nn.Module], Image.Image]  # what the averaged model draws now
    export: Callable[[nn.Module, Path], None]  # writes the result into a folder


class Progress(NamedTuple):
    """What the loop tells after every step."""

    step: int  # steps done
    figures: dict[str, float]  # empty except every log_every steps and on saving: reading them waits for the device
    saved: Path | None  # the state written after this step


def learning_rate(step: int, c: LoopConfig) -> float:
    """Linear warm-up, then half a cosine from the peak down to final_share of it."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    done = (step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
    return c.learning_rate * (c.final_share + (1 - c.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, on the CPU: the same for any device, and after any interruption."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)  # torch's own heeds 32 bits alone


def train(stage: Stage, c: LoopConfig, run: dict[str, Any], ema: EMA) -> Iterator[Progress]:
    """Train from the newest state in `c.out` (or from nothing) to `c.steps`; yields after every step.

    run: the whole configuration, kept in every state: a state of another configuration is refused. Raises
    NumericalError when the loss is not finite; the states already written are left as they are.
    """
    accelerator = Accelerator(
        cpu=device_of(c).type == "cpu",
        mixed_precision=c.mixed_precision,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
    )
    trained = [p for p in stage.objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=c.learning_rate, betas=(0.9, c.beta2), weight_decay=c.weight_decay, fused=True
    )
    ema.model.to(accelerator.device)
    objective, optimizer = accelerator.prepare(stage.objective, optimizer)
    modules = {"objective": accelerator.unwrap_model(objective), "ema": ema.model}
    done = load_state(found[-1], modules, optimizer.optimizer, run) if (found := states(Path(c.out))) else 0

    # `passes` batches a step, made ahead by the workers. Process r of n takes every n-th.
    passes, n = c.gradient_accumulation_steps, accelerator.num_processes
    own = range(done * passes * n + accelerator.process_index, c.steps * passes * n, n)
    loader = DataLoader(
        stage.batches, batch_size=None, sampler=own, num_workers=c.workers, prefetch_factor=4 if c.workers else None
    )
    for index, batch in zip(range(done * passes, c.steps * passes), loader, strict=True):
        step, rest = divmod(index, passes)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        with accelerator.accumulate(objective):
            loss, figures = objective(tuple(part.to(accelerator.device, non_blocking=True) for part in batch), index)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                figures["grad_norm"] = accelerator.clip_grad_norm_(trained, c.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if rest + 1 < passes:
            continue
        if (step + 1) % c.ema_every == 0:
            ema.update(step // c.ema_every)
        last, logged, saved = step + 1 == c.steps, dict[str, float](), None
        saving = last or (step + 1) % c.save_every == 0
        if saving or (step + 1) % c.log_every == 0:
            logged = finite(loss, figures, step + 1, c)  # before saving: no state holds what came of such a loss
        if saving and accelerator.is_main_process:
            saved = save_state(Path(c.out), step + 1, modules, optimizer.optimizer, run, c.keep_states)
        yield Progress(step + 1, logged, saved)


def finite(loss: Tensor, figures: dict[str, Tensor], step: int, c: LoopConfig) -> dict[str, float]:
    """The figures of a step as numbers. NumericalError unless all are finite."""
    logged = {"loss": float(loss.detach()), **{name: float(value) for name, value in figures.items()}}
    # In fp16 a gradient may overflow: that step is left out, and the next one scaled down.
    bad = [k for k, v in logged.items() if not math.isfinite(v) and (k, c.mixed_precision) != ("grad_norm", "fp16")]
    if bad:
        raise NumericalError(
            f"{', '.join(bad)} not finite at step {step} ({logged}); lower the learning rate and go on from the last "
            "state"
        )
    return logged


def run_stage(stage: Stage, config: Any) -> Iterator[Progress]:
    """`train`, keeping a log (JSONL), a loss curve and sample pictures in the run's folder, and the result in
    `<out>/result`.
    """
    c: LoopConfig = config.loop
    out = Path(c.out)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    ema = EMA(stage.model, c.ema_decay)
    log = out / "log.jsonl"
    begun, first = time.perf_counter(), None
    for progress in train(stage, c, json.loads(json.dumps(dataclasses.asdict(config))), ema):
        first = progress.step - 1 if first is None else first
        last = progress.step == c.steps
        if progress.figures:
            images = (progress.step - first) * c.batch_size * c.gradient_accumulation_steps
            pace = images / (time.perf_counter() - begun)
            rows = {"step": progress.step, **progress.figures, "images_per_second": pace}
            if progress.saved:
                rows |= {f"held_out_{k}": v for k, v in stage.held_out(ema.model).items()}
            with log.open("a") as file:
                file.write(json.dumps({k: round(v, 6) for k, v in rows.items()}) + "\n")
        if last or progress.step % c.sample_every == 0:
            stage.picture(ema.model).save(out / "samples" / f"{progress.step:07}.png")
            plot(log, out / "curve.png")
        yield progress
    stage.export(ema.model, out / "result")


def plot(log: Path, path: Path) -> None:
    """The curves of a run's log, as a PNG; a resumed run's overlapping steps count once, the later one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in ("loss", "held_out_loss"):
        points = [(step, row[name]) for step, row in sorted(rows.items()) if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker="." if "held" in name else "")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def device_of(c: LoopConfig) -> torch.device:
    """The device a run asks for. UsageError when it asks for CUDA and there is none."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if c.device == "auto" else c.device
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device is {c.device!r}; use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "cuda was asked for, but torch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    if name == "cpu":
        torch.set_flush_denormal(True)  # denormals make CPU convolutions many times slower
        if c.threads:
            torch.set_num_threads(c.threads)
    return torch.device(name)
