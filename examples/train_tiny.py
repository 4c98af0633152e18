"""The whole life of a model in about two minutes on two free cores: autoencoder, text encoder, denoiser, a picture.

    python examples/train_tiny.py out/tiny

It reads the configurations that made the model in the box and makes them small: eight objects, one a scene, 32 pixels,
narrow networks, few steps. What comes out mostly knows the colours of backgrounds, where an object stands, and its
rough shape. Needs the extra `train` and the Noto Color Emoji font. Run again, it goes on where it was stopped, or only
draws.
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

CONFIGS = Path(__file__).parents[1] / "configs" / "cpu"
ALL = {  # fields of every stage's YAML file, and what is put in their place
    "corpus.size": 32, "corpus.objects": 4, "corpus.pairs": 0.0, "corpus.counts": 0.0, "corpus.sized": 0.0,
    "corpus.spread": 0.0, "corpus.wander": 0.0,
    "loop.batch_size": 16, "loop.warmup_steps": 20, "loop.workers": 0, "loop.log_every": 50, "loop.device": "cpu",
}  # fmt: skip
FIRST_STAGE = {
    "loop.steps": 450, "crops": 0, "disc_start": 10**6, "vae.block_out_channels": [16, 32, 32],
    "vae.layers_per_block": 1, "vae.norm_num_groups": 2, "vae.sample_size": 32, "vae.scaling_factor": 1.0,
}  # fmt: skip
CLIP = {
    "loop.steps": 150, "loop.batch_size": 64,
    "text.hidden_size": 64, "text.intermediate_size": 128, "text.num_hidden_layers": 2,
    "vision.hidden_size": 64, "vision.intermediate_size": 128, "vision.num_hidden_layers": 2, "vision.image_size": 32,
    "vision.projection_dim": 64,
}  # fmt: skip
DENOISER = {
    "loop.steps": 350, "loop.batch_size": 32, "loop.learning_rate": 0.002, "latents": 1600,
    "num_inference_steps": 10, "unet.sample_size": 8,
    "unet.block_out_channels": [32, 64], "unet.down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "unet.norm_num_groups": 8, "unet.cross_attention_dim": 64, "unet.num_heads": [2, 4],
    "unet.transformer_layers_per_block": [1, 1],
}  # fmt: skip
STAGES = (  # name, what makes the stage, the class its file is read as, and the fields above
    ("first_stage", first_stage, FirstStageConfig, FIRST_STAGE),
    ("clip", clip, ClipConfig, CLIP),
    ("denoiser", denoiser, DenoiserConfig, DENOISER),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the three stages and draw."""
    parser = argparse.ArgumentParser(description="Train a tiny model from nothing and draw with it.")
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--steps", type=int, help="of every stage, in place of its own number")
    chosen = parser.parse_args(arguments)
    for name, make, kind, small in STAGES:
        out = chosen.out / name
        changes: dict[str, Any] = {**ALL, **small, "loop.out": str(out)}
        if chosen.steps:
            changes |= {"loop.steps": chosen.steps, "loop.warmup_steps": 1}
        changes |= {"loop.save_every": changes["loop.steps"], "loop.sample_every": changes["loop.steps"]}
        if name == "denoiser":
            parts = {part: str(chosen.out / part / "result") for part in ("first_stage", "clip")}
            changes |= parts
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
