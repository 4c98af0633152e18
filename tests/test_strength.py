"""The levels of image-to-image runs at every strength, and masks of strengths."""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from solving import SD15, UNIT, VE, ZERO_SNR, denoiser, field
from torch import Tensor

from ldm.diffusion import Levels
from ldm.diffusion.grids import GRIDS
from ldm.diffusion.spacing import SPACINGS
from ldm.diffusion.strength import freed, stronger, stronger_as_diffusers
from ldm.errors import LdmError, UsageError
from ldm.schedulers import SCHEDULERS, Sampling, from_config

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd": DDIM | SD15,
    "zero snr": DDIM | ZERO_SNR,
    "to sigma_min": {"_class_name": "PNDMScheduler", **SD15, "set_alpha_to_one": False},
    "edm": {"_class_name": "EDMEulerScheduler"},
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}
N = 20


ROWS = ("ddim", "euler", "dpm2", "dpm++2m", "deis", "lcm", "tcd")  # one of each way to lay out


def samplings(rows: Iterable[str], types: Iterable[str | None]) -> Iterator[tuple[str, Sampling]]:
    """These schedulers on every kind of schedule, with these spacings and as A1111 has it; each layout once."""
    seen = set()
    for (name, config), row, kind, a1111 in product(CONFIGS.items(), rows, types, (False, True)):
        try:
            sampling = from_config(config, row, schedule_type=kind, a1111=a1111)
            sampling.levels(N)
        except LdmError:
            continue
        key = (name, sampling.spacing, sampling.family or sampling.scheduler.family, sampling.discards)
        if key not in seen:
            seen.add(key)
            yield f"{name}, {row}, {kind}, {a1111}", sampling


MANY = [
    pytest.param(ROWS, (None, "karras"), id="some"),
    pytest.param(tuple(SCHEDULERS), (None, *SPACINGS, *GRIDS), id="all", marks=pytest.mark.slow),
]


def at(sampling: Sampling, strength: float, n: int = N) -> Levels:
    return stronger(sampling.levels(n), strength, sampling.schedule)


def test_they_are_what_diffusers_walks() -> None:
    """20 steps at strength 0.8 are its 25 at 0.8, where times go down evenly to the clean picture."""
    oracle = diffusers.DDIMScheduler(**SD15 | {"timestep_spacing": "trailing"})
    oracle.set_timesteps(25)
    pipeline = SimpleNamespace(scheduler=oracle)
    theirs, n = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, 25, 0.8, None)
    said = at(from_config(DDIM | SD15, schedule_type="trailing"), 0.8)
    assert n == N and said.timesteps == pytest.approx(theirs.tolist(), abs=1e-9)
    table = np.sqrt(1 / oracle.alphas_cumprod.double().numpy() - 1)
    np.testing.assert_allclose(said.sigmas[:-1], table[theirs], rtol=1e-5)


@pytest.mark.parametrize(("rows", "types"), MANY)
def test_every_level_rises_with_strength_from_the_end_to_the_run_itself(rows: Any, types: Any) -> None:
    strengths = [*np.linspace(0.01, 0.99, 50), 0.834, 0.836, 1 - 1e-9]
    for name, sampling in samplings(rows, types):
        for n in (1, N, 50):
            whole = longer(sampling, n)
            if whole is None or (np.diff(whole.sigmas[:-1]) >= 0).any() or whole.sigmas[0] == whole.sigmas[-1]:
                continue  # levels beyond a flow's range (Align Your Steps), or one step of no length (deis on EDM)
            assert stronger(whole, 1.0, sampling.schedule) is whole
            runs = np.array([np.arctan(at(sampling, float(s), n).sigmas) for s in sorted(strengths)])
            assert (np.diff(runs[:, 0]) > 0).all() and (np.diff(runs, axis=0) >= -1e-12).all(), (name, n)
            assert np.abs(runs[-1] - np.arctan(whole.sigmas)).max() < 1e-6, (name, n)
            assert np.diff(runs, axis=0).max() < 0.15, (name, n)  # radians: no jump


