"""A run seen from outside: taken up again from a pickle, stopped early, counted, scheduled, joined; in bits."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.errors import UsageError
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.schedulers import SCHEDULERS, Step

pytestmark = pytest.mark.usefixtures("one_thread")
ORDER = {"prompt": "a taco on a red background", "seed": 5, "num_inference_steps": 6, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.from_pretrained(model, device="cpu")


def walked(pipeline: Pipeline, resume: Step | None = None, **fields: Any) -> list[Step]:
    return list(pipeline.sample(Request(**(ORDER | fields)), resume=resume))


def end(pipeline: Pipeline, **fields: Any) -> Tensor:
    return walked(pipeline, **fields)[-1].latents


RESUMED = {
    "ddim eta 1": {"scheduler": "ddim", "eta": 1.0},
    "one path": {"scheduler": "dpm++sde"},
    "multistep": {"scheduler": "unipc"},
    "a GPU's noise": {"scheduler": "euler_a", "noise_source": "gpu"},
    "a1111": {"scheduler": "DPM++ 3M SDE", "profile": "a1111", "eta_noise_seed_delta": 31337},
    "two pictures": {"scheduler": "dpm++2m_sde", "num_images_per_prompt": 2},
    "words that change": {"prompt": "a [taco:pizza:3] [on|by] red AND an owl :0.5"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_pickled_run_goes_on_with_the_same_bits(pipeline: Pipeline, name: str) -> None:
    whole = walked(pipeline, **RESUMED[name])
    for step in whole[:-1]:
        rest = walked(pipeline, resume=pickle.loads(pickle.dumps(step)), **RESUMED[name])
        assert [later.index for later in rest] == [later.index for later in whole[step.index + 1 :]]
        for later, before in zip(rest, whole[step.index + 1 :], strict=True):
            assert torch.equal(later.x, before.x) and torch.equal(later.x0, before.x0)
            assert (later.calls, later.sigma, later.state) == (before.calls, before.sigma, before.state)


def test_a_run_of_two_models_goes_on_in_either(model: Path) -> None:
    both = Pipeline(Pipeline.from_pretrained(model).components, Pipeline.from_pretrained(model))
    whole = walked(both, scheduler="euler_a", refiner_start=0.5)
    assert [step.index for step in whole] == list(range(len(whole)))
    for step in whole[:-1]:
        rest = walked(both, resume=pickle.loads(pickle.dumps(step)), scheduler="euler_a", refiner_start=0.5)
        assert torch.equal(rest[-1].x, whole[-1].x) and len(rest) == len(whole) - step.index - 1


def test_a_run_that_is_stopped_leaves_its_best_estimate(pipeline: Pipeline) -> None:
    whole = walked(pipeline)
    for step in pipeline.sample(Request(**ORDER)):
        if step.index == 3:
            break
    assert torch.equal(step.x0, whole[3].x0)
    (picture,) = pipeline.pictures(step.x0)
    assert picture.size == (16, 16)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_calls_are_counted_and_budgeted(pipeline: Pipeline, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nfe` spends no more network calls than it says, and no whole step fewer; Step.calls is what the U-Net says."""
    calls = 0
    forward = pipeline.unet.forward

    def counted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(*args)

    monkeypatch.setattr(pipeline.unet, "forward", counted)
    for nfe in (1, 7, 8):
        calls = 0
        order = pipeline.resolve(Request("a taco", seed=1, nfe=nfe, scheduler=name, guidance_scale=1.0))
        assert order.nfe is None and order.num_inference_steps
        (*_, last) = pipeline.sample(order)
        row = SCHEDULERS[name]
        assert calls == last.calls <= nfe
        assert calls == row.network_calls(order.num_inference_steps, to_zero=last.sigma == 0)
        assert row.network_calls(order.num_inference_steps + 1, to_zero=last.sigma == 0) > nfe


def test_steps_may_be_said_in_four_ways(pipeline: Pipeline) -> None:
    euler = {"scheduler": "euler", "num_inference_steps": None}
    times = end(pipeline, **euler, timesteps=(999, 600, 250.5))
    trained = pipeline.schedule
    by_level = end(pipeline, **euler, sigmas=tuple(float(trained.sigma(t)) for t in (998, 600, 250)))
    assert torch.equal(end(pipeline, **euler, timesteps=(998, 600, 250)), by_level)
    assert not torch.equal(times, by_level)
    plain = end(pipeline, scheduler="ddim", num_inference_steps=None, timestep_respacing="ddim10")
    listed = end(pipeline, scheduler="ddim", num_inference_steps=None, timesteps=tuple(range(900, -1, -100)))
    assert torch.equal(plain, listed)
    for more in ({"nfe": 3}, {"timesteps": (5, 3)}):
        with pytest.raises(UsageError, match="6 steps were asked for, and a run of"):
            walked(pipeline, **more)


