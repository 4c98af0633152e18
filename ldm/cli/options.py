"""Command-line options made from the fields of Request, so that the two cannot drift apart. Imports nothing heavy."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ldm.cli.common import number, whole
from ldm.cli.opening import NAMES, Opening, parameters
from ldm.errors import UsageError
from ldm.names import GRIDS, SAMPLERS, SPACINGS
from ldm.request import NOISE_SOURCES, PROFILES, SEAMLESS, Request, flag_of

NOT_HERE = ("output_type",)  # fields that a command which writes picture files has no use for
PANEL = "The picture"  # where help pages show the fields
KINDS: dict[type, tuple[str | None, Any]] = {
    int: ("N", whole()), float: ("NUMBER", number), str: ("TEXT", None), bool: (None, None)
}  # fmt: skip
NAMED = {  # fields whose values the shell completes; where it knows of none, it completes files
    "scheduler": SAMPLERS, "schedule_type": (*GRIDS, *SPACINGS), "profile": PROFILES, "noise_source": NOISE_SOURCES,
    "seamless": SEAMLESS, "fit": ("stretch", "crop", "pad"),
    "fill": ("original", "edge", "mirror", "smooth", "noise", "gray"),
}  # fmt: skip
FILES = {"image": "FILE", "mask_image": "FILE|SHAPE", "noise": "FILE"}  # fields that name files -> how help shows it

Size = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="WxH", help="pixels: 64x48, or 64 for a square; absent = the model's", rich_help_panel=PANEL
    ),
]

Wildcards = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="lists for __name__ in prompts; {red|blue} needs none")
]


def parameter_of(field: "Field[Any]", hint: Any) -> inspect.Parameter:
    """The command's parameter that stands for a field of Request; where the field takes a tuple, it may be repeated.
    None where nothing was typed, so that a configuration or a recipe keeps its say.
    """
    text = field.metadata["help"]
    kind, taken = taken_by(hint)
    metavar, parser = KINDS[kind]
    metavar = FILES.get(field.name, metavar)
    of = field.metadata["of"]
    panel = field.metadata["panel"] or (f"{PANEL}, of {of}" if of else PANEL)
    info: Any = typer.Option(
        flag_of(field), metavar=metavar, parser=parser, help=text, rich_help_panel=panel,
        autocompletion=completing(NAMED[field.name]) if field.name in NAMED else None,
    )  # fmt: skip
    if kind is bool:
        info = typer.Option(flag_of(field), help=text, rich_help_panel=panel)
    if field.name == "prompt":
        info = typer.Argument(metavar="PROMPT", help=f"{text}; - reads prompts from standard input, one a line")
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[taken, info]
    )


def taken_by(hint: Any) -> tuple[type, Any]:
    """Of a field's type that of one value, and what an option for it takes: several where the field is a tuple, None
    where nothing was typed.
    """
    kinds = get_args(hint) or (hint,)
    kind = next(kind for kind in kinds if kind in KINDS)
    several = get_origin(hint) is tuple or any(get_origin(kind) is tuple for kind in kinds)
    return kind, (list[kind] if several else kind) | None  # type: ignore[valid-type]  # made at run time


def completing(names: Iterable[str]) -> Callable[[str], list[str]]:
    """What tells the shell which of the names go on from what was typed."""

    def going_on(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return going_on


def with_request(command: Any, first: tuple[str, ...] = (), before_size: str = "height") -> inspect.Signature:
    """The signature of a command that takes, beside its own options, all fields of Request and of Opening as **given.

    first: its own options that stand right after the prompts.
    """
    hints = get_type_hints(Request)
    order = [parameter_of(field, hints[field.name]) for field in fields(Request) if field.name not in NOT_HERE]
    own = {p.name: p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD}
    at = [p.name for p in order].index(before_size)
    leading = [own.pop(name) for name in first]
    shown = [order[0], *leading, *order[1:at], own.pop("size"), *order[at:], *own.values()]
    return inspect.Signature([*shown, *parameters()])


def typed_fields(given: Mapping[str, Any], size: str | None) -> tuple[dict[str, Any], Opening]:
    """The fields of Request that were typed, and those of Opening. UsageError: a size that is none or said twice."""
    opening = Opening(**{name: given[name] for name in NAMES})
    typed = {n: value for n, value in given.items() if n not in NAMES and value is not None and value != []}
    chosen = {name: v[0] if isinstance(v, list) and len(v) == 1 else v for name, v in typed.items()}
    if size is None:
        return chosen, opening
    if "height" in chosen or "width" in chosen:
        raise UsageError("--size was given together with --height or --width; give one or the other")
    match = re.fullmatch(r"([+-]?\d{1,9})(?:[xX\u00d7]([+-]?\d{1,9}))?", size.strip())  # the last is the times sign
    if match is None:
        raise UsageError(f"size is {size!r}; it must be WIDTHxHEIGHT or one number of pixels, for example 64x64")
    return chosen | {"width": int(match[1]), "height": int(match[2] or match[1])}, opening
