"""How a model is opened: options that every command which draws shares, and what a picture's recipe says of it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ldm.cli.common import PANEL, Device, Dtype, Model

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline
    from ldm.recipe import Recipe

MOST_THREADS = 256  # that a stranger's recipe may start


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=PANEL)


@dataclass(frozen=True)
class Opening:
    """What may be said of the model that is opened; the fields are options of commands, by their names."""

    model: Model = None
    device: Device = None
    dtype: Dtype = None
    vae: Annotated[str | None, _option(metavar="PATH", help="another autoencoder: a file or a folder")] = None
    refiner: Annotated[str | None, _option(metavar="MODEL", help="SDXL's refiner, which ends every run")] = None
    variant: Annotated[str | None, _option(metavar="NAME", help="of the weights files, for example fp16")] = None
    revision: Annotated[str | None, _option(metavar="NAME", help="of the hub's model: branch, tag or commit")] = None
    embedding: Annotated[
        list[Path] | None, _option(metavar="FILE", help="a learned word (textual inversion); may be repeated")
    ] = None
    allow_pickle: Annotated[
        bool, _option("--allow-pickle", help="also read .ckpt, .pt and .bin, in a guarded process")
    ] = False
    no_safety_checker: Annotated[
        bool, _option("--no-safety-checker", help="do not open the one that the model has")
    ] = False


NAMES = tuple(field.name for field in fields(Opening))
SAID = NAMES[: NAMES.index("embedding")]
"""Fields that a YAML file may say too; none of them lowers a guard."""


def parameters() -> list[inspect.Parameter]:
    """The fields of Opening as parameters of a command."""
    hints = get_type_hints(Opening, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(Opening)]


def with_opening(command: Callable[..., None]) -> inspect.Signature:
    """The signature of a command that takes, beside its own options, the fields of Opening as **given."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return inspect.Signature([*own, *parameters()])


def opened(recipe: "Recipe | None", asked: Opening) -> "Pipeline":
    """The model; of a recipe come its device if there is one here, its type of numbers, and its number of threads, for
    sums are taken in another order with another number.
    """
    import torch

    from ldm.pipeline import Pipeline

    device, dtype = asked.device, asked.dtype
    if recipe:
        there = recipe.device != "cuda" or torch.cuda.is_available()
        device, dtype = device or (recipe.device if there else None), dtype or recipe.dtype
    pipeline = Pipeline.from_pretrained(
        asked.model, device=device, dtype=dtype, vae=asked.vae, refiner=asked.refiner, variant=asked.variant,
        revision=asked.revision, allow_pickle=asked.allow_pickle, safety_checker=not asked.no_safety_checker,
    )  # fmt: skip
    for path in asked.embedding or ():
        pipeline.load_textual_inversion(path, allow_pickle=asked.allow_pickle)
    if recipe and pipeline.device.type == "cpu":
        torch.set_num_threads(min(recipe.threads, MOST_THREADS))
    return pipeline
