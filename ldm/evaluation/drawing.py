"""The pictures that are judged, and those that a perfect model would draw."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.data.emoji import EmojiScenes, Scene
from ldm.data.words import SceneSpec
from ldm.pipeline import Pipeline

AT_ONCE = 8  # pictures of a call; on the CPU they do not depend on it


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: `seed` is of the first one's noise, the next ones count up; None is the model's own.
    Guidance acts from `guidance_start` to `guidance_stop`, shares of the steps (0..1).
    """

    seed: int = 0
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_start: float = 0.0
    guidance_stop: float = 1.0


AS_IT_IS = Drawing()


def drawn(pipeline: Pipeline, specs: Sequence[SceneSpec], how: Drawing) -> Iterator[NDArray[np.uint8]]:
    """A picture [S, S, 3] of each spec, by its canonical caption; one after the other, drawn a few at a time."""
    for first in range(0, len(specs), AT_ONCE):
        part = specs[first : first + AT_ONCE]
        result = pipeline(
            [spec.caption() for spec in part],
            seed=tuple(range(how.seed + first, how.seed + first + len(part))),
            scheduler=how.scheduler,
            num_inference_steps=how.steps,
            guidance_scale=how.guidance,
            guidance_start=how.guidance_start,
            guidance_stop=how.guidance_stop,
        )
        yield from (np.asarray(image) for image in result.images)


def ground_truth(scenes: EmojiScenes, specs: Sequence[SceneSpec], seed: int | str = 0) -> list[Scene]:
    """A scene of the corpus for each spec: what a perfect model draws; others for another seed."""
    return [scenes.draw(spec, random.Random(f"ground truth {seed} {i}")) for i, spec in enumerate(specs)]
