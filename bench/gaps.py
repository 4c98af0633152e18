"""What a model in the box has not learned yet: its error of x0, look by look, beside the least that there can be.

    python bench/gaps.py weights
    python bench/gaps.py runs/box/denoiser/result -n 64

A caption leaves open where its object stands, and nothing else: the scenes that it can mean are few, so that the best
answer to noised latents, E[x0 | x_t] over those scenes, is known. What a denoiser errs beyond it is what it can still
learn of that look; guidance, steps and the judge have no part in it. Printed: a Markdown table of mean squared errors
per value of the latents, and in brackets the least.
"""

import argparse
import random
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.cli.evaluate import scenes_of
from ldm.data.emoji import EmojiScenes
from ldm.data.words import SceneSpec
from ldm.diffusion.losses import rates_at
from ldm.evaluation.prompts import LOOKS, prompts_of
from ldm.pipeline import Pipeline
from ldm.schedulers.config import network_of
from ldm.training.denoiser import words_of
from ldm.training.distill import Paths
from ldm.training.first_stage import to_signal

TIMESTEPS = (999, 850, 700, 500, 300)
DRAWN = 100  # times that a caption's scene is drawn, for its places and how often each comes


def meant(scenes: EmojiScenes, spec: SceneSpec, pipeline: Pipeline) -> tuple[Tensor, Tensor]:
    """Latents [k, C, H, W] of the scenes that a caption can mean, and how likely each is [k]."""
    images = np.stack([scenes.draw(spec, random.Random(i)).image for i in range(DRAWN)])
    found, often = np.unique(images, axis=0, return_counts=True)
    signal = to_signal(torch.from_numpy(found).permute(0, 3, 1, 2))
    return pipeline.vae.encode(signal), torch.from_numpy(often) / DRAWN


def best(xt: Tensor, alpha: Tensor, beta: Tensor, scenes: Tensor, likely: Tensor) -> Tensor:
    """E[x0 | x_t] [C, H, W] where x_t = alpha x0 + beta noise and x0 is one of `scenes`."""
    apart = (xt - alpha * scenes).flatten(1).square().sum(1)
    weights = (likely.log() - apart / (2 * beta.square())).softmax(0)
    return torch.einsum("k,kchw->chw", weights, scenes)


def errors(pipeline: Pipeline, scenes: EmojiScenes, specs: list[SceneSpec]) -> list[tuple[float, float]]:
    """(the denoiser's mean squared error of x0, the least) at each of TIMESTEPS."""
    words, paths = words_of(pipeline.components), Paths(*network_of(pipeline.components.scheduler_config))
    known = [meant(scenes, spec, pipeline) for spec in specs]
    dice = torch.Generator().manual_seed(0)
    x0 = torch.stack([latents[likely.multinomial(1, generator=dice)[0]] for latents, likely in known])
    noise = torch.randn(x0.shape, generator=dice)
    context = words.model(words.tokenizer([spec.caption() for spec in specs]).ids)[0]
    found = []
    for timestep in TIMESTEPS:
        t = torch.full((len(x0),), timestep)
        xt = paths.noised(x0, t, noise)
        said, _ = paths.estimates(xt, t, pipeline.unet(xt, t, context))
        alpha, beta = (rate.squeeze() for rate in rates_at(paths.schedule, t[:1], x0))
        least = torch.stack([best(x, alpha, beta, *one) for x, one in zip(xt, known, strict=True)])
        found.append((float((said - x0).square().mean()), float((least - x0).square().mean())))
    return found


@torch.inference_mode()
def main() -> None:
    """Print the table: rows are looks, columns are timesteps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model that was trained here, with its vocabulary.json")
    parser.add_argument("-n", type=int, default=48, help="captions of each look")
    args = parser.parse_args()
    scenes, pipeline = scenes_of(str(args.model), None), Pipeline.from_pretrained(str(args.model), dtype="float32")
    print(f"| error of x0 at timestep | {' | '.join(map(str, TIMESTEPS))} |\n|---|{'--:|' * len(TIMESTEPS)}")
    for look in ("single object", *LOOKS):
        row = errors(pipeline, scenes, list(islice(prompts_of(scenes, look), args.n)))
        print(f"| {look} | {' | '.join(f'{error:.3f} ({least:.3f})' for error, least in row)} |", flush=True)


if __name__ == "__main__":
    main()
