"""The whole life of a model in about two minutes on two free cores: autoencoder, text encoder, denoiser, a picture.

    python examples/train_tiny.py out/tiny

It reads the configurations in configs/quick, which are those of the model in the box made small: ten objects, one a
scene, 32 pixels, narrow networks, few steps. What comes out mostly knows the colours of backgrounds, where an object
stands, and its rough shape. Needs the extra `train` and the Noto Color Emoji font. Run again, it goes on where it was
stopped, or only draws.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ldm
from ldm.images import contact_sheet
from ldm.training.clip import clip
from ldm.training.config import ClipConfig, DenoiserConfig, FirstStageConfig, read_config
from ldm.training.denoiser import denoiser
from ldm.training.first_stage import first_stage
from ldm.training.loop import run_stage

CONFIGS = Path(__file__).parents[1] / "configs" / "quick"
STAGES = (  # name, what makes the stage, and the class its file is read as
    ("first_stage", first_stage, FirstStageConfig),
    ("clip", clip, ClipConfig),
    ("denoiser", denoiser, DenoiserConfig),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the three stages and draw."""
    parser = argparse.ArgumentParser(description="Train a tiny model from nothing and draw with it.")
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--steps", type=int, help="of every stage, in place of its own number")
    chosen = parser.parse_args(arguments)
    for name, make, kind in STAGES:
        out = chosen.out / name
        changes: dict[str, Any] = {"loop.out": str(out), "loop.device": "cpu"}
        if chosen.steps:
            changes |= {"loop.steps": chosen.steps, "loop.warmup_steps": 1}
        before = [part for part, *_ in STAGES[: STAGES.index((name, make, kind))]]
        changes |= {part: str(chosen.out / part / "result") for part in before}
        if name == "denoiser":
            changes |= {"weights": ""} | ({"latents": 32 * chosen.steps} if chosen.steps else {})
        if (out / "result").is_dir():
            print(f"{name}: was trained before")
            continue
        config = read_config(CONFIGS / f"{name}.yaml", kind, changes)
        for progress in run_stage(make(config), config):
            if progress.figures:
                told = ", ".join(f"{key} {value:.3f}" for key, value in progress.figures.items())
                print(f"{name}: step {progress.step} of {config.loop.steps}, {told}")

    pipeline = ldm.Pipeline.from_pretrained(chosen.out / "denoiser" / "result", device="cpu")
    things, colours = ("an owl", "a taco"), ("red", "blue", "purple")
    prompts = [f"{thing} on a {colour} background" for colour in colours for thing in things]
    result = pipeline(prompts, seed=1)
    contact_sheet(result.images, prompts, columns=6).save(chosen.out / "drawn.png")
    print(chosen.out / "drawn.png")


if __name__ == "__main__":
    main()
