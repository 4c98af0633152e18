"""From one seed to another: pictures of the noises between them, as an animation.

    python examples/latents_between.py out/between --seeds 7 8

`latents` takes unit noise to begin with. Noise lies near a sphere, so the way between two follows the arc (slerp): on a
straight line it would be too weak in the middle. `ldm generate --variation-strength` does the same.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import ldm
from ldm.noise import slerp
from ldm.preview import animation, strip


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the frames and write them."""
    parser = argparse.ArgumentParser(description="Animate the way from one seed to another.")
    parser.add_argument("out", type=Path, help="folder of the animation")
    parser.add_argument("--prompt", default="an owl on a yellow background")
    parser.add_argument("--seeds", type=int, nargs=2, default=[7, 8])
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    chosen = parser.parse_args(arguments)

    pipeline = ldm.Pipeline.from_pretrained()
    side = pipeline.unet.config.sample_size  # of the latents
    shape = (1, pipeline.vae.config.latent_channels, side, side)
    first, last = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in chosen.seeds)
    shares = torch.linspace(0, 1, chosen.frames).tolist()
    result = pipeline(
        chosen.prompt,
        latents=torch.cat([slerp(first, last, share) for share in shares]),
        num_images_per_prompt=chosen.frames,
        num_inference_steps=chosen.steps,
        scheduler="ddim",  # draws no fresh noise: the picture is a function of the latents
    )
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "between.gif").write_bytes(animation([*result.images, *result.images[-2:0:-1]]))
    strip(result.images).save(chosen.out / "between.png")
    print(chosen.out / "between.gif", chosen.out / "between.png")


if __name__ == "__main__":
    main()
