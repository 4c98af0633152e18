"""The judge of inpainting: a perfect painter scores 100 %, a careless one is seen, and the model in the box holds."""

import json
import random
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldm.cli.evaluate import scenes_of
from ldm.data.emoji import SIDES, CorpusConfig, EmojiScenes
from ldm.errors import UsageError
from ldm.evaluation.inpainting import Job, Report, evaluate, jobs
from ldm.evaluation.prompts import category_of, prompts, prompts_of
from ldm.pipeline import Pipeline
from ldm.sources import model_in_the_box


@pytest.fixture(scope="module")
def scenes(noto_font):
    return EmojiScenes(CorpusConfig(objects=16))


class Painter:
    """In a Pipeline's place: puts what its words name into the middle of the mask, on its ground, or draws all of it.

    careless: over everything. blind: nothing.
    """

    def __init__(self, scenes, careless=False, blind=False):
        self.scenes, self.careless, self.blind = scenes, careless, blind
        self.known = {spec.caption(): spec for spec in islice(prompts_of(scenes, "single object"), 40)}

    def __call__(self, words, seed, image=None, mask_image=None, **size):
        spec = self.known[words]
        if image is not None and self.blind:
            return SimpleNamespace(images=[image])
        truth = self.scenes.draw(spec, random.Random(seed)).image
        if image is None:
            return SimpleNamespace(images=[Image.fromarray(truth)])
        left, top, right, bottom = map(int, mask_image.removeprefix("box:").split(","))
        drawn = Image.fromarray(truth) if self.careless else image.copy()
        drawn.paste(tuple(truth[0, 0].tolist()), (left, top, right, bottom))
        sprite = self.scenes.sprite(spec.objects[0], round(SIDES[""] * drawn.width))
        drawn.paste(sprite, ((left + right - sprite.width) // 2, (top + bottom - sprite.height) // 2), sprite)
        if not self.careless:
            kept = np.asarray(image).copy()
            kept[top:bottom, left:right] = np.asarray(drawn)[top:bottom, left:right]
            drawn = Image.fromarray(kept)
        return SimpleNamespace(images=[drawn])


def test_jobs_are_fixed_and_replace_another_object_on_the_same_ground(scenes):
    found = jobs(scenes, 40)
    assert [job[0] for job in found[:7]] == [job[0] for job in jobs(scenes, 7)]
    singles = [spec for spec in prompts(scenes, 240) if category_of(spec) == "single object"]
    assert [spec for spec, _, _ in found] == singles[:40]
    for spec, before, (left, top, right, bottom) in found:
        assert before.spec.objects != spec.objects and before.spec.background == spec.background
        kept = np.ones(before.image.shape[:2], bool)
        kept[top:bottom, left:right] = False
        assert not (before.masks[0] & kept).any() and 0 <= left < right <= 64 and 0 <= top < bottom <= 64


def test_the_judge_tells_painters_apart(scenes, tmp_path):
    *rows, report = evaluate(Painter(scenes), scenes, 6, seed=3)
    assert all(isinstance(row, Job) for row in rows) and isinstance(report, Report) and report.rows == tuple(rows)
    assert [(row.index, row.total, row.seed) for row in rows] == [(i, 6, 3 + i) for i in range(6)]
    plain, replaced, ground, kept = report.scores()
    assert (plain.right, ground.right, kept.right) == (6, 6, 6) and replaced.right >= 5  # one may not fit the box
    assert replaced.target == pytest.approx(0.9)
    *_, blind = evaluate(Painter(scenes, blind=True), scenes, 6, seed=3)
    assert blind.scores()[1].right == 0 and blind.scores()[3].right == 6
    *_, careless = evaluate(Painter(scenes, careless=True), scenes, 6, seed=3)
    assert careless.scores()[3].right < 6
    report.save(tmp_path)
    read = json.loads((tmp_path / "inpainting.json").read_text())
    assert len(read["pictures"]) == 6 and read["scores"][3]["share"] == 1.0
    assert report.table().splitlines()[4].split()[-2:] == [">=", "100%"]
    with Image.open(tmp_path / "inpainting.png") as sheet:
        assert sheet.width > 6 * 128 and sheet.height > 2 * 128
    with pytest.raises(UsageError, match="at least one"):
        next(evaluate(Painter(scenes), scenes, 0))


@pytest.mark.slow
def test_the_model_in_the_box_replaces_objects(noto_font):
    """Issue 8, line 4. 100 jobs: 2026-11-21, two cores: 93.0 % (from words alone 95.0 %), every byte kept in 100."""
    *_, report = evaluate(Pipeline.from_pretrained(model_in_the_box()), scenes_of(None, None), 100)
    _, replaced, ground, kept = report.scores()
    assert replaced.share >= replaced.target and ground.share >= 0.98 and kept.share == 1
