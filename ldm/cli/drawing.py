"""Drawing a list of pictures with a bar or a live preview, each handed out as soon as it is done."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ldm.adapters.strength import Tag
from ldm.cli.common import printable, progress_bar, say, terminal
from ldm.prompts import asked
from ldm.recipe import inputs_of
from ldm.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import Pipeline

AT_ONCE = 8  # pictures in one network call on CUDA; the CPU draws one by one, so each is saved when it is done
MOST_FRAMES = 24  # of a run in a strip or an animation, the picture itself the last
PREVIEW_COLUMNS, PREVIEW_EVERY = 48, 0.25  # of the terminal; seconds between two pictures there


@dataclass(frozen=True)
class Drawn:
    """A finished picture."""

    request: Request  # of this one picture
    image: "Image"
    seconds: float  # its share of the time of its network calls
    frames: tuple["Image", ...]  # the estimates of it along the run, if they were asked for
    flagged: bool = False  # by the model's safety checker; the picture is black


def calls(pictures: Sequence[Request], at_once: int) -> Iterator[Request]:
    """Requests of at most `at_once` neighbouring pictures that may go through the networks together."""

    def shared(picture: Request) -> tuple[Request, list[tuple[Tag, ...]]]:
        plain = replace(picture, prompt=(), negative_prompt="", seed=None, variation_seed=None)
        files: dict[str, Any] = inputs_of(picture)  # they are compared by their digests
        return replace(plain, **files), asked(picture)  # one network has one set of adapters at a time

    for _, group in groupby(pictures, shared):
        alike = list(group)
        for rows in (alike[i : i + at_once] for i in range(0, len(alike), at_once)):
            own = {name: tuple(getattr(row, name) for row in rows) for name in ("prompt", "negative_prompt", "seed")}
            varied = tuple(row.variation_seed for row in rows) if rows[0].variation_strength else None
            yield replace(rows[0], **own, variation_seed=varied)  # type: ignore[arg-type]  # of single pictures


def preview_columns(picture: tuple[int, int], terminal: tuple[int, int]) -> int:
    """How wide a preview may be, so that it, the bar and a line above them fit. Sizes are (width, height); a line of
    the terminal is two pixels high.
    """
    (width, height), (columns, lines) = picture, terminal
    return max(1, min(PREVIEW_COLUMNS, columns, 2 * (lines - 2) * width // height))


def tell(notes: Iterable[str], said: set[str], quiet: bool) -> None:
    """Notes that were not yet `said`, which grows by them, on stderr; none if quiet."""
    for note in notes:
        if note not in said and not quiet:
            say(f"note: {printable(note)}")
        said.add(note)


def draw(
    pipeline: "Pipeline", pictures: Sequence[Request], frames: bool, preview: bool, quiet: bool
) -> Iterator[Drawn]:
    """The pictures in order. frames: keep the estimates of each along its run; preview: show them while they come;
    quiet: show no bar.
    """
    import torch
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from ldm.decoding import decoder_in
    from ldm.editing import length, pictures_of
    from ldm.images import to_pil
    from ldm.preview import chosen, fit_latent_to_rgb, half_blocks, preview_image

    at_once = AT_ONCE if pipeline.device.type == "cuda" else 1
    bar, watched = progress_bar(quiet=quiet), preview and terminal() and not quiet
    map_to_rgb = fit_latent_to_rgb(decoder_in(pipeline.vae, torch.float32)) if watched else None
    same = sys.stdout.isatty()  # then what goes there is shown above the picture, and not in the midst of it
    live = Live(bar, console=bar.console, transient=True, redirect_stdout=same) if watched else None
    with live or bar:
        task, done = bar.add_task("drawing", total=sum(map(length, pictures))), 0
        said = set[str]()
        for call in calls(pictures, at_once):
            n, kept = len(call.prompts), list[list["Image"]]()
            wanted = set(chosen(length(call), MOST_FRAMES)[:-1]) if frames else set[int]()  # the last is the picture
            name = f"picture {done + n} of {len(pictures)}" if len(pictures) > 1 else "drawing"
            bar.update(task, description=name)
            tell(pipeline.remarks(call), said, quiet)
            begun, shown, step = time.perf_counter(), 0.0, None
            for step in pipeline.sample(call):
                bar.advance(task, n)
                if step.index in wanted:
                    kept.append(to_pil(pipeline.finished(step.x0, call)[0]))
                if live and map_to_rgb is not None and time.perf_counter() - shown > PREVIEW_EVERY:
                    shown = time.perf_counter()
                    colour = not os.environ.get("NO_COLOR")
                    small = preview_image(step.x0[0], map_to_rgb)
                    art = half_blocks(small, preview_columns(small.size, bar.console.size), colour)
                    live.update(Group(Text.from_ansi(art), bar))
            assert step is not None  # a request has at least one step
            finished, flags, notes = pipeline.finished(step.latents, call)
            tell(notes, said, quiet)
            images = pictures_of(call, finished)
            seconds, done = (time.perf_counter() - begun) / n, done + n
            for i, (image, single) in enumerate(zip(images, call.singles(), strict=True)):
                yield Drawn(single, image, seconds, tuple(frame[i] for frame in kept), bool(flags) and flags[i])
