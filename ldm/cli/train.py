"""`ldm train`: the stages of a model's life, from nothing or from where they were stopped."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.cli.common import examples, needs, parse_settings, progress_bar, refuse_unwritable, say, terminal

if TYPE_CHECKING:
    from ldm.training.config import LoopConfig
    from ldm.training.loop import Progress

# command -> file and function of ldm.training that make the stage, and the class its configuration is read as
STAGES = {
    "first-stage": ("first_stage", "FirstStageConfig"),
    "clip": ("clip", "ClipConfig"),
    "denoiser": ("denoiser", "DenoiserConfig"),
}
TOLD_EVERY = 60.0  # seconds between two lines where no one watches a bar

Config = Annotated[Path, typer.Option("--config", metavar="FILE", help="YAML file of the run, as in configs/")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="replace a field of the file (loop.steps=10); may be repeated"),
]

Where = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda or auto; absent = the file's loop.device")
]


def stage_examples(name: str) -> str:
    """The Examples block of a stage's help page."""
    file = f"configs/cpu/{STAGES[name][0]}.yaml"
    again = f"ldm train {name} --config {file} --set loop.steps=10 --set loop.out=out/trial --device cpu"
    return examples(f"ldm train {name} --config {file}", again)


app = typer.Typer(
    help="Train a stage; the same command goes on where a run was stopped.",
    epilog=examples(*(f"ldm train {name} --config configs/cpu/{file}.yaml" for name, (file, _) in STAGES.items())),
)


@app.command("first-stage", epilog=stage_examples("first-stage"))
def first_stage(config: Config, settings: Settings = None, device: Where = None) -> None:
    """Train the autoencoder: pictures to latents and back."""
    run("first-stage", config, settings or [], device)


@app.command("clip", epilog=stage_examples("clip"))
def clip(config: Config, settings: Settings = None, device: Where = None) -> None:
    """Train the text encoder, contrastively with an image encoder."""
    run("clip", config, settings or [], device)


@app.command("denoiser", epilog=stage_examples("denoiser"))
def denoiser(config: Config, settings: Settings = None, device: Where = None) -> None:
    """Train the U-Net on the latents and texts of the two other stages, and put the model together."""
    run("denoiser", config, settings or [], device)


def run(name: str, config: Path, settings: list[str], device: str | None) -> None:
    """Train one stage from its newest state to its end, and tell how it goes. Exit code 130 when stopped by Ctrl-C."""
    needs("accelerate", "matplotlib")
    from ldm.training import config as kinds
    from ldm.training.loop import device_of, run_stage
    from ldm.training.state import states

    file, kind = STAGES[name]
    chosen = parse_settings(settings) | ({"loop.device": device} if device else {})
    asked = kinds.read_config(config, getattr(kinds, kind), chosen)
    c: LoopConfig = asked.loop
    # Before any work: threads of OpenMP, which come with the first work, inherit from here that denormals are flushed.
    where = device_of(c)
    out = Path(c.out)
    refuse_unwritable(out / "log.jsonl")
    first, state = newest(states(out))
    begins = f"goes on from step {first} of {c.steps} ({state})" if state else f"begins; {c.steps} steps"
    say(f"{name} {begins}; on {where}")
    say(f"states, samples, curve.png and log.jsonl go to {out}, the result to {out / 'result'}")
    try:
        with logged():
            stage = getattr(import_module(f"ldm.training.{file}"), file)(asked)
            follow(run_stage(stage, asked), name, first, c)
    except KeyboardInterrupt:
        step, state = newest(states(out))
        again = f"goes on from step {step} ({state})" if state else "begins anew, for no state was saved yet"
        say(f"stopped; the same command {again}")
        raise typer.Exit(130) from None
    say(f"{name} is done")
    print(out / "result")


@contextmanager
def logged() -> Iterator[None]:
    """What the package logs goes to stderr."""
    log, handler = logging.getLogger("ldm"), logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def newest(found: list[Path]) -> tuple[int, Path | None]:
    """The step and path of the last of a run's states; 0 and None when there are none."""
    return (int(found[-1].name.split("-")[1]), found[-1]) if found else (0, None)


def follow(steps: "Iterable[Progress]", name: str, first: int, c: "LoopConfig") -> None:
    """Let a run go its way, with a bar on a terminal, and a line now and then elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

    batch = c.batch_size * c.gradient_accumulation_steps
    loss, begun, told = "", time.monotonic(), time.monotonic()
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with progress_bar("{task.description}", BarColumn(), MofNCompleteColumn(), *times, "{task.fields[told]}") as bar:
        task = bar.add_task(name, total=c.steps, completed=first, told="")
        for progress in steps:
            now = time.monotonic()
            pace = (progress.step - first) * batch / max(now - begun, 1e-9)
            if progress.figures:
                loss = f"loss {progress.figures['loss']:.4f}, "
            bar.update(task, completed=progress.step, told=f"{loss}{pace:.1f} images/s")
            if progress.saved and terminal():
                bar.console.print(f"saved {progress.saved}", highlight=False)
            elif progress.saved or (now - told > TOLD_EVERY and not terminal()):
                left = timedelta(seconds=round((c.steps - progress.step) * batch / pace))
                saved = f"; saved {progress.saved}" if progress.saved else ""
                say(f"step {progress.step} of {c.steps}: {loss}{pace:.1f} images/s, {left} left{saved}")
                told = now
