"""`ldm edit` and `ldm invert`: drawing that begins with the noise that a picture comes from. What else is done with a
picture (--image, --mask, --extend) is `ldm generate`'s own.
"""

import inspect
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.common import free_name, printable, progress_bar, say, whole
from ldm.cli.generate import generate
from ldm.cli.opening import Opening, opened, with_opening
from ldm.cli.options import NAMED, completing
from ldm.cli.places import refuse_taken
from ldm.errors import LdmError, choose
from ldm.request import Request

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline

PROMPT = "what it shows; absent = the prompt of the recipe in it, if it carries one"
Picture = Annotated[str, typer.Argument(metavar="PICTURE", help="a picture, of ldm or of a camera")]


def edit(**given: Any) -> None:
    """Draw a picture anew that a prompt changes, from the noise that the picture comes from (DDIM inversion).

    --source says what the picture shows; where it is left out, the recipe in the picture does, if it carries one. The
    closer the prompt is to it, the less changes. Everything else is as of `ldm generate`.
    """
    if given["source_prompt"] is None:
        given["source_prompt"] = shown_in(given["image"], given["quiet"])
    generate(**given)


def shown_in(picture: str, quiet: bool) -> str:
    """The prompt of the recipe that a picture carries, which is said; "" where it has none."""
    from ldm.recipe import read

    try:
        prompt = str(read(os.path.expanduser(picture)).request.get("prompt", ""))
    except LdmError:
        return ""
    if prompt and not quiet:
        say(f"note: what the picture shows is its recipe's prompt, {printable(prompt)!r}")
    return prompt


def invert(
    picture: Picture,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help=PROMPT)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help=".safetensors file; absent = a free name in out/"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that is there, unasked")] = False,
    steps: Annotated[
        int | None, typer.Option(metavar="N", parser=whole(), help="steps from picture to noise; absent = 50")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="ddim or euler", autocompletion=completing(NAMED["scheduler"])),
    ] = None,
    convert_image: Annotated[
        bool, typer.Option("--convert-image", help="take pictures that are not of 8-bit RGB(A)")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="nothing on stderr but errors")] = False,
    **given: Any,
) -> None:
    """Write the noise that a picture comes from (DDIM inversion), and tell how well the picture is drawn back from it.

    `ldm generate --noise FILE --scheduler ddim --guidance 1` begins with it. The path goes to stdout.
    """
    words = shown_in(picture, quiet) if prompt is None else prompt
    path = output or free_name(Path("out", f"{Path(picture).stem}.safetensors"))
    choose("noise suffix", path.suffix.lower(), [".safetensors"])
    asked = Request(
        words, source_prompt=words, image=os.path.expanduser(picture), num_inference_steps=steps, guidance_scale=1.0,
        scheduler=scheduler, convert_image=convert_image, seed=0,
    )  # fmt: skip
    pipeline = opened(None, Opening(**given))
    order = pipeline.resolve(asked)
    refuse_taken([path], overwrite)
    told = {"path": str(path), **walked(pipeline, order, path, quiet)}
    if not quiet:
        say(
            f"drawn back from it, PSNR {told['psnr_round_trip']} dB to the picture as the autoencoder gives it back, "
            f"{told['psnr']} dB to the picture itself"
        )
        how = f"--steps {order.num_inference_steps} --size {order.width}x{order.height}"
        words, file = shlex.quote(printable(words or "...")), shlex.quote(printable(str(path)))
        say(f"ldm generate {words} --noise {file} --scheduler {order.scheduler} --guidance 1 {how}")
    print(json.dumps(told) if as_json else path)


def walked(pipeline: "Pipeline", order: Request, path: Path, quiet: bool) -> dict[str, Any]:
    """Write the noise of a resolved request, go on to draw with it, and compare: PSNR in dB."""
    from ldm.editing import canvas, ground_of, length
    from ldm.evaluation.reconstruction import psnr
    from ldm.images import to_tensor
    from ldm.noise_files import write_noise
    from ldm.recipe import digests, inputs_of

    parts, steps, size = pipeline.components, order.num_inference_steps or 0, (order.height or 0, order.width or 0)
    said = {
        "prompt": order.source_prompt, "steps": steps, "scheduler": order.scheduler,
        "model": digests(pipeline)["unet"], "inputs": inputs_of(order),
    }  # fmt: skip
    bar, step = progress_bar(quiet=quiet), None
    with bar:
        task = bar.add_task("inverting", total=length(order))
        for step in pipeline.sample(order):
            bar.advance(task)
            if step.index == steps - 1:  # the last that goes back; the next ones draw
                path.parent.mkdir(parents=True, exist_ok=True)
                write_noise(path, step.latents.cpu(), said)
                bar.update(task, description="drawing back")
    ground = ground_of(parts, pipeline.vae, order)
    assert step is not None and ground is not None  # there is a picture
    drawn, round_trip = pipeline.decode(step.latents, size), pipeline.decode(ground.image.mean, size)
    given = to_tensor([canvas(parts, order).seen])
    compared = {"psnr_round_trip": round_trip, "psnr": given}
    return said | {name: round(float(psnr(drawn.cpu(), to.cpu())), 2) for name, to in compared.items()}


invert.__signature__ = with_opening(invert)  # type: ignore[attr-defined]  # typer reads it
_IMAGE = inspect.Parameter("image", inspect.Parameter.KEYWORD_ONLY, annotation=Picture)
_REST = [p for name, p in inspect.signature(generate).parameters.items() if name != "image"]
edit.__signature__ = inspect.Signature([_IMAGE, *_REST])  # type: ignore[attr-defined]