def test_a_schedule_of_words_is_two_runs_joined(pipeline: Pipeline) -> None:
    """`[a:b:k]` is the run of a until step k, taken up as that of b; a share of the steps is the same."""
    first, second = ({"prompt": f"a {word} on red", "scheduler": "dpm++2m"} for word in ("taco", "pizza"))
    joined = walked(pipeline, resume=walked(pipeline, **first)[1], **second)[-1]
    for when in ("2", "0.34", ".4"):
        assert torch.equal(end(pipeline, prompt=f"a [taco:pizza:{when}] on red", scheduler="dpm++2m"), joined.latents)
    turns = walked(pipeline, prompt="a [taco|pizza] on red", scheduler="dpm++2m")
    step = None
    for i in range(6):
        step = walked(pipeline, resume=step, **(second if i % 2 else first))[0]
    assert step is not None and torch.equal(step.x, turns[-1].x)


@pytest.mark.parametrize("scheduler", ["DDIM", "PLMS"])
def test_the_words_last_in_runs_that_are_longer_than_was_asked(pipeline: Pipeline, scheduler: str) -> None:
    """Where the steps do not divide the schedule A1111's own samplers take more: 62 of the stride 1000 // 59 = 16."""
    how = {"scheduler": scheduler, "profile": "a1111", "num_inference_steps": 59, "guidance_scale": 1.0}
    first, second = (how | {"prompt": f"a {word} on red"} for word in ("taco", "pizza"))
    joined = walked(pipeline, resume=walked(pipeline, **first)[29], **second)  # A1111's acts are a step longer
    changing = walked(pipeline, **how | {"prompt": "a [taco:pizza:29] on red"})
    assert len(changing) == 62 and torch.equal(changing[-1].x, joined[-1].x)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
@pytest.mark.parametrize("part", [{"denoising_start": 0.5}, {"denoising_end": 0.5}])
def test_only_a_table_of_levels_is_shared_between_models(pipeline: Pipeline, name: str, part: dict[str, float]) -> None:
    there = Pipeline(replace(pipeline.components, scheduler_config={"_class_name": name}))
    assert there.resolve(Request("an owl", seed=1)).denoising_end == 1
    with pytest.raises(UsageError, match=r"denoising_start is .* this model has none, so leave both out"):
        there.resolve(Request("an owl", seed=1, **part))


def test_and_adds_the_directions_of_its_parts(pipeline: Pipeline) -> None:
    """Liu et al. 2022: x0 = negative + scale * sum_k weight_k * (part_k - negative), in the first step."""

    def x0(**fields: Any) -> Tensor:
        return walked(pipeline, **fields)[0].x0

    negative, owl, taco = (x0(prompt=text, guidance_scale=1.0) for text in ("dull", "an owl", "a taco"))
    expected = negative + 3 * (0.7 * (owl - negative) - 0.2 * (taco - negative))
    found = x0(prompt="an owl :0.7 AND a taco :-0.2", negative_prompt="dull")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    plain = walked(pipeline, prompt="an owl", negative_prompt="dull")
    both = walked(pipeline, prompt=["an owl :0.7 AND a taco :-0.2", "an owl"], seed=[5, 5], negative_prompt="dull")
    assert torch.equal(both[0].x0[:1], found)
    assert (both[-1].x[1] - plain[-1].x[0]).abs().max() <= 1e-5 * plain[-1].x.abs().max()


def test_noise_after_the_first_may_have_a_seed_of_its_own(pipeline: Pipeline) -> None:
    plain, moved = (walked(pipeline, scheduler="euler_a", eta_noise_seed_delta=delta) for delta in (0, 7))
    assert torch.equal(plain[0].x0, moved[0].x0) and not torch.equal(plain[0].x, moved[0].x)
    assert torch.equal(end(pipeline, eta_noise_seed_delta=7), end(pipeline))  # DDIM draws none


def test_remarks_say_what_is_not_read(pipeline: Pipeline) -> None:
    order = pipeline.resolve(Request("owl " * 40 + "unread", literal=True, seed=1))
    (remark,) = pipeline.remarks(order)
    assert "unread" in remark and "not read" in remark
    assert pipeline.remarks(replace(order, literal=False)) == ()
    assert pipeline(order).notes == (remark,)


@pytest.mark.parametrize("scheduler", ["dpm++2m", "dpm++3s", "unipc"])
def test_a_part_of_a_run_knows_of_the_whole(pipeline: Pipeline, scheduler: str) -> None:
    """What is done by the number of steps, as the lower order of the last, is done by that of the whole run."""
    whole = walked(pipeline, scheduler=scheduler, num_inference_steps=14)
    first = walked(pipeline, scheduler=scheduler, num_inference_steps=14, denoising_end=0.5)
    assert len(first) == 8 and [step.index for step in first] == list(range(8))
    for step, before in zip(first, whole, strict=False):
        assert torch.equal(step.x, before.x) and step.calls == before.calls
