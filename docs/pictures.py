"""Draws the pictures of these pages into docs/pictures, with the model in the box and from mathematics.

    python docs/pictures.py              # all of them, some minutes
    python docs/pictures.py guidance     # one

Those of editing.md are what the commands on that page write. Sheets have 256 colours, so that all together stay small.
"""

import argparse
import io
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import ldm
from ldm.checkpoints.safe import atomic_bytes
from ldm.cli import main as ldm_command
from ldm.cli.schedulers import plot_levels
from ldm.diffusion import c_in
from ldm.grid import plot
from ldm.images import contact_sheet, grid, to_pil, to_tensor
from ldm.preview import chosen

HERE = Path(__file__).with_name("pictures")
PROMPT, SEED = "a penguin on a blue background", 7
SHOWN = ("ddpm", "ddim", "euler_a", "heun", "plms", "dpm++sde", "dpm++2m", "dpm++2m_karras", "unipc", "deis")

EDITING = Path(__file__).with_name("editing.md")
EDITS: dict[str, dict[str, str]] = {  # sheet -> files that the page about editing writes -> what stands under each
    "edit-image": {
        "taco.png": "the picture", "a-little.png": "a banana, strength 0.1", "much.png": "a banana, strength 0.8",
        "green.png": "on green, strength 0.6",
    },
    "edit-inpaint": {"taco.png": "the picture", "pizza.png": "a pizza in the box", "feathered.png": "its edge faded"},
    "edit-shapes": {"three.png": "the picture", "two-tacos.png": "two ellipses", "one-taco.png": "a polygon"},
    "edit-file": {"taco.png": "the picture", "object.png": "mask", "new-ground.png": "all but the mask"},
    "edit-alpha": {"cut.png": "the picture", "whole.png": "what was transparent"},
    "edit-soft": {
        "taco.png": "the picture", "ramp.png": "mask", "ramped.png": "a strength for each pixel",
        "half.png": "a mask of 0 and 1",
    },
    "edit-only": {"sheet.png": "the picture", "lost.png": "drawn as a whole", "found.png": "drawn alone"},
    "edit-resample": {"giraffe.png": "the picture", "once.png": "walked once", "five-times.png": "five times"},
    "edit-extend": {"taco.png": "the picture", "beside.png": "a hard edge", "blended.png": "grown and faded"},
    "edit-seamless": {
        "tile-four.png": "seamless", "decoded-apart-four.png": "decoded without", "no-tile-four.png": "without",
    },
    "edit-noise": {"taco.png": "the picture", "back.png": "from its noise", "from-its-noise.png": "other words"},
    "edit-words": {
        "taco.png": "the picture", "recoloured.png": "green, guidance 1", "overshot.png": "green, guidance 4",
        "redone.png": "a pizza, away from nothing",
    },
    "edit-variations": {"taco.png": "the picture", "varied-0.3.png": "strength 0.3", "varied-0.8.png": "strength 0.8"},
}  # fmt: skip


def keep(sheet: Image.Image, name: str) -> None:
    """Write a sheet as a PNG of 256 colours."""
    data = io.BytesIO()
    sheet.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
    atomic_bytes(HERE / f"{name}.png", data.getvalue())


def drawn(pipeline: ldm.Pipeline, **fields: object) -> Image.Image:
    """One picture of the prompt."""
    image: Image.Image = pipeline(PROMPT, **({"seed": SEED} | fields)).images[0]
    return image


def noise(pipeline: ldm.Pipeline, name: str) -> None:
    """A picture under growing noise, scaled as a network is shown it."""
    x0 = to_tensor([drawn(pipeline)])
    unit = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED))
    sigmas = (0.0, 0.15, 0.4, 1.0, 2.5, 6.0, 15.0)
    # Noise of unit variance does not fit into -1 ... 1; this much of it does, nearly.
    images = [to_pil(0.6 * c_in(sigma) * (x0 + sigma * unit))[0] for sigma in sigmas]
    keep(contact_sheet(images, [f"sigma {s:g}" for s in sigmas], len(sigmas)), name)


def autoencoder(pipeline: ldm.Pipeline, name: str) -> None:
    """A picture, its latent channels, and what is decoded from them."""
    picture = drawn(pipeline)
    with torch.inference_mode():
        latents = pipeline.vae.encode(to_tensor([picture]))
    channels = [to_pil((channel / 3).expand(1, 3, -1, -1))[0] for channel in latents[0]]
    images = [picture, *channels, *pipeline.pictures(latents)]
    labels = ["picture", *(f"channel {i}" for i in range(len(channels))), "decoded"]
    keep(contact_sheet(images, labels, len(images)), name)


