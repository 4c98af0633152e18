"""`ldm generate`: pictures from words. Its options are made from the fields of Request, so that they cannot drift."""

import errno
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.common import printable, say
from ldm.cli.opening import drawn_fast, opened, recorded, with_files, without_unsaid
from ldm.cli.options import Size, Wildcards, typed_fields, with_request
from ldm.cli.orders import Sources, gathered, singles
from ldm.cli.places import OUTPUT, paths_of, refuse_taken
from ldm.errors import LdmError, UsageError
from ldm.request import Request

if TYPE_CHECKING:
    from ldm.cli.drawing import Drawn
    from ldm.pipeline import Pipeline
    from ldm.recipe import Found, Recipe

FROM = "draw again what this picture's recipe says (of ldm, A1111 or ComfyUI); other options replace parts of it"
SET = "replace one field (seed=7, scheduler=euler_a), also of --config; may be repeated"
LOSSY = "what a mask keeps is kept to the byte only in a .png; this format changes every pixel a little"
RUN = {  # fields of a recipe that another run of the model has of its own: the fast mode chooses them
    "num_inference_steps", "nfe", "timesteps", "timestep_respacing", "sigmas", "scheduler", "schedule_type", "eta",
    "guidance_scale", "guidance_rescale", "guidance_start", "guidance_stop",
}  # fmt: skip
SHEET = "also write all pictures, their prompts below them, as this one; absent = not"
LOOKS = {"strip": ".strip.png", "gif": ".gif"}  # what is written beside a picture, and the end of its name


