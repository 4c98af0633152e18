"""`ldm grid`: the same picture over two or three axes of settings, on labelled sheets."""

from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.common import free_name, say
from ldm.cli.opening import opened
from ldm.cli.options import Size, Wildcards, typed_fields, with_request
from ldm.cli.orders import Sources, at_home, singles
from ldm.cli.places import refuse_taken, slug
from ldm.errors import UsageError
from ldm.request import Request, make_request

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline

AXIS = "steps=5,10,20, guidance=1..7:2, scheduler=ddim,euler, seed=1..4, 'prompt=a taco|an owl' ..."
MOST_CELLS = 2500
Axis = tuple[str, list[Any]]
NONE: Axis = ("", [None])  # stands for an axis that is not asked for


def grid(
    *,
    x: Annotated[str, typer.Option("--x", metavar="AXIS", help=f"what changes from column to column: {AXIS}")],
    y: Annotated[str | None, typer.Option("--y", metavar="AXIS", help="... from row to row")] = None,
    z: Annotated[str | None, typer.Option("--z", metavar="AXIS", help="... from sheet to sheet")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="picture; absent = a free name in out/")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that are there, unasked")] = False,
    size: Size = None,
    wildcards: Wildcards = None,
    **given: Any,
) -> None:
    """Draw a picture with every combination of the values of two or three settings.

    One sheet, or one for each value of --z, with the values written beside rows and columns. All pictures have one
    seed unless seeds are an axis.
    """
    from ldm.grid import axes

    named = [NONE if text is None else axes(text) for text in (x, y, z)]
    fields = [name for name, _ in named if name]
    if len(set(fields)) < len(fields):
        raise UsageError(f"two axes go through {max(fields, key=fields.count)}; give different ones")
    if (count := prod(len(values) for _, values in named)) > MOST_CELLS:
        raise UsageError(f"these axes are {count} pictures; ask for at most {MOST_CELLS}")
    base, opening = typed_fields(given, size)
    first = {name: values[0] for name, values in named if name}
    varied = {name: max(values) for name, values in named if name == "variation_strength"}  # all have one other noise
    asked = make_request(None, at_home(first | base | varied))
    if asked.num_images_per_prompt > 1 or len(asked.prompts) > 1:
        raise UsageError("a cell is one picture; give one prompt and no -n, or make prompts or seeds an axis")
    pipeline = opened(None, opening)
    (base_order,) = pipeline.resolve(asked).singles()
    path = output or free_name(Path("out", f"grid-{slug(str(base_order.prompt))}.png"))
    sheets(pipeline, base_order, named, path, overwrite, Sources(wildcards=wildcards))


def sheets(
    pipeline: "Pipeline", base: Request, named: list[Axis], path: Path, overwrite: bool, sources: Sources
) -> None:
    """Draw and write the sheets, one for each value of the third axis."""
    from ldm.cli.drawing import draw
    from ldm.grid import layout, plot
    from ldm.images import format_of, save
    from ldm.recipe import digests, recipe_of, texts

    format_of(path)
    x, y, z = named
    for value in next((values for name, values in named if name == "scheduler"), []):
        pipeline.sampling(replace(base, scheduler=value))  # UsageError for one that is none
    columns, rows = ([labelled(name, value) for value in values] for name, values in (x, y))
    ends = [slug(labelled(z[0], value)) for value in z[1]]
    ends = ends if len(set(ends)) == len(ends) else [f"{i}-{end}" for i, end in enumerate(ends)]
    paths = [path.with_stem(f"{path.stem}-{end}") for end in ends] if z[0] else [path]
    refuse_taken(paths, overwrite)
    layout((base.width or 1, base.height or 1), columns, rows, str(base.prompt))
    for place, third in zip(paths, z[1], strict=True):
        rest = product(y[1], x[1])
        cells = [cell(base, {z[0]: third, y[0]: second, x[0]: value}) for second, value in rest]
        pictures = singles([pipeline.resolve(one) for one in cells], sources, {})
        drawn = [one.image for one in draw(pipeline, pictures, frames=False, preview=False, quiet=False)]
        said = {"prompt": str(pictures[0].prompt), z[0]: labelled(z[0], third), "seed": f"seed {base.seed}"}
        title = ", ".join(text for name, text in said.items() if text and name not in (x[0], y[0]))
        text = texts(recipe_of(pipeline, pictures[0], digests(pipeline)))
        place.parent.mkdir(parents=True, exist_ok=True)
        save(plot(drawn, columns, rows, title), place, {"parameters": text["parameters"]})  # of the first cell
        print(place, flush=True)
    say(f"seed {base.seed}")


def cell(base: Request, values: dict[str, Any]) -> Request:
    """The request of one cell: the values of the axes, those that there are, in place of the base's."""
    chosen = {name: value for name, value in values.items() if name}
    plain = not chosen.get("variation_strength", base.variation_strength)
    return replace(base, **chosen | ({"variation_seed": None} if plain else {}))


def labelled(name: str, value: Any) -> str:
    """What stands beside a row or column."""
    return f"{name.replace('_', ' ')} {value}" if name not in ("", "prompt") else str(value or "")


grid.__signature__ = with_request(grid, ("x", "y", "z", "output", "overwrite"))  # type: ignore[attr-defined]
