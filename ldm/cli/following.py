"""How commands that train follow a run: what it logs, how far it is, and how it ended. Imports nothing heavy."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ldm.cli.common import progress_bar, say, terminal

if TYPE_CHECKING:
    from ldm.training.loop import Progress

TOLD_EVERY = 60.0  # seconds between two lines where no one watches a bar


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


def begins(name: str, folder: Path, steps: int, where: object) -> None:
    """Say where a run begins, or goes on from."""
    from ldm.training.state import newest

    state = newest(folder)
    how = f"goes on from step {_step(state)} of {steps} ({state})" if state else f"begins; {steps} steps"
    say(f"{name} {how}; on {where}")


def follow(steps: "Iterable[Progress]", name: str, total: int, batch: int, quiet: bool = False) -> "Progress | None":
    """Let a run go its way, with a bar on a terminal, and a line now and then elsewhere; -> the last it told.

    total: its steps. batch: pictures a step. quiet: say nothing, for another process of the run does.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), "{task.fields[told]}")
    tasks, last, loss, pace, told = dict[str, TaskID](), None, "", 0.0, time.monotonic()
    with progress_bar("{task.description}", *columns, quiet=quiet) as bar:
        for progress in steps:
            now, what, of = time.monotonic(), progress.preparing or name, progress.of or total
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of, told="")
                first, begun = progress.step, now
            elif not progress.preparing:
                pace = (progress.step - first) * batch / max(now - begun, 1e-9)
            if "loss" in progress.figures:
                loss = f"loss {progress.figures['loss']:.4f}, "
            rate = f"{loss}{pace:.1f} images/s" if pace else ""
            bar.update(tasks[what], completed=progress.step, told=rate)
            last = progress
            if quiet:
                continue
            if progress.saved and terminal():
                bar.console.print(f"saved {progress.saved}", highlight=False)
            elif progress.saved or (now - told > TOLD_EVERY and not terminal()):
                left = f", {timedelta(seconds=round((of - progress.step) * batch / pace))} left" if pace else ""
                saved = f"; saved {progress.saved}" if progress.saved else ""
                say(f"{progress.preparing or 'step'} {progress.step} of {of}{': ' * bool(rate)}{rate}{left}{saved}")
                told = now
    return last


def leave(last: "Progress | None", folder: Path, again: str = "the same command", quiet: bool = False) -> None:
    """Exit with 128 + the signal, as shells do, if one has stopped the run, whose last state is in the folder.

    again: what goes on with it.
    """
    if last is not None and last.stopped:
        tell_stopped(folder, again, quiet)
        raise typer.Exit(128 + last.stopped)


def tell_stopped(folder: Path, again: str = "the same command", quiet: bool = False) -> None:
    """Say from where a run that was stopped goes on."""
    from ldm.training.state import newest

    state = newest(folder)
    how = f"goes on from step {_step(state)} ({state})" if state else "begins anew, for no state was saved yet"
    if not quiet:
        say(f"stopped; {again} {how}")


def _step(state: Path | None) -> int:
    return int(state.name.split("-")[1]) if state else 0
