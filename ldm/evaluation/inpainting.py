"""Does inpainting put what it is told where the mask is, and touch nothing else? Judged as `alignment` judges.

for item in evaluate(pipeline, EmojiScenes()):   # a Job after every picture, then one Report
    ...
print(item.table())
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.emoji import EmojiScenes, Scene
from ldm.data.words import SceneSpec
from ldm.errors import UsageError
from ldm.evaluation.judging import Judge, Verdict
from ldm.evaluation.prompts import prompts_of
from ldm.evaluation.scores import Score, as_json, cells, save_report, table
from ldm.images import contact_sheet
from ldm.pipeline import Pipeline

MARGIN = 4  # pixels of the mask around the object's box: a person's box is not tight
ON_SHEET = 8  # jobs on the sample sheet, three pictures each
SHOWN = ("before", "replaced", "from words alone")
NEAR = 0.10  # how far the score may lie below that of pictures drawn from words alone


@dataclass(frozen=True)
class Job:
    """One picture whose object was replaced by another, beside the picture that the words alone give."""

    index: int
    total: int
    seed: int
    spec: SceneSpec  # what is to be there
    before: Scene  # a rendered scene of another object on the same background
    box: tuple[int, int, int, int]  # left, top, right, bottom of the mask
    image: NDArray[np.uint8]  # [S, S, 3]
    verdict: Verdict
    plain: NDArray[np.uint8]
    plain_verdict: Verdict

    @property
    def intact(self) -> bool:
        """Whether every byte outside the mask is that of the picture."""
        left, top, right, bottom = self.box
        same = (self.image == self.before.image).all(-1)
        same[top:bottom, left:right] = True
        return bool(same.all())


def jobs(scenes: EmojiScenes, n: int, seed: int = 0) -> list[tuple[SceneSpec, Scene, tuple[int, int, int, int]]]:
    """Fixed jobs "replace the object by X": X on a background, of the held-out prompts of `alignment` those of a single
    object, in their order; a rendered scene of another object on that background; and the box around that.
    """
    found = []
    for i, spec in enumerate(islice(prompts_of(scenes, "single object"), n)):
        rng = random.Random(f"replace {seed} {i}")
        other = rng.choice([name for name in scenes.names if name not in spec.objects])
        before = scenes.draw(SceneSpec((other,), spec.background), rng)
        (left, top, right, bottom), side = before.boxes[0], len(before.image)
        grown = (left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN)
        found.append((spec, before, tuple(min(max(edge, 0), side) for edge in grown)))
    return found  # type: ignore[return-value]  # four of four


def evaluate(pipeline: Pipeline, scenes: EmojiScenes, n: int = 100, seed: int = 0) -> Iterator["Job | Report"]:
    """Carry out n jobs, number i from noise seed `seed + i`, with the model's own settings, and draw the same words
    with the same seeds from nothing.

    Yields a Job after every one (for progress), and at the end one Report. UsageError for n < 1. LdmError when the
    emoji font is not found.
    """
    if n < 1:
        raise UsageError(f"{n} jobs were asked for; judge at least one")
    judge, rows = Judge(scenes), []
    for i, (spec, before, box) in enumerate(jobs(scenes, n)):
        words, shape = spec.caption(), "box:" + ",".join(map(str, box))
        drawn = (
            pipeline(words, seed=seed + i, image=Image.fromarray(before.image), mask_image=shape),
            pipeline(words, seed=seed + i, height=len(before.image), width=len(before.image)),
        )
        image, plain = (np.asarray(result.images[0]) for result in drawn)
        verdicts = judge.judge(image, spec), judge.judge(plain, spec)
        rows.append(Job(i, n, seed + i, spec, before, box, image, verdicts[0], plain, verdicts[1]))
        yield rows[-1]
    yield Report(tuple(rows))


@dataclass(frozen=True)
class Report:
    """The verdicts on a model's jobs."""

    rows: tuple[Job, ...]

    def scores(self) -> list[Score]:
        """What the pictures show, and what the same words show when they are drawn from nothing."""
        plain = Score.counted("from words alone: object right", [r.plain_verdict.objects[0] for r in self.rows])
        near, verdicts = max(0.0, plain.share - NEAR), [r.verdict for r in self.rows]
        return [
            plain,
            Score.counted("replaced: object right", [v.objects[0] for v in verdicts], near),
            Score.counted("replaced: background", [v.background for v in verdicts]),
            Score.counted("replaced: every byte outside the mask kept", [r.intact for r in self.rows], 1.0),
        ]

    def table(self) -> str:
        """The scores as text."""
        return table(cells(self.scores()))

    def to_dict(self) -> dict[str, object]:
        """Scores and every job's verdict, for JSON."""
        rows = [
            {"prompt": r.spec.caption(), "seed": r.seed, "replaces": r.before.names[0], "box": r.box,
             "object": r.verdict.objects[0], "background": r.verdict.background, "intact": r.intact,
             "object_from_words": r.plain_verdict.objects[0]}
            for r in self.rows
        ]  # fmt: skip
        return {"scores": as_json(self.scores()), "pictures": rows}

    def sheet(self, n: int = ON_SHEET) -> Image.Image:
        """The first n jobs in order, uncurated: the picture, what became of it, and what the words alone give."""
        images = [Image.fromarray(each) for r in self.rows[:n] for each in (r.before.image, r.image, r.plain)]
        words = [
            f"{what}: {caption}"
            for r in self.rows[:n]
            for what, caption in zip(SHOWN, (r.before.caption, r.spec.caption(), r.spec.caption()), strict=True)
        ]
        return contact_sheet(images, words, columns=2 * len(SHOWN))

    def save(self, folder: str | Path) -> None:
        """Write inpainting.json, inpainting.md and inpainting.png into a folder, each by rename."""
        save_report(Path(folder), "inpainting", self.to_dict(), cells(self.scores()), self.sheet())
