"""Parts of runs, respaced and listed times, continuous schedules, the least and the most, steps of no length: by exact
numbers.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion import Estimate, NoiseSchedule, Spacing, levels
from ldm.diffusion.continuous import EDMSchedule, FlowSchedule
from ldm.diffusion.spacing import respaced
from ldm.errors import UsageError
from ldm.schedulers import from_config, solve
from ldm.schedulers.ddim import tcd
from ldm.schedulers.dpm_solver import multistep, singlestep
from ldm.schedulers.exponential import ALGORITHMS
from ldm.schedulers.linear_multistep import deis, lms
from ldm.schedulers.solver import Advance
from ldm.schedulers.unipc import unipc

SD = NoiseSchedule.scaled_linear()


def test_parts_of_a_run_join() -> None:
    """Base and refiner share a run as in diffusers' SDXL: the base has the timesteps not below T - end T."""
    run = levels(SD, 5, Spacing("trailing"), "euler")
    assert run.timesteps == (999, 799, 599, 399, 199)
    first, second = run.part(0, 0.8, 1000), run.part(0.8, 1, 1000)
    assert first.timesteps == (999, 799, 599, 399) and second.timesteps == (199,)
    assert first.sigmas == run.sigmas[:5] and second.sigmas == run.sigmas[4:]
    assert first.start == run.start and second.start == math.hypot(1, run.sigmas[4])
    assert run.part(0, 1, 1000) == run
    # a boundary on a timestep belongs to the first part: T - 0.201 T = 799
    assert run.part(0, 0.201, 1000).timesteps == (999, 799)
    assert run.part(0.201, 1, 1000).timesteps == (599, 399, 199)
    assert second.told == {float(SD.sigma(199)): 199.0}
    three = levels(SD, 3, Spacing("trailing"), "ddim")  # 666.3 is rounded to 666, which is then not below it
    assert three.timesteps == (999, 666, 332) and three.part(0, 0.3337, 1000).timesteps == (999, 666)
    assert three.part(0.3337, 1, 1000).timesteps == (332,)
    middle = run.part(0.3, 0.7, 1000)
    assert middle.timesteps == (599, 399) and middle.sigmas == run.sigmas[2:5]
    with pytest.raises(UsageError, match=r"no step of 5 lies between 0\.9 and 0\.95"):
        run.part(0.9, 0.95, 1000)


def test_the_least_and_the_most() -> None:
    assert levels(SD, 5) == levels(SD, 5, Spacing())
    assert levels(SD, 1000, Spacing("trailing"), "ddim").timesteps == tuple(range(999, -1, -1))
    assert levels(SD, 1000, Spacing("leading"), "ddim").timesteps == tuple(range(999, -1, -1))
    with pytest.raises(UsageError, match="at most 1000 do"):
        levels(SD, 1001, Spacing("trailing"), "dpm_solver")
    one = levels(SD, 1, Spacing("trailing"), "dpm_solver")
    assert one.timesteps == (999,) and one.sigmas == (SD.sigmas[-1], 0.0)
    assert NoiseSchedule.from_config({"num_train_timesteps": 1}).num_train_timesteps == 1
    two = NoiseSchedule(np.array([0.1, 0.2]))
    rescaled = two.with_zero_terminal_snr().alphas_cumprod
    assert rescaled[1] == 0 and rescaled[0] == pytest.approx(two.alphas_cumprod[0], rel=1e-12)
    for bad in ([1.0, 0.1], [0.1, 0.0], [0.1, 1.1], []):
        with pytest.raises(UsageError, match="betas must be"):
            NoiseSchedule(np.array(bad))


def test_defaults_of_the_schedule() -> None:
    for t in (0, 500, 999):
        assert SD.q_posterior(t) == SD.q_posterior(t, t - 1)
        assert SD.variance(t, "fixed_large") == pytest.approx(SD.betas[t], rel=1e-9)
    with pytest.raises(UsageError, match="time -2 is outside"):
        SD.alpha_bar(-2)
    with pytest.raises(UsageError, match="did you mean 'fixed_small'"):
        SD.variance(5, "fixed_smal")  # type: ignore[arg-type]


