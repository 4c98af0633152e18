"""`ldm verify`: does a picture come out again as its recipe says, and if not, what differs."""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.common import Device, Dtype, Model, printable
from ldm.cli.opening import opened
from ldm.errors import LdmError, ModelError

if TYPE_CHECKING:
    from PIL import Image

VISIBLE = 8  # of 255: about the least difference that an eye sees on a plain ground


def verify(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="a picture that ldm drew")],
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="the verdict as a JSON object on stdout")] = False,
) -> None:
    """Draw a picture again from its recipe and compare.

    Exit code 0: every pixel is equal. 1: it is not, and stdout says how far it is off and what is not as it was: a
    component of the model, the device, the number of threads, a version.
    """
    from ldm.recipe import differences, digests, read, recipe_of
    from ldm.request import Request

    recipe = read(picture).recipe
    if recipe is None:
        raise LdmError(f"{picture} was not drawn by ldm; draw from its settings with: ldm generate --from {picture}")
    pipeline = opened(recipe, model, device, dtype)
    order = Request(**recipe.request)
    again = pipeline(order).images
    assert isinstance(again, list)  # the output type "pil"
    single = next(pipeline.resolve(order).singles())
    # In another type of numbers every network has another digest: the model is then opened as it was, to compare.
    asked = opened(recipe, model, device) if dtype else pipeline
    others = differences(recipe_of(pipeline, single, digests(asked)), recipe)
    verdict = compared(picture, again[0])
    if as_json:
        print(json.dumps({"path": str(picture), **verdict, "differences": others}))
    else:
        print("\n".join([sentence(verdict), *(f"- {printable(other)}" for other in others)]))
    raise typer.Exit(0 if verdict["equal"] else 1)


def compared(path: Path, again: "Image.Image") -> dict[str, Any]:
    """How a file's pixels differ from a picture's, which goes through the same format first."""
    import numpy as np
    from PIL import Image

    from ldm.images import FORMATS

    options = dict(FORMATS.values())
    data = io.BytesIO()
    with Image.open(path) as stored:  # by what it is, which its name may not say
        kind = str(stored.format)
        again.save(data, kind, **options[kind])
    with Image.open(path) as stored, Image.open(data) as fresh:
        if stored.size != fresh.size:
            return {"equal": False, "size": list(stored.size), "drawn": list(fresh.size)}
        try:
            a, b = (np.asarray(image.convert("RGB"), int) for image in (stored, fresh))
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
