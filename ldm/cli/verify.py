"""`ldm verify`: does a picture come out again as its recipe says, is a folder as its manifest says, and if not, what
differs.
"""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.common import printable, progress_bar
from ldm.cli.opening import Opening, opened, recorded, with_files, with_opening
from ldm.cli.orders import at_home
from ldm.errors import LdmError, ModelError, UsageError

if TYPE_CHECKING:
    from PIL import Image

ELSE = "where it does not lie beside the picture or here"
VISIBLE = 8  # of 255: about the least difference that an eye sees on a plain ground


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="a picture that ldm drew, or a folder with manifest.sha256")
    ],
    write: Annotated[
        bool, typer.Option("--write", help="write the manifest of a folder that has none, as it is now")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the verdict as a JSON object on stdout")] = False,
    image: Annotated[str | None, typer.Option(metavar="FILE", help=f"the picture that was edited, {ELSE}")] = None,
    mask: Annotated[str | None, typer.Option(metavar="FILE", help=f"its mask, {ELSE}")] = None,
    noise: Annotated[str | None, typer.Option(metavar="FILE", help=f"the noise it began with, {ELSE}")] = None,
    **given: Any,
) -> None:
    """Draw a picture again from its recipe and compare, or compare the files of a folder with its manifest.

    Exit code 0: every pixel, or every file, is equal. 1: it is not, and stdout says how far a picture is off and what
    is not as it was (a component of the model, the device, the number of threads, a version); or which files of a
    folder are changed, missing or not in the manifest.
    """
    opening = Opening(**given)
    files = {"image": image, "mask_image": mask, "noise": noise}
    files = at_home({name: file for name, file in files.items() if file is not None})
    if path.is_dir():
        if opening != Opening() or files:
            raise UsageError(
                f"what says how a model is opened (--model, --device ...) or what was edited is for a picture; {path} "
                "is a folder"
            )
        raise typer.Exit(of_folder(path, write, as_json))
    if write:
        raise UsageError(f"--write is for a folder, and {path} is none")
    raise typer.Exit(of_picture(path, opening, files, as_json))


def of_folder(folder: Path, write: bool, as_json: bool) -> int:
    """Compare a folder with its manifest, or write that; the exit code."""
    from ldm.checkpoints.safe import MANIFEST, check_manifest, write_manifest

    there = (folder / MANIFEST).is_file()
    if write and there:
        raise UsageError(f"{folder} has a {MANIFEST}, to which it is compared without --write; remove it to write anew")
    if not write and not there:
        raise LdmError(
            f"{folder} has no {MANIFEST} to compare with; to have one of the folder as it is now: "
            f"ldm verify {folder} --write"
        )
    with progress_bar() as bar:
        bar.add_task("reading files", total=None)
        if write:
            write_manifest(folder)
        faults = {} if write else check_manifest(folder)
    files = len((folder / MANIFEST).read_text("utf-8").splitlines())
    if as_json:
        print(json.dumps({"path": str(folder), "equal": not faults, "files": files, "differences": faults}))
    elif write:
        print(f"written: {folder / MANIFEST} of {files} files")
    elif not faults:
        print(f"unchanged: {files} files")
    else:
        counts = Counter(faults.values())
        print(f"different: {', '.join(f'{count} {what}' for what, count in counts.items())}, of {files} files")
        print("\n".join(f"- {what}: {printable(name)}" for name, what in faults.items()))
    return int(bool(faults))


def of_picture(picture: Path, opening: Opening, files: dict[str, Any], as_json: bool) -> int:
    """Draw a picture again and compare; the exit code. files: fields of Request that are given, not looked for."""
    from ldm.recipe import differences, digests, read, recipe_of
    from ldm.request import Request

    recipe = read(picture).recipe
    if recipe is None:
        raise LdmError(f"{picture} was not drawn by ldm; draw from its settings with: ldm generate --from {picture}")
    asked_for = with_files(Request(**recorded(recipe) | files), picture.parent)
    pipeline = opened(recipe, opening)
    order = pipeline.resolve(asked_for)
    again = pipeline(order).images
    assert isinstance(again, list)  # the output type "pil"
    single = next(order.singles())
    # In another type of numbers every network has another digest: the model is then opened as it was, to compare.
    asked = opened(recipe, replace(opening, dtype=None)) if opening.dtype else pipeline
    others = differences(recipe_of(pipeline, single, digests(asked)), recipe)
    verdict = compared(picture, again[0])
    if as_json:
        print(json.dumps({"path": str(picture), **verdict, "differences": others}))
    else:
        print("\n".join([sentence(verdict), *(f"- {printable(other)}" for other in others)]))
    return 0 if verdict["equal"] else 1


def compared(path: Path, again: "Image.Image") -> dict[str, Any]:
    """How a file's pixels differ from a picture's, which goes through the same format first."""
    import numpy as np
    from PIL import Image

    from ldm.images import FORMATS, to_pil, to_tensor

    options = dict(FORMATS.values())
    data = io.BytesIO()
    with Image.open(path) as stored:  # by what it is, which its name may not say
        kind = str(stored.format)
        opaque = again if kind == "PNG" else to_pil(to_tensor([again]))[0]  # as `ldm.images.save` has it
        opaque.save(data, kind, **options[kind])
    with Image.open(path) as stored, Image.open(data) as fresh:
        if stored.size != fresh.size:
            return {"equal": False, "size": list(stored.size), "drawn": list(fresh.size)}
        try:
            a, b = (np.asarray(image.convert("RGBA"), int) for image in (stored, fresh))
        except (OSError, SyntaxError, ValueError) as error:  # a decoder's, at pixels that are damaged
            raise ModelError(f"the pixels of {path} cannot be read: {error}; the file is damaged") from error
    apart = np.abs(a - b).max(2)
    return {
        "equal": not apart.any(),
        "pixels": int((apart > 0).sum()),
        "visible": int((apart > VISIBLE).sum()),
        "of": apart.size,
        "largest": int(apart.max()),
    }


def sentence(verdict: dict[str, Any]) -> str:
    """The verdict in words."""
    if verdict["equal"]:
        return "equal: every pixel is as it was drawn"
    if "size" in verdict:
        (w, h), (x, y) = verdict["size"], verdict["drawn"]
        return f"different: the file is {w}x{h} pixels, the recipe draws {x}x{y}; the file was changed"
    share = 100 * verdict["pixels"] / verdict["of"]
    most = f"the largest by {verdict['largest']} of 255"
    return f"different: {share:.1f} % of the pixels ({verdict['visible']} of them visibly), {most}"


verify.__signature__ = with_opening(verify)  # type: ignore[attr-defined]  # typer reads it