def test_respaced_as_nichol_and_dhariwal() -> None:
    """Their section 3.3 and code: evenly spaced with both ends, in each section; "ddimN" strides from 0."""
    assert respaced(1000, "5") == (999, 749, 500, 250, 0)  # 249.75 k, rounded
    assert respaced(300, "10,15,20")[-10:] == tuple(float(round(11 * k)) for k in range(9, -1, -1))
    assert len(respaced(300, "10,15,20")) == 45 and respaced(300, "10,15,20")[0] == 299
    assert respaced(300, "10,15,20")[20:35][::-1] == tuple(float(100 + round(99 / 14 * k)) for k in range(15))
    assert respaced(10, "1,2") == (9, 5, 0)  # sections of 5 and 5; one time of a section is its first
    assert respaced(11, "1,1") == (6, 0)  # the first section is the longer one
    assert respaced(1000, "ddim50") == tuple(float(t) for t in range(980, -1, -20))
    assert respaced(1000, "ddim2") == (500, 0)
    assert len(respaced(20000, "10000")) == 10000
    assert respaced(4, "4") == (3, 2, 1, 0) and respaced(4, "2,2") == (3, 2, 1, 0)
    for bad, says in {
        "ddim999": "no whole stride takes 999 of 1000",
        "ddim1": "no whole stride takes 1 of 1000",
        "": "write how many",
        "a": "write how many",
        "ddimx": "write how many",
        "0": "write how many",
        "3,0": "write how many",
        "1001": "at most 1000",
        "400,600": "600 timesteps were asked of a section of 500",
    }.items():
        with pytest.raises(UsageError, match=says):
            respaced(1000, bad)


def test_listed_times_and_levels() -> None:
    run = levels(SD, 7, Spacing(timesteps=(999, 500.5, 3)), "euler")
    assert run.timesteps == (999, 500.5, 3) and run.sigmas[1] == SD.sigma(500.5) and run.sigmas[-1] == 0
    run = levels(SD, 7, Spacing(sigmas=(10.0, 2.0), final_sigmas_type="sigma_min"), "euler")
    assert run.sigmas == (10.0, 2.0, SD.sigmas[0]) and run.timesteps == tuple(SD.t(s) for s in (10.0, 2.0))
    for fields in ({"timesteps": (3, 5)}, {"timesteps": (3, 3)}, {"sigmas": (1.0, -1.0)}, {"sigmas": (math.inf, 1.0)}):
        with pytest.raises(UsageError, match="they must be numbers that fall, none below 0"):
            Spacing(**fields)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="both given"):
        Spacing(timesteps=(3,), sigmas=(1.0,))
    with pytest.raises(UsageError, match="timesteps begin at 1000; this schedule has those from 0 to 999"):
        levels(SD, 1, Spacing(timesteps=(1000, 3)))


def test_continuous_schedules() -> None:
    """EDM: c_noise = log(sigma) / 4 (Karras et al. 2022, table 1). Flow: sigma = s / (1 - s), told T s."""
    edm = EDMSchedule(0.01, 50.0)
    assert float(edm.t(1.0)) == 0 and float(edm.t(math.e**4)) == pytest.approx(1)
    assert float(edm.sigma(edm.t(0.3))) == pytest.approx(0.3, rel=1e-12)
    run = levels(edm, 4)
    assert run.sigmas[0] == pytest.approx(50) and run.sigmas[3] == pytest.approx(0.01) and run.sigmas[4] == 0
    assert run.start == pytest.approx(math.hypot(1, 50))
    assert run.timesteps == pytest.approx([math.log(s) / 4 for s in run.sigmas[:4]])
    ramp = [(50 ** (1 / 7) + k / 3 * (0.01 ** (1 / 7) - 50 ** (1 / 7))) ** 7 for k in range(4)]
    assert run.sigmas[:4] == pytest.approx(ramp)
    even = levels(EDMSchedule(0.01, 50.0, exponential=True), 3).sigmas
    assert even[1] == pytest.approx(math.sqrt(0.5)) and levels(edm, 3, Spacing(sigmas=(2.0, 1.0))).sigmas == (2, 1, 0)
    assert levels(edm, 3, Spacing(final_sigmas_type="sigma_min")).sigmas[-1] == pytest.approx(0.01)

    flow = FlowSchedule(shift=3.0, twice=False)
    s = np.linspace(1, 1e-3, 5)
    shifted = 3 * s / (1 + 2 * s)
    run = levels(flow, 5)
    assert run.timesteps[1:] == pytest.approx(1000 * shifted[1:]) and run.timesteps[0] == pytest.approx(1000)
    assert run.sigmas[1:5] == pytest.approx(shifted[1:] / (1 - shifted[1:])) and run.sigmas[5] == 0
    assert run.start == pytest.approx(1 + run.sigmas[0]) and run.sigmas[0] > 1e8
    assert float(flow.t(flow.sigma(250.0))) == pytest.approx(250)
    ended = levels(FlowSchedule(shift_terminal=0.1), 4)
    assert ended.timesteps[-1] == pytest.approx(100) and ended.timesteps[0] == pytest.approx(1000)
    with pytest.raises(UsageError, match="laid out on a trained schedule and there is none"):
        levels(edm, 4, Spacing(sigma_grid="uniform"))