@dataclass(frozen=True)
class Manner:
    """How results are told and kept."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    metadata: bool = True
    strip: bool = False
    gif: bool = False
    preview: bool = False
    sheet: Path | None = None

    def tell(self, text: str) -> None:
        """One line for the person, unless they want none."""
        if not self.quiet:
            say(text)


def generate(
    *,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="PATH", help=OUTPUT)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that are there, unasked")] = False,
    size: Size = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="prompts, one a line; .jsonl: an object of any of these options a line"),
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="'a taco|on fire|at night': every combination of the parts")
    ] = False,
    wildcards: Wildcards = None,
    picture: Annotated[Path | None, typer.Option("--from", metavar="PICTURE", help=FROM)] = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file of these options")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
    strip: Annotated[
        bool, typer.Option("--strip", help="also write the way from noise to picture, as a strip")
    ] = False,
    gif: Annotated[bool, typer.Option("--gif", help="also write it as an animation")] = False,
    sheet: Annotated[Path | None, typer.Option("--sheet", metavar="FILE", help=SHEET)] = None,
    preview: Annotated[bool, typer.Option("--preview", help="show the picture in the terminal while it comes")] = False,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="write no recipe into the pictures")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a picture on stdout")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be drawn, and how, and stop")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="nothing on stderr but errors")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="also say how and how quickly it is drawn")] = False,
    **given: Any,
) -> None:
    """Draw pictures from words.

    Their paths go to stdout, one a line, their seeds to stderr: the same seed draws the same picture. Each carries its
    recipe. What is left out, the model chooses (its generation_config.json).
    """
    sources = Sources(picture, config, settings or (), prompts_file, matrix, wildcards)
    manner = Manner(as_json, quiet, verbose, not no_metadata, strip, gif, preview, sheet)
    found = recipe_in(picture, manner) if picture else None
    written = (recorded(found.recipe) if found.recipe else found.request) if found else {}
    typed, opening = typed_fields(given, size)
    hurried = opening.fast and not drawn_fast(found.recipe if found else None)
    written = {name: value for name, value in written.items() if not (hurried and name in RUN)}
    orders, beside = gathered(sources, written, typed)
    orders = [with_files(order, picture.parent) for order in orders] if picture else orders
    said = beside.pop("output", None)
    output = said if output is None else output
    opening = replace(opening, **{name: text for name, text in beside.items() if getattr(opening, name, None) is None})
    recipe = without_unsaid(found.recipe, orders) if found and found.recipe else None
    pipeline = opened(recipe, opening)
    if recipe and not (opening.model or opening.vae or opening.refiner):
        same = opened(recipe, replace(opening, dtype=None)) if opening.dtype else pipeline
        refuse_other_model(same, recipe, ("vae",) if hurried else ())
    pictures = singles([pipeline.resolve(order) for order in orders], sources, written)
    paths = paths_of(output, pictures)
    if dry_run:
        from ldm.cli.plan import plan

        print(plan(pipeline, pictures, paths, as_json))
        return
    refuse_taken(files_of(paths, manner), overwrite)
    carry_out(pipeline, pictures, paths, manner)


def carry_out(pipeline: "Pipeline", pictures: Sequence[Request], paths: Sequence[Path], manner: Manner) -> None:
    """Draw and keep the pictures. Ctrl-C keeps those that are done, and leaves with 130."""
    masked = any(one.mask_image is not None or one.extend is not None for one in pictures)
    lossy = [LOSSY] if masked and any(path.suffix.lower() != ".png" for path in paths) else []
    for note in (*pipeline.notes, *lossy):
        manner.tell(f"note: {note}")
    done: list[Path] = []
    try:
        write(pipeline, pictures, paths, manner, done)
    except KeyboardInterrupt:
        at = f"the next one's seed is {pictures[len(done)].seed}" if len(done) < len(paths) else "all of them"
        say(f"stopped: {len(done)} of {len(paths)} pictures are drawn and kept; {at}")
        raise typer.Exit(130) from None
    if manner.sheet:
        all_on(manner.sheet, paths, [one.prompts[0] for one in pictures])
        manner.tell(f"the sheet lies in {manner.sheet}")


def all_on(sheet: Path, paths: Sequence[Path], prompts: Sequence[str]) -> None:
    """Write the pictures of these files as one, as many columns as rows, eight at most."""
    from PIL import Image

    from ldm.images import contact_sheet, save

    images = [Image.open(path).convert("RGB") for path in paths]
    sheet.parent.mkdir(parents=True, exist_ok=True)
    save(contact_sheet(images, prompts, min(8, math.ceil(math.sqrt(len(images))))), sheet)


def recipe_in(picture: Path, manner: Manner) -> "Found":
    """The recipe a picture carries; what of it cannot be carried over is said."""
    from ldm.recipe import read

    found = read(picture)
    for note in found.notes:
        manner.tell(f"note: {printable(note)}")
    return found


def refuse_other_model(pipeline: "Pipeline", recipe: "Recipe", but: Sequence[str] = ()) -> None:
    """LdmError when the model, or its noise schedule, is not the one of a recipe. In another type of numbers the same
    model has other digests. but: components that may differ, as the VAE of a fast mode.
    """
    from ldm.recipe import digests, unequal

    now = digests(pipeline)
    for name, then in recipe.components.items():
        if now.get(name) != then and name not in but:
            raise LdmError(
                f"the picture was drawn by another model, {printable(recipe.model)!r}: its {name} is {then[:10]}, here "
                f"{now.get(name, 'none')[:10]}; name its folder with --model, or name any other to draw with that"
            )
    for name, here, there in unequal(pipeline.components.scheduler_config, recipe.scheduler):
        if not name.startswith("_"):
            raise LdmError(
                f"the picture was drawn with another noise schedule: {printable(f'{name} was {there}, here {here}')}; "
                "name its model's folder with --model, or name any other to draw with that"
            )


def beside_of(path: Path, manner: Manner) -> dict[str, Path]:
    """What is written beside a picture: strip and animation, by name."""
    return {name: path.with_name(path.stem + end) for name, end in LOOKS.items() if getattr(manner, name)}


def files_of(paths: Sequence[Path], manner: Manner) -> list[Path]:
    """All that is written for the pictures of these paths. UsageError: a sheet whose suffix is no picture's, or that
    would take the place of one of its pictures.
    """
    from ldm.images import format_of

    if manner.sheet:
        format_of(manner.sheet)
    beside = [each for path in paths for each in (path, *beside_of(path, manner).values())]
    if manner.sheet and manner.sheet.absolute() in {path.absolute() for path in beside}:
        raise UsageError(f"{manner.sheet} would be a picture and the sheet of all; choose another name for one of them")
    return [*beside, *([manner.sheet] if manner.sheet else [])]


def write(
    pipeline: "Pipeline", pictures: Sequence[Request], paths: Sequence[Path], manner: Manner, done: list[Path]
) -> None:
    """Draw and keep the pictures; `done` grows by each that is whole. LdmError: the disk is full."""
    from ldm.cli.drawing import draw
    from ldm.recipe import digests

    components = digests(pipeline) if manner.metadata or manner.json else {}
    if manner.verbose:
        manner.tell(f"{pipeline.components.name} on {pipeline.device}, {pipeline.dtype}")
    drawn = draw(pipeline, pictures, manner.strip or manner.gif, manner.preview, manner.quiet)
    for index, (path, one) in enumerate(zip(paths, drawn, strict=True)):
        try:
            keep(pipeline, one, path, manner, components)
        except (OSError, LdmError) as error:  # writing a file makes the second of the first
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise LdmError(
                f"the disk is full: {path} needs some {one.image.width * one.image.height * 3:,} bytes; "
                f"{len(done)} of {len(paths)} pictures are whole and kept, free some space for the rest"
            ) from error
        done.append(path)
        manner.tell(f"seed {one.request.seed}" + varied(one.request))
        if one.flagged:
            manner.tell(f"{path} is black: the model's safety checker flagged the picture")
        if manner.verbose:
            steps = one.request.num_inference_steps or 0
            manner.tell(f"{one.request.scheduler}, {steps} steps in {one.seconds:.2f} s, {steps / one.seconds:.1f}/s")
        print(line_of(index, path, one, manner, components) if manner.json else path, flush=True)


def keep(pipeline: "Pipeline", one: "Drawn", path: Path, manner: Manner, components: dict[str, str]) -> None:
    """Write a picture with its recipe, and the strip and animation asked for."""
    from ldm.checkpoints.safe import atomic_bytes
    from ldm.images import save
    from ldm.preview import animation, strip
    from ldm.recipe import recipe_of, texts

    text = texts(recipe_of(pipeline, one.request, components)) if manner.metadata else None
    path.parent.mkdir(parents=True, exist_ok=True)
    places = beside_of(path, manner)
    if "strip" in places:
        save(strip([*one.frames, one.image]), places["strip"], text)
    if "gif" in places:
        atomic_bytes(places["gif"], animation([*one.frames, one.image]))
    save(one.image, path, text)


def varied(request: Request) -> str:
    """ ", variation 5" of a picture that is one."""
    return "" if request.variation_seed is None else f", variation {request.variation_seed}"


def line_of(index: int, path: Path, one: "Drawn", manner: Manner, components: dict[str, str]) -> str:
    """A picture as one line of JSON."""
    from ldm.recipe import fields_of, inputs_of

    beside = {name: str(place) for name, place in beside_of(path, manner).items()}
    told = {"path": str(path), "index": index, "seconds": round(one.seconds, 3), "flagged": one.flagged, **beside}
    said = {"request": fields_of(one.request), "inputs": inputs_of(one.request), "components": components}
    return json.dumps(told | said)


generate.__signature__ = with_request(generate, ("output", "overwrite"))  # type: ignore[attr-defined]  # typer reads it
