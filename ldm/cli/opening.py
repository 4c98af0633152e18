"""How a model is opened: options that every command which draws shares, and what a picture's recipe says of it."""

import inspect
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer

from ldm.adapters.strength import Strength, file_option
from ldm.cli.common import PANEL, Device, Dtype, Model, printable
from ldm.errors import LdmError, UsageError
from ldm.request import Request, flag_of

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
    lora: Annotated[
        list[Path] | None,  # which the shell completes
        _option(
            metavar="FILE[:STRENGTH]",
            help="a LoRA or another adapter, as strong as 0.8, te=0:unet=1, 0@0,1@0.5 ... says; may be repeated",
        ),
    ] = None
    lora_dir: Annotated[
        Path | None, _option(metavar="FOLDER", help="where <lora:NAME:STRENGTH> in a prompt finds NAME.safetensors")
    ] = None
    lora_partial: Annotated[
        bool, _option("--lora-partial", help="take what fits of an adapter that does not fit as a whole")
    ] = False
    fast: Annotated[
        bool, _option("--fast", help="in few steps and with a tiny decoder, of a model that has a fast mode")
    ] = False
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
    """The model with what was asked for beside it. Of a recipe come its device if there is one here, its type of
    numbers, its number of threads, for sums are taken in another order with another number, and how strong its adapters
    are; and it is opened in its fast mode if it was. LdmError: one of these was not given.
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
        fast=asked.fast or drawn_fast(recipe),
    )  # fmt: skip
    for path in asked.embedding or ():
        pipeline.load_textual_inversion(path, allow_pickle=asked.allow_pickle)
    _load_adapters(pipeline, recipe, asked)
    if recipe and pipeline.device.type == "cpu":
        torch.set_num_threads(min(recipe.threads, MOST_THREADS))
    return pipeline


def drawn_fast(recipe: "Recipe | None") -> bool:
    """Whether a picture was drawn in a model's fast mode."""
    return recipe is not None and any(row.get("fast") is True for row in recipe.adapters)


def _load_adapters(pipeline: "Pipeline", recipe: "Recipe | None", asked: Opening) -> None:
    """Load the adapters that were given, and those of a recipe: last, in its order, for so they are added up.

    One of a recipe is known by its sha256, whatever its file is called; a file of its name that was given stands in
    for it, as another model may, and as that of the model's own fast mode does.
    """
    from ldm.adapters.weights import Loaded

    if asked.lora_dir and not asked.lora_dir.is_dir():
        raise UsageError(f"--lora-dir {asked.lora_dir} is no folder; name the one that the adapters' files are in")
    pipeline.lora_dir = asked.lora_dir
    rows = [row for row in recipe.adapters if row.get("type") == "lora"] if recipe else []
    if not asked.lora and not rows:
        return
    weights = pipeline.components.weights
    load = partial(pipeline.load_lora, partial=asked.lora_partial, allow_pickle=asked.allow_pickle)
    given: dict[str, Strength | None] = dict.fromkeys(weights.loaded)
    for path, said in map(file_option, map(str, asked.lora or ())):
        given[load(path, said or Strength())] = said
    alike = {weights.loaded[name].adapter.sha256: name for name in given}
    found, taken = dict[str, Loaded](), set[str]()
    for row in rows:
        name, sha256, strength = (str(row.get(key, "")) for key in ("name", "sha256", "strength"))
        here = alike.get(sha256, name)
        if here not in given:
            load(_file_of(name, sha256, asked.lora_dir), name=name)
        found[name] = weights.loaded[here]._replace(strength=given.get(here) or Strength.parse(strength))
        taken |= {here, name}
    weights.loaded = {name: one for name, one in weights.loaded.items() if name not in taken} | found


def _file_of(name: str, sha256: str, folder: Path | None) -> Path:
    """The file of a recipe's adapter, in a folder or one below it. LdmError: it is not there."""
    from ldm.checkpoints.safe import file_sha256

    files = sorted(folder.rglob(f"{escape(name)}.safetensors")) if folder else ()
    if (found := next((file for file in files if file_sha256(file) == sha256), None)) is None:
        raise LdmError(
            f"the picture was drawn with the adapter {printable(name)!r} of sha256 {printable(sha256)}; give its file "
            f"with --lora, or with --lora-dir the folder that has it as {printable(name)}.safetensors"
        )
    return found


def without_unsaid(recipe: "Recipe", orders: Iterable[Request]) -> "Recipe":
    """The recipe without the adapters that its prompt names and the prompts of the orders do not."""
    from ldm.prompts import asked

    then, now = (
        {tag.name for order in each for tags in asked(order) for tag in tags}
        for each in ([Request(**recipe.request)], orders)
    )
    kept = (row for row in recipe.adapters if row.get("type") != "lora" or row.get("name") not in then - now)
    return replace(recipe, adapters=tuple(kept))


class Recorded(NamedTuple):
    """What a recipe says of a picture or of noise that it was given: the file is to be looked for."""

    name: str
    sha256: str


def recorded(recipe: "Recipe") -> dict[str, Any]:
    """The fields of a recipe's request, with a Recorded in the place of every file."""
    return recipe.request | {name: Recorded(recipe.request[name], digest) for name, digest in recipe.inputs.items()}


def with_files(order: Request, folder: Path) -> Request:
    """The request with every Recorded replaced by what is in the file of its name in `folder`, where the recipe's
    picture lies, or else in the current one. LdmError: there is none that holds what is recorded.
    """
    from ldm.recipe import INPUTS

    wanted = {name: value for name in INPUTS if isinstance(value := getattr(order, name), Recorded)}
    return replace(order, **{name: _found(order, name, one, folder) for name, one in wanted.items()})


def _found(order: Request, field: str, wanted: Recorded, folder: Path) -> Any:
    from ldm.inputs import source_of
    from ldm.noise_files import read_noise

    for path in (folder / wanted.name, Path(wanted.name)):
        if not os.path.isfile(path):
            continue
        with suppress(LdmError):  # another file of that name may be anything
            found = read_noise(path) if field == "noise" else source_of(path, field, order.convert_image)
            if found.sha256 == wanted.sha256:
                return found
    what, option = field.removesuffix("_image"), flag_of(Request.__dataclass_fields__[field])
    raise LdmError(
        f"it was drawn with the {what} {printable(wanted.name)!r} of sha256 {wanted.sha256[:10]}, and no file of that "
        f"name beside it or here holds that; name the file with {option}"
    )