def test_a_step_of_no_length_changes_nothing() -> None:
    """Grids that visit the lowest level, and then end at it, have one: x stays as it is, in every order."""
    x = torch.linspace(-2, 2, 8).view(1, 2, 2, 2)

    def denoise(x: Tensor, sigma: float) -> Estimate:
        return Estimate(torch.tanh(x) * (1 + sigma))

    solvers = [multistep(order, kind, how) for order in (2, 3) for kind in ALGORITHMS for how in ("midpoint", "heun")]
    solvers += [unipc(order, how, data) for order in (2, 3) for how in ("bh1", "bh2") for data in (True, False)]
    for advance in [*solvers, lms(), deis(3)]:
        sigmas = [9.0 * 0.7**k for k in range(20)]
        *_, before, last = solve(advance, denoise, x, [*sigmas, sigmas[-1]], lambda *_: torch.ones_like(x))
        corrected = last.past[0].x  # UniPC's x at the step's beginning; of the others `before.x`
        assert torch.allclose(last.x, corrected, rtol=1e-6, atol=1e-6) and before.sigma == last.sigma


def test_defaults_of_the_solvers() -> None:
    def end(advance: Advance) -> Tensor:
        x = torch.linspace(-2, 2, 8).view(1, 2, 2, 2)
        steps = solve(advance, lambda x, sigma: Estimate(torch.tanh(x + sigma)), x, (9.0, 4.0, 2.5, 1.0, 0.3), never)
        return [step.x for step in steps][-1]

    assert torch.equal(end(singlestep()), end(singlestep(2, "dpmsolver++", "midpoint")))
    assert torch.equal(end(multistep()), end(multistep(2, "dpmsolver++", "midpoint")))
    assert not torch.equal(end(singlestep()), end(singlestep(3)))
    assert torch.equal(end(unipc()), end(unipc(2, "bh2", True, True)))
    assert not torch.equal(end(unipc()), end(unipc(2, "bh2", True, False)))
    assert torch.equal(end(deis()), end(deis(2, True))) and torch.equal(end(lms()), end(lms(4)))


def never(sigma: float, sigma_next: float) -> Tensor:
    raise AssertionError("a deterministic run drew noise")


@pytest.mark.parametrize("t", [90, 340, 350, 500])
def test_tcd_goes_by_whole_times(t: int) -> None:
    """Zheng et al. 2024, algorithm 4: down to floor((1 - 0.3) t), where 62.99999999999999 is 63, then noise up to t."""
    x, clean, fresh = (torch.full((1, 1, 2, 2), value) for value in (5.0, 2.0, -1.0))
    start, level, between = (float(SD.sigma(time)) for time in (999, t, 7 * t // 10))
    (step,) = solve(tcd(SD, 0.3), lambda x, sigma: Estimate(clean), x, (start, level), lambda *_: fresh)
    expected = 2 + between / start * 3 - math.sqrt(level**2 - between**2)
    assert float(step.x[0, 0, 0, 0]) == pytest.approx(expected, rel=1e-6)


def test_the_scale_of_latents() -> None:
    """VP frames are scaled where a run ends above 0, flow matching too; EDM's samples are x itself."""
    low = from_config({"_class_name": "DDIMScheduler", "clip_sample": False})
    assert low.scale(0.0) == 1 and low.scale(0.5) == 1 / math.hypot(1, 0.5) and low.scale(2.0) == 1 / math.hypot(1, 2)
    flow = from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert flow.scale(0.5) == 1 / 1.5 and flow.scale(0.0) == 1
    assert from_config({"_class_name": "EDMEulerScheduler"}).scale(0.5) == 1
