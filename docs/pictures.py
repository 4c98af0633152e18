"""Draws the pictures of these pages into docs/pictures, with the model in the box and from mathematics.

    python docs/pictures.py              # all of them, about a minute
    python docs/pictures.py guidance     # one

Sheets are written with 256 colours, so that all together stay small.
"""

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

import ldm
from ldm.checkpoints.safe import atomic_bytes
from ldm.cli.schedulers import plot_levels
from ldm.diffusion import c_in
from ldm.grid import plot
from ldm.images import contact_sheet, to_pil, to_tensor
from ldm.preview import chosen

HERE = Path(__file__).with_name("pictures")
PROMPT, SEED = "a penguin on a blue background", 7
SHOWN = ("ddpm", "ddim", "euler_a", "heun", "plms", "dpm++sde", "dpm++2m", "dpm++2m_karras", "unipc", "deis")


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


def levels(pipeline: ldm.Pipeline, name: str) -> None:
    """The noise levels each scheduler visits."""
    plot_levels(HERE / f"{name}.png", 20, None)
    with Image.open(HERE / f"{name}.png") as figure:
        figure.load()
    keep(figure, name)


PICTURES: dict[str, Callable[[ldm.Pipeline, str], None]] = {
    "noise": noise, "autoencoder": autoencoder, "estimates": estimates, "guidance": guidance,
    "schedulers": schedulers, "variations": variations, "levels": levels,
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