def estimates(pipeline: ldm.Pipeline, name: str) -> None:
    """The estimates of x0 along a run."""
    steps = list(pipeline.sample(ldm.Request(PROMPT, seed=SEED)))
    row = [steps[i] for i in chosen(len(steps), 9)]
    images = [pipeline.pictures(step.x0)[0] for step in row]
    keep(contact_sheet(images, [f"after step {s.index + 1}" for s in row], len(row)), name)


def guidance(pipeline: ldm.Pipeline, name: str) -> None:
    """Guidance against seeds."""
    scales, seeds = (1, 2, 4, 7, 12), (7, 8, 9)
    cells = [drawn(pipeline, seed=seed, guidance_scale=scale) for seed in seeds for scale in scales]
    keep(plot(cells, [f"guidance {s}" for s in scales], [f"seed {s}" for s in seeds]), name)


def schedulers(pipeline: ldm.Pipeline, name: str) -> None:
    """Schedulers against steps."""
    counts = (5, 10, 20, 40)
    cells = [drawn(pipeline, scheduler=row, num_inference_steps=n) for n in counts for row in SHOWN]
    keep(plot(cells, list(SHOWN), [f"{n} steps" for n in counts]), name)


def variations(pipeline: ldm.Pipeline, name: str) -> None:
    """Variations of one seed by strength, at guidance 1, where the seed decides most."""
    strengths = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
    cells = []
    for seed in (1, 2):
        varied = [{"variation_strength": s, "variation_seed": seed} if s else {} for s in strengths]
        cells += [drawn(pipeline, guidance_scale=1, **fields) for fields in varied]
    keep(plot(cells, [f"strength {s:g}" for s in strengths], ["variation seed 1", "variation seed 2"]), name)


def fast(pipeline: ldm.Pipeline, name: str) -> None:
    """What the default and the fast mode draw of the same words and noise."""
    ways = {"20 steps": pipeline, "fast": ldm.Pipeline.from_pretrained(device="cpu", fast=True)}
    prompts = (
        "a fox on a blue background", "four tomatoes on a purple background", PROMPT,
        "an owl to the left of a pizza on a white background", "a tiger face on a yellow background",
    )  # fmt: skip
    cells = [way(prompt, seed=SEED).images[0] for way in ways.values() for prompt in prompts]
    keep(plot(cells, list(prompts), list(ways)), name)


def levels(pipeline: ldm.Pipeline, name: str) -> None:
    """The noise levels each scheduler visits."""
    plot_levels(HERE / f"{name}.png", 20, None)
    with Image.open(HERE / f"{name}.png") as figure:
        figure.load()
    keep(figure, name)


def carried_out(page: str, folder: Path) -> None:
    """Type every command of a page, and run its Python, in order, in a folder."""
    names: dict[str, Any] = {}
    with chdir(folder):
        for kind, text in re.findall(r"^```(sh|python)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
            if kind == "python":
                exec(compile(text, EDITING.name, "exec"), names)
                continue
            for line in text.replace("\\\n", " ").splitlines():
                try:
                    ldm_command(shlex.split(line)[1:])
                except SystemExit as end:
                    if end.code:
                        raise RuntimeError(f"this failed: {line}") from end


@cache
def written() -> dict[str, Image.Image]:
    """The pictures that the page about editing writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        carried_out(EDITING.read_text("utf-8"), Path(folder))
        return {path.name: Image.open(path).copy() for path in Path(folder).glob("*.png")}


def edited(pipeline: ldm.Pipeline, name: str) -> None:
    """Before and after, each side doubled."""
    images = [written()[file] for file in EDITS[name]]
    large = [image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST) for image in images]
    columns = 1 if max(image.width for image in large) > 256 else len(large)
    keep(grid(large, columns, padding=8, labels=list(EDITS[name].values())), name)


def fills(pipeline: ldm.Pipeline, name: str) -> None:
    """The sheet that `ldm grid` makes on that page."""
    keep(written()["fills.png"], name)


PICTURES: dict[str, Callable[[ldm.Pipeline, str], None]] = {
    "noise": noise, "autoencoder": autoencoder, "estimates": estimates, "guidance": guidance,
    "schedulers": schedulers, "variations": variations, "levels": levels, "fast": fast,
    **dict.fromkeys(EDITS, edited),
    "edit-fill": fills,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the pictures named, or all."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    names = parser.parse_args(arguments).names or list(PICTURES)
    pipeline = ldm.Pipeline.from_pretrained(device="cpu")
    HERE.mkdir(exist_ok=True)
    for name in names:
        PICTURES[name](pipeline, name)
        print(HERE / f"{name}.png", (HERE / f"{name}.png").stat().st_size)


if __name__ == "__main__":
    main()
