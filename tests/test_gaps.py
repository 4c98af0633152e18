"""bench/gaps.py: the least error that a denoiser can have, against closed forms, and the model in the box beside it."""

import runpy
from itertools import islice
from pathlib import Path

import pytest
import torch

from ldm.cli.evaluate import scenes_of
from ldm.evaluation.prompts import prompts_of
from ldm.pipeline import Pipeline

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gaps() -> dict:
    return runpy.run_path(str(ROOT / "bench" / "gaps.py"))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9])
def test_the_best_answer_for_two_scenes_is_the_closed_form(gaps, alpha: float) -> None:
    """Of +-m with chances p and 1 - p it is m tanh(alpha <m, x> / beta^2 + logit(p) / 2)."""
    dice = torch.Generator().manual_seed(3)
    m, x = (torch.randn(2, 3, 3, generator=dice).double() for _ in range(2))
    chance, signal = torch.tensor([0.3, 0.7]).double(), torch.tensor(alpha).double()
    noise = (1 - signal.square()).sqrt()
    found = gaps["best"](x, signal, noise, torch.stack([m, -m]), chance)
    bent = torch.tanh(signal * (m * x).sum() / noise.square() + 0.5 * chance.logit()[0])
    torch.testing.assert_close(found, m * bent, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("noto_font")
@torch.inference_mode()
def test_no_model_beats_the_best_answer(gaps) -> None:
    """The model in the box errs more than it at every timestep, and it less the less noise there is."""
    pipeline = Pipeline.from_pretrained(str(ROOT / "weights"), dtype="float32")
    scenes = scenes_of(None, None)
    specs = list(islice(prompts_of(scenes, "large"), 6))
    latents, likely = gaps["meant"](scenes, specs[0], pipeline)
    assert latents.shape == (len(likely), 16, 8, 8) and len(likely) == 4 and float(likely.sum()) == pytest.approx(1)
    row = gaps["errors"](pipeline, scenes, specs)
    assert len(row) == len(gaps["TIMESTEPS"]) and all(least < error for error, least in row)
    assert [least for _, least in row] == sorted((least for _, least in row), reverse=True) and row[-1][1] < 1e-6
