"""`ldm generate`: pictures from words. Its options are made from the fields of Request, so that they cannot drift."""

import inspect
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ldm.cli.common import Device, Dtype, Model, free_name, number, progress_bar, refuse_unwritable, say, whole
from ldm.errors import UsageError, choose
from ldm.request import Request, make_request

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import Pipeline

NOT_HERE = ("output_type",)  # fields that a command which writes picture files has no use for
AT_ONCE = 8  # pictures in one network call on CUDA; the CPU draws one by one, so each is saved when it is done
KINDS: dict[type, tuple[str, Any]] = {int: ("N", whole()), float: ("NUMBER", number), str: ("TEXT", None)}
SLUG = 40  # characters of the prompt in a file's name
OUTPUT = "file (.png, .jpg, .webp), folder, or pattern with {index}, {seed}, {prompt}; absent = a free name in out/"


def flag_of(field: "Field[Any]") -> str:
    """The command-line flag of a field of Request: --steps, --guidance, -n."""
    name = field.metadata["flag"] or field.name.replace("_", "-")
    return f"-{name}" if len(name) == 1 else f"--{name}"


def parameter_of(field: "Field[Any]", hint: Any) -> inspect.Parameter:
    """The command's parameter that stands for a field of Request; where the field takes a tuple, it may be repeated."""
    kinds = get_args(hint) or (hint,)
    kind = next(kind for kind in kinds if kind in (int, float, str))
    several = any(get_origin(kind) is tuple for kind in kinds)
    text = field.metadata["help"]
    default: Any = None if several else field.default
    taken: Any = (list[kind] if several else kind) | None  # type: ignore[valid-type]  # made at run time
    metavar, parser = KINDS[kind]
    info: Any = typer.Option(flag_of(field), metavar=metavar, parser=parser, help=text)
    if field.name == "prompt":
        taken, info, default = list[str], typer.Argument(metavar="PROMPT", help=text), inspect.Parameter.empty
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[taken, info]
    )


def signature() -> inspect.Signature:
    """The command's: the prompts, where to put the pictures, the fields of Request, then what opens the model."""
    hints = get_type_hints(Request)
    order = [parameter_of(field, hints[field.name]) for field in fields(Request) if field.name not in NOT_HERE]
    own = {p.name: p for p in inspect.signature(generate).parameters.values() if p.kind is not p.VAR_KEYWORD}
    at = [p.name for p in order].index("height")
    return inspect.Signature([order[0], own.pop("output"), *order[1:at], own.pop("size"), *order[at:], *own.values()])


def generate(
    *,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="PATH", help=OUTPUT)] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="WxH", help="pixels: 64x48, or 64 for a square; absent = the model's"),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    **given: Any,
) -> None:
    """Draw pictures from words.

    Their paths go to stdout, one a line, their seeds to stderr: the same seed draws the same picture. What is left out,
    the model chooses (its generation_config.json).
    """
    request = request_of(given, size)
    from ldm.images import save
    from ldm.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype)
    order = pipeline.resolve(request)
    seeds = order.seeds(pipeline.count(order))
    prompts = [prompt for prompt in order.prompts for _ in range(order.num_images_per_prompt)]
    paths = paths_of(output, prompts, seeds)
    for path in paths:
        refuse_unwritable(path)
    for note in pipeline.notes:
        say(f"note: {note}")
    done = 0
    try:
        for path, seed, picture in zip(paths, seeds, draw(pipeline, order), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            save(picture, path)
            done += 1
            say(f"seed {seed}")
            print(path, flush=True)
    except KeyboardInterrupt:
        say(f"stopped: {done} of {len(paths)} pictures are drawn and kept; the next one's seed is {seeds[done]}")
        raise typer.Exit(130) from None


def request_of(given: dict[str, Any], size: str | None) -> Request:
    """The Request of what was typed. UsageError: a value out of range, or a size that is none or is said twice."""
    typed = {name: value for name, value in given.items() if value is not None and value != []}
    chosen = {name: v[0] if isinstance(v, list) and len(v) == 1 else v for name, v in typed.items()}
    if size is not None:
        if "height" in chosen or "width" in chosen:
            raise UsageError("--size was given together with --height or --width; give one or the other")
        match = re.fullmatch(r"([+-]?\d{1,9})(?:[xX\u00d7]([+-]?\d{1,9}))?", size.strip())  # the last is the times sign
        if match is None:
            raise UsageError(f"size is {size!r}; it must be WIDTHxHEIGHT or one number of pixels, for example 64x64")
        chosen |= {"width": int(match[1]), "height": int(match[2] or match[1])}
    return make_request(None, chosen)


def paths_of(output: str | None, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Where each picture goes: free names in a folder, or the file or pattern named, which are overwritten.

    UsageError: an unknown pattern or suffix, or one file for several pictures.
    """
    if output is None or output.endswith(("/", os.sep)) or os.path.isdir(output) or not re.search(r"[.{]", output):
        named: list[Path] = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            named.append(free_name(Path(output or "out", f"{slug(prompt)}-{seed}.png"), {*named}))
        return named
    from ldm.images import FORMATS

    try:
        rows = enumerate(zip(prompts, seeds, strict=True))
        found = [Path(output.format(index=i, seed=seed, prompt=slug(prompt))) for i, (prompt, seed) in rows]
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        known = "{index}, {seed} and {prompt}, for example 'out/{index:03}-{seed}.png'"
        raise UsageError(f"output is {output!r}; what may stand in braces is {known}") from None
    for path in found:
        choose("image suffix", path.suffix.lower(), FORMATS)
    if len(set(found)) < len(found):
        raise UsageError(
            f"{len(found)} pictures do not fit into {found[0]}; name a folder (out/) or a pattern (out/{{index}}.png)"
        )
    return found


def slug(prompt: str) -> str:
    """The words of a prompt as they may stand in a file's name."""
    return re.sub(r"\W+", "-", prompt.lower())[:SLUG].strip("-") or "picture"


def draw(pipeline: "Pipeline", order: Request) -> "Iterator[Image]":
    """The pictures of a resolved request, each as soon as it is done, with a progress bar on a terminal.

    Drawn in parts, which changes no picture: each comes from its own seed alone.
    """
    n, count, steps = order.num_images_per_prompt, pipeline.count(order), order.num_inference_steps or 0
    negatives = order.negative_prompts or ("",)
    seeds, at_once = order.seeds(count), AT_ONCE if pipeline.device.type == "cuda" else 1
    if count > at_once:  # a prompt that is too long is refused before the first picture is drawn, not after some
        for text in dict.fromkeys((*order.prompts, *negatives)):
            pipeline.encode([text], order.clip_skip)
    with progress_bar() as bar:
        task = bar.add_task("drawing", total=steps * count)
        for first in range(0, count, at_once):
            rows = range(first, min(first + at_once, count))
            part = replace(
                order,
                prompt=tuple(order.prompts[i // n] for i in rows),
                negative_prompt=tuple(negatives[i // n if len(negatives) > 1 else 0] for i in rows),
                num_images_per_prompt=1,
                seed=tuple(seeds[i] for i in rows),
            )
            bar.update(task, description=f"picture {rows[-1] + 1} of {count}" if count > 1 else "drawing")
            step = None
            for step in pipeline.sample(part):  # noqa: B007  # the last is wanted
                bar.advance(task, len(rows))
            assert step is not None  # a request has at least one step
            pictures = pipeline.pictures(step.latents)
            assert isinstance(pictures, list)  # the output type "pil"
            yield from pictures


generate.__signature__ = signature()  # type: ignore[attr-defined]  # what typer reads