def longer(sampling: Sampling, n: int) -> Levels | None:
    try:
        return sampling.levels(n)
    except UsageError:
        return None


@pytest.mark.parametrize(("rows", "types"), MANY)
def test_every_strength_makes_all_steps_at_levels_that_fall(rows: Any, types: Any) -> None:
    for name, sampling in samplings(rows, types):
        whole = sampling.levels(N)
        if (np.diff(whole.sigmas[:-1]) >= 0).any():
            continue  # Align Your Steps on flow matching: levels of another schedule, beyond this one's range
        still = whole.sigmas[-1] > whole.sigmas[-2] * (1 - 1e-9)  # the run's own last step may have no length
        for strength in (0.0, 1e-3, 0.0123, 0.0201, 0.3, 0.499999, 0.77, 0.834, 0.9999, 1):
            said = at(sampling, strength)
            assert len(said.timesteps) == len(said.sigmas) - 1 == len(whole.timesteps), (name, strength)
            assert strength == 1 or said.start == said.sigmas[0]
            gaps, told = -np.diff(said.sigmas), np.array(said.timesteps)
            assert (gaps[:-1] > 0).all() and (gaps[-1] > 0 or (still and gaps[-1] > -1e-12)), (name, strength)
            assert (np.diff(told) <= 1e-9).all(), (name, strength)
            if not name.startswith("edm"):  # the time of the level, but for where the layout itself rounds it
                assert told.min() >= 0, (name, strength)
                assert np.abs(told - sampling.schedule.t(np.array(said.sigmas[:-1]))).max() <= 1.01, (name, strength)
        assert at(sampling, 0.834).sigmas != at(sampling, 0.836).sigmas, name


@pytest.mark.parametrize("config", ["sd", "zero snr"])
def test_trailing_runs_begin_at_the_share_of_the_time_that_is_the_strength(config: str) -> None:
    """t = T * strength - 1, but for the layouts' rounding to whole timesteps; and strictly more for more."""
    sampling = from_config(CONFIGS[config], schedule_type="trailing")
    for n in (1, 4, N):
        strengths = np.linspace(0.0011 * n, 1, 151)
        runs = [at(sampling, float(strength), n) for strength in strengths]
        told = np.array([run.timesteps[0] for run in runs])
        assert np.abs(told - (1000 * strengths - 1)).max() <= 0.51
        assert (np.diff([run.sigmas[0] for run in runs]) > 0).all() and (np.diff(told) > 0).all()


def test_small_strengths_go_on_down_to_the_picture() -> None:
    for name in ("ddim", "lcm", "dpm++2m", "euler"):
        sampling = from_config(CONFIGS["zero snr"], name)
        runs = [at(sampling, strength) for strength in np.geomspace(0.5, 1e-6, 60)]
        falls = np.diff([run.sigmas for run in runs], axis=0)
        assert (falls <= 0).all() and (falls[:, 0] < 0).all()
        assert runs[-1].sigmas[0] < 1e-4
        steepest = max(a.sigmas[0] / b.sigmas[0] for a, b in pairwise(runs))
        assert steepest < 2  # no jump: strength falls by a fifth at a time


@pytest.mark.parametrize("listed", [{"timesteps": (999.0, 749.0, 499.0, 249.0)}, {"sigmas": (20.0, 14.0, 3.0, 0.02)}])
def test_listed_levels_are_walked_in_parts(listed: dict[str, tuple[float, ...]]) -> None:
    sampling = from_config(CONFIGS["sd"], "euler", **listed)
    whole, half = sampling.levels(4), at(sampling, 0.5, 4)
    assert len(half.timesteps) == 4 and half.sigmas[0] < whole.sigmas[0]
    firsts = [at(sampling, strength, 4).sigmas[0] for strength in np.linspace(0, 1, 101)]
    assert (np.diff(firsts) > 0).all() and firsts[-1] == whole.sigmas[0]


