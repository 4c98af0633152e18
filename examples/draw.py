"""Draw a prompt from several seeds, and keep in each picture the recipe it can be drawn again from.

    python examples/draw.py out/draw "an owl on a yellow background" --seed 7
    ldm verify out/draw/7.png

The second line draws the picture again and compares every pixel.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import ldm
from ldm.images import save
from ldm.recipe import digests, recipe_of, texts


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, save, and say where."""
    parser = argparse.ArgumentParser(description="Draw a prompt from several seeds.")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("prompt", nargs="?", default="an owl on a yellow background")
    parser.add_argument("--seed", type=int, default=7, help="of the first picture; the next ones count up")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--steps", type=int, help="absent = the model's choice")
    chosen = parser.parse_args(arguments)

    pipeline = ldm.Pipeline.from_pretrained()
    request = ldm.Request(
        chosen.prompt, seed=chosen.seed, num_images_per_prompt=chosen.pictures, num_inference_steps=chosen.steps
    )
    result = pipeline(request)

    hashes = digests(pipeline)  # of the weights: taken once, they are the same for every picture
    chosen.out.mkdir(parents=True, exist_ok=True)
    for image, single in zip(result.images, result.request.singles(), strict=True):
        path = chosen.out / f"{single.seed}.png"
        save(image, path, texts(recipe_of(pipeline, single, hashes)))
        print(path)


if __name__ == "__main__":
    main()
