"""The steps of a run in a loop of one's own: progress, a look at the estimate on the way, and stopping early.

    python examples/own_loop.py out/loop --steps 40

`Pipeline.sample` is a generator that yields a Step after each step. Nothing is called back; to stop, leave the loop.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import ldm
from ldm.preview import fit_latent_to_rgb, preview_image, strip


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw until the estimate stands still."""
    parser = argparse.ArgumentParser(description="Draw, look at every step, and stop when nothing changes any more.")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--prompt", default="an owl on a yellow background")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tolerance", type=float, default=0.03, help="a change of the estimate that counts as none")
    chosen = parser.parse_args(arguments)

    pipeline = ldm.Pipeline.from_pretrained()
    request = ldm.Request(chosen.prompt, seed=chosen.seed, num_inference_steps=chosen.steps)
    to_rgb = fit_latent_to_rgb(pipeline.vae)  # a linear map: small pictures of latents without the decoder
    looks, before = [], None
    for step in pipeline.sample(request):
        looks.append(preview_image(step.x0[0], to_rgb))
        change = float("inf") if before is None else float((step.x0 - before).norm() / step.x0.norm())
        print(f"step {step.index + 1} of {chosen.steps}: sigma {step.sigma:.3f}, the estimate changed by {change:.1%}")
        if change < chosen.tolerance:
            print("that is nothing; stopped")
            break
        before = step.x0

    # The estimate is clean whenever one stops; after the last step it is what step.latents are too.
    (picture,) = pipeline.pictures(step.x0)
    chosen.out.mkdir(parents=True, exist_ok=True)
    picture.save(chosen.out / "picture.png")
    strip(looks, height=64).save(chosen.out / "estimates.png")
    print(chosen.out / "picture.png", chosen.out / "estimates.png")


if __name__ == "__main__":
    main()