def test_more_steps_than_the_schedule_has_are_refused_as_ever() -> None:
    for strength in (0.5, 1.0):
        with pytest.raises(UsageError, match="at most 1000 do"):
            at(from_config(CONFIGS["zero snr"]), strength, 1001)
        assert len(at(from_config(CONFIGS["zero snr"]), strength, 1000).timesteps) == 1000
    with pytest.raises(UsageError, match="at most 50"):
        at(from_config(CONFIGS["sd"], "lcm"), 0.5, 51)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_at_no_strength_a_run_ends_at_its_picture(name: str) -> None:
    sampling = from_config(CONFIGS["sd"], name)
    run = at(sampling, 0.0, 5)
    begin = UNIT + run.sigmas[0] * UNIT.flip(0)
    steps = list(sampling.solver()(denoiser(sampling, run), begin, run.sigmas, field, None))
    lowest = sampling.levels(5).sigmas[-1]
    assert len(steps) == 5 and float((steps[-1].x - UNIT).abs().max()) <= 12 * lowest + 1e-3


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_other_rule_is_that_of_diffusers(name: str) -> None:
    oracle = getattr(diffusers, name)(**SD15)
    sampling = from_config({"_class_name": name, **oracle.config} | {"clip_sample": False})
    for n, strength in [(50, 0.8), (25, 0.834), (7, 0.3), (20, 1.0), (10, 0.1), (3, 0.99)]:
        oracle.set_timesteps(n)
        pipeline = SimpleNamespace(scheduler=oracle)
        theirs, count = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, n, strength, None)
        said = stronger_as_diffusers(sampling.levels(n), strength)
        assert len(said.timesteps) == count and said.timesteps == pytest.approx(theirs.tolist(), abs=1e-3)
        begun = oracle.add_noise(torch.zeros(1), torch.ones(1), theirs[:1])
        scale = 1.0 if name.startswith(VE) else math.hypot(1, said.sigmas[0])
        assert said.sigmas[0] == pytest.approx(float(begun) * scale, rel=1e-4)
    for n, strength in [(3, 0.3), (50, 0.0)]:
        with pytest.raises(UsageError, match="leaves none of"):
            stronger_as_diffusers(sampling.levels(n), strength)


RUN = Levels(tuple(np.linspace(10, 0, 9)), tuple(np.linspace(900, 100, 8)), 10.0)


def test_a_pixel_is_free_for_its_share_of_the_steps() -> None:
    """Wholly from the first step i with mask >= 1 - i / n on, which is the rule of Levin & Fried; never before the step
    in which it becomes so."""
    mask = torch.linspace(0, 1, 33).view(1, 1, 3, 11)
    freedom = freed(RUN, mask)
    said = torch.stack([freedom(sigma) for sigma in RUN.sigmas[:-1]])
    for i in range(8):
        assert torch.equal(said[i] == 1, mask >= 1 - i / 8)
    assert ((said > 0) & (said < 1)).sum(0).max() == 1  # the step that is shared
    torch.testing.assert_close(said.sum(0), 8 * mask)  # all in all, so many steps
    assert (said.diff(dim=0) >= 0).all()


def test_a_binary_mask_is_its_own_freedom_at_any_level() -> None:
    mask = (torch.rand(1, 1, 5, 7) < 0.5).float()
    levels = [20.0, *RUN.sigmas, *(RUN.sigmas[i] ** 0.5 * RUN.sigmas[i + 1] ** 0.5 for i in range(7)), 1e-9, 0.0]
    assert all(torch.equal(freed(RUN, mask)(sigma), mask) for sigma in levels)


def test_half_steps_lie_between() -> None:
    mask: Tensor = torch.linspace(0, 1, 33).view(1, 1, 3, 11)
    freedom = freed(RUN, mask)
    first, middle, last = (freedom(s) for s in (RUN.sigmas[3], (RUN.sigmas[3] + RUN.sigmas[4]) / 2, RUN.sigmas[4]))
    assert (first <= middle).all() and (middle <= last).all() and not torch.equal(first, middle)
    fine = torch.stack([freedom(sigma) for sigma in np.linspace(10, 0, 400)])
    assert float(fine.diff(dim=0).abs().max()) < 8 / 399 * 1.01  # and there is no jump
