"""Solvers and noise levels against diffusers in the same process, closed forms, and diffusers' own recorded numbers."""

import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise, zip_longest
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion import PREDICTIONS, Denoiser, Estimate, Levels, NoiseSchedule, Spacing, c_in, levels
from ldm.diffusion.spacing import FAMILIES, karras
from ldm.errors import ModelError, UsageError
from ldm.schedulers import (
    FALLBACK,
    SCHEDULERS,
    SUBSTITUTED,
    Noise,
    Solver,
    Step,
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    find,
    from_config,
    heun,
    network_of,
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SCHEDULE = NoiseSchedule.scaled_linear()
KERNEL = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.25
UNIT = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
Network = Callable[[Tensor, float], Tensor]


def network(x: Tensor, t: float) -> Tensor:
    """A small fixed network of x at unit variance and its time: convolution, tanh and a skip varying with time."""
    mixed = torch.nn.functional.conv2d(x, KERNEL.to(x.dtype), padding=1)
    return torch.tanh(mixed + math.cos(t / 200)) + 0.9 * x * (0.5 + 0.5 * math.sin(t / 160))


def denoiser(run: Levels, prediction: str, net: Network = network) -> Denoiser:
    """The bridge from a network of timesteps to a Denoiser."""
    times = dict(zip(run.sigmas, run.timesteps, strict=False))
    kind = PREDICTIONS[prediction]
    return lambda x, sigma: Estimate(kind.to_x0(x, sigma, net(x * c_in(sigma), times[sigma])))


def stream(like: Tensor = UNIT, seed: int = 7) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=generator, dtype=like.dtype)


# Every step against diffusers, in one process. A case: diffusers' class, its config, the arguments of its step.

# those whose samples are x0 + sigma * noise in diffusers too
VE = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
DRAWS = ("DDPMScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler")
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def cases() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for spacing in ("leading", "trailing", "linspace"):
        grid = {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
        for eta in (0.0, 0.5, 1.0):
            yield "DDIMScheduler", {**grid, "clip_sample": False}, {"eta": eta}
        for variance in ("fixed_small", "fixed_large"):
            yield "DDPMScheduler", {**grid, "clip_sample": False, "variance_type": variance}, {}
        yield "EulerAncestralDiscreteScheduler", grid, {}
        for use_karras in (False, True):
            for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"):
                yield name, {**grid, "use_karras_sigmas": use_karras}, {}
        yield "EulerDiscreteScheduler", {**grid, "final_sigmas_type": "sigma_min"}, {}
        yield "DPMSolverMultistepScheduler", {**grid, "final_sigmas_type": "sigma_min"}, {}
        yield "DDIMScheduler", {**grid, "clip_sample": False, "set_alpha_to_one": False}, {"eta": 0.5}
        yield "DDIMScheduler", {**grid, **ZERO_SNR, "clip_sample": False}, {"eta": 0.0}  # eta 1 is NaN in diffusers
        yield "DDPMScheduler", {**grid, **ZERO_SNR, "clip_sample": False}, {}
        for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"):
            yield name, {**grid, **ZERO_SNR}, {}
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        yield name, {**ZERO_SNR, "timestep_spacing": "trailing", "use_karras_sigmas": True}, {}
    yield "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "lower_order_final": False}, {}
    yield "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {}
    yield "DDIMScheduler", {"clip_sample": False, "prediction_type": "sample"}, {"eta": 1.0}
    yield "HeunDiscreteScheduler", {"prediction_type": "sample", "timestep_spacing": "trailing"}, {}


def theirs(scheduler: Any, n: int, step: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """diffusers' loop: x and x0 after every step of ours."""
    name, config = type(scheduler).__name__, scheduler.config
    scheduler.set_timesteps(n)
    times = scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # timesteps can repeat with Karras levels, and it would begin at the second
    x, xs, x0s = UNIT * scheduler.init_noise_sigma, [], []
    drawn = {"generator": torch.Generator().manual_seed(7)} if name in DRAWS else {}
    for t, after in zip_longest(times, times[1:], fillvalue=torch.tensor(-1)):
        if name == "DDIMScheduler" and config.timestep_spacing == "linspace":
            # it goes down T // n timesteps, which here is not where it calls the network next; T // (T / gap) = gap
            scheduler.num_inference_steps = Fraction(config.num_train_timesteps, int(t - after))
        result = scheduler.step(network(scheduler.scale_model_input(x, t), float(t)), t, x, **step, **drawn)
        x = result.prev_sample
        xs.append(x)
        x0s.append(result.get("pred_original_sample"))
    calls = [*range(1, len(xs), 2), len(xs) - 1] if name == "HeunDiscreteScheduler" else range(len(xs))
    return [xs[i] for i in calls], [x0s[i] for i in calls]


RUNS = [(*case, n) for case in cases() for n in (4, 20, 50)]
# lower_order_final ends in first order below 15 steps
RUNS += [("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {}, n) for n in (14, 15)]


@pytest.mark.parametrize(("name", "config", "step", "n"), [pytest.param(*r, id="-".join(map(str, r))) for r in RUNS])
def test_every_step_equals_diffusers(name: str, config: dict[str, Any], step: dict[str, Any], n: int) -> None:
    for prediction in [config["prediction_type"]] if "prediction_type" in config else ["epsilon", "v_prediction"]:
        scheduler = getattr(diffusers, name)(**SD, **{**config, "prediction_type": prediction})
        xs, x0s = theirs(scheduler, n, step)

        sampling = from_config({"_class_name": name, **scheduler.config})
        run = sampling.scheduler.levels(sampling.schedule, n, sampling.spacing)
        solver = sampling.scheduler.bound({**sampling.options, **step})
        steps = list(solver(denoiser(run, sampling.prediction), UNIT * run.start, run.sigmas, stream()))

        assert [s.index for s in steps] == list(range(n))
        assert [s.sigma for s in steps] == list(run.sigmas[1:])
        largest = max(float(x.abs().max()) for x in [UNIT * scheduler.init_noise_sigma, *xs])
        for ours, x, x0 in zip(steps, xs, x0s, strict=True):
            scale = 1.0 if name in VE else c_in(ours.sigma)
            if x0 is not None and name != "HeunDiscreteScheduler":  # Heun has two; we yield the first
                assert float((ours.x0 - x0).abs().max()) <= 1e-5 * max(largest, float(x0.abs().max()))
            ends_noisy = config.get("variance_type") == "fixed_large" and run.timesteps[-1] > 0
            if ends_noisy and ours.index == n - 1:
                continue  # diffusers ends on noise here; the paper's algorithm does not
            assert float((ours.x * scale - x).abs().max()) <= 1e-5 * largest


@pytest.mark.parametrize("total", [1000, 1100, 37])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_timesteps_and_sigmas_of_many_lengths_equal_diffusers(name: str, total: int) -> None:
    row, schedule = find(name), NoiseSchedule.scaled_linear(num_train_timesteps=total)
    lengths = [n for n in (*range(2, 61), 64, 96, 99, 125, 150, 200, 250, 333, 500, 998) if n < total - 1]
    for spacing, use_karras in [("leading", False), ("trailing", False), ("linspace", False), ("trailing", True)]:
        if use_karras and name == "DDIMScheduler":
            continue
        flags = {} if name == "DDIMScheduler" else {"use_karras_sigmas": use_karras}
        oracle = getattr(diffusers, name)(
            **{**SD, "num_train_timesteps": total, "timestep_spacing": spacing, "steps_offset": 1, **flags}
        )
        for n in lengths[:30] if use_karras else lengths:
            oracle.set_timesteps(n)
            ours = row.levels(schedule, n, Spacing(spacing, steps_offset=1, use_karras_sigmas=use_karras))
            times, rounds = oracle.timesteps.numpy(), use_karras and row.name.startswith("dpm")
            if spacing == "trailing" and len(np.arange(total, 0, -total / n)) > n:
                if use_karras:
                    continue  # its levels then stretch to one timestep too many, -1, where its arange rounds past 0
                times = times[:n]
            mine = schedule.t(np.array(ours.sigmas[:n])) if rounds else np.array(ours.timesteps)
            np.testing.assert_allclose(mine, times, rtol=0, atol=0.501 if rounds else 2e-3)
            if name == "EulerDiscreteScheduler":
                np.testing.assert_allclose(ours.sigmas[:n], oracle.sigmas.numpy()[:n], rtol=2e-5)
                assert ours.start == pytest.approx(float(oracle.init_noise_sigma), rel=1e-5)


def test_levels_of_known_runs() -> None:
    # recorded upstream: DDIM with offset 1; the others from the definitions, and Karras on Stable Diffusion's range
    assert levels(SCHEDULE, 5, Spacing("leading", 1), "ddim").timesteps == (801, 601, 401, 201, 1)
    assert levels(SCHEDULE, 10, Spacing("leading", 1), "euler").timesteps[:2] == (901, 801)
    assert levels(SCHEDULE, 10, Spacing("trailing"), "dpm_solver").timesteps[:2] == (999, 899)
    expected = [14.614641, 9.102928, 5.478392, 3.168603, 1.749417, 0.914072, 0.446918, 0.201398, 0.081910, 0.029167]
    run = find("dpm++ 2m karras").levels(SCHEDULE, 10)
    np.testing.assert_allclose(run.sigmas, [*expected, 0.0], atol=6e-7)
    assert levels(SCHEDULE, 1, Spacing("linspace"), "euler").timesteps == (999,)  # diffusers begins at 0, without noise
    assert run.start == math.hypot(1, run.sigmas[0])
    assert all(type(number) is float for number in (*run.sigmas, *run.timesteps, run.start))


def test_final_level_and_terminal_stand_in() -> None:
    lowest = float(SCHEDULE.sigmas[0])
    for family in FAMILIES:
        assert levels(SCHEDULE, 7, Spacing(final_sigmas_type="sigma_min"), family).sigmas[-1] == lowest
        assert levels(SCHEDULE, 7, Spacing(), family).sigmas[-1] == 0
    zero = SCHEDULE.with_zero_terminal_snr()
    first = {family: levels(zero, 5, Spacing("trailing"), family).sigmas[0] for family in FAMILIES}
    assert first["euler"] == first["dpm_solver"] == pytest.approx(math.sqrt(2**24 - 1), rel=1e-9)
    assert first["ddim"] == pytest.approx(1e8, rel=1e-6)


@pytest.mark.parametrize(
    ("n", "spacing", "family", "says"),
    [
        (0, Spacing(), "ddim", "at least 1"),
        (-3, Spacing(), "euler", "at least 1"),
        (1001, Spacing("trailing"), "ddim", "at most 1000 do"),
        (1000, Spacing("leading", 1), "euler", "at most 999 do"),
        (1000, Spacing("linspace"), "dpm_solver", "at most 999 do"),
        (5, Spacing("leading", 1000), "ddim", "none does"),
        (5, Spacing("leading", -1), "ddim", "none does"),
    ],
)
def test_steps_that_do_not_fit_are_refused(n: int, spacing: Spacing, family: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        levels(SCHEDULE, n, spacing, family)


def test_misspelt_names_are_offered_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'trailing'"):
        Spacing("trailling")
    with pytest.raises(UsageError, match="did you mean 'sigma_min'"):
        Spacing(final_sigmas_type="sigma_mni")
    with pytest.raises(UsageError, match=r"did you mean 'dpm\+\+2m'"):
        find("dpm+2m")
    with pytest.raises(UsageError, match="known: ddpm, ddim"):
        find("qqq")
    with pytest.raises(UsageError, match="'eta' is not an option of the scheduler euler"):
        SCHEDULERS["euler"].bound({"eta": 1.0})


# Recorded results of diffusers' own tests (and further cases run on 0.42.1): sum |x|, mean |x|, x[0, -1, -1, -1].

SAMPLE = (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2).contiguous()
FLIPPED = (torch.arange(768).flip(-1).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2).contiguous()


def dummy_network(x: Tensor, t: float) -> Tensor:
    return x * t / (t + 1)


def run_from(solver: Solver, run: Levels, begin: int, prediction: str, x: Tensor, noise: Noise) -> Tensor:
    """x at unit variance at level `begin` -> the result in the same frame."""
    denoise = denoiser(run, prediction, dummy_network)
    (*_, last) = solver(denoise, x / c_in(run.sigmas[begin]), run.sigmas[begin:], noise)
    return last.x * c_in(last.sigma)


def run_rescaled(solver: Solver, run: Levels, begin: int, prediction: str, x: Tensor, noise: Noise) -> Tensor:
    """Upstream's loop for the Euler family, which goes on from the scaled input of the network instead of from x."""
    kind, times = PREDICTIONS[prediction], dict(zip(run.sigmas, run.timesteps, strict=False))
    for start, end in pairwise(run.sigmas[begin:]):

        def denoise(x: Tensor, sigma: float, start: float = start) -> Estimate:
            scaled = x if sigma == start else x * c_in(sigma)
            x0 = kind.to_x0(scaled, sigma, dummy_network(scaled, times[sigma]))
            return Estimate(x - scaled + x0)

        ((step),) = solver(denoise, x * c_in(start), (start, end), noise)
        x = step.x
    return x


RECORDED: list[tuple[str, dict[str, Any], int, float, float, float]] = [
    # class, config, steps skipped (the run begins from SAMPLE with noise FLIPPED), sum, mean, corner
    ("DDPMScheduler", {}, 0, 263.3463169, 0.3428988502, 0.08782667667),
    ("DDPMScheduler", {}, 998, 387.9465858, 0.5051387836, 0.9819408059),
    ("DDIMScheduler", {}, 0, 172.0067139, 0.2239670754, 0.446182251),
    ("DDIMScheduler", {"prediction_type": "v_prediction"}, 0, 52.53020165, 0.06839870006, 0.1362623721),
    ("DDIMScheduler", {"beta_start": 0.01}, 0, 149.8294513, 0.1950904313, 0.3886548579),
    (
        "DDIMScheduler",
        {"beta_start": 0.01, "set_alpha_to_one": False},
        *(0, 149.0784203, 0.1941125264, 0.3867067099),
    ),
    ("DDIMScheduler", {}, 8, 354.541829, 0.4616430065, 0.6860896349),
    ("DDIMScheduler", {"timestep_spacing": "trailing"}, 0, 170.0350082, 0.2213997502, 0.4410675764),
    (
        "DDIMScheduler",
        {**SD, "set_alpha_to_one": False, "steps_offset": 1},
        *(0, 183.258221, 0.2386174752, 0.4753683507),
    ),
    ("DDIMScheduler", {**ZERO_SNR, "timestep_spacing": "trailing"}, 0, 50.55740976, 0.06582996062, 0.1311449409),
    ("EulerDiscreteScheduler", {}, 0, 10.08068236, 0.0131258885, 0.02614908665),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 0, 124.5225963, 0.1621387973, -0.3230094016),
    ("EulerDiscreteScheduler", {}, 8, 57062.92612, 74.30068505, 147.7944641),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, 0, 0.7279530052, 0.000947855, -0.001888296567),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 0, 1.400496065, 0.001823562585, 0.003632860025),
    ("EulerAncestralDiscreteScheduler", {}, 0, 152.3192774, 0.1983323924, -0.006373192184),
    (
        "EulerAncestralDiscreteScheduler",
        {"prediction_type": "v_prediction"},
        *(0, 108.4438838, 0.1412029736, 0.07953311503),
    ),
    ("EulerAncestralDiscreteScheduler", {}, 8, 56163.05241, 73.12897449, 145.450592),
    ("HeunDiscreteScheduler", {}, 0, 0.1233307439, 0.000160587, 0.000319918),
    ("HeunDiscreteScheduler", {}, 8, 75074.89559, 97.75377031, 194.4459534),
    ("DPMSolverMultistepScheduler", {}, 0, 253.5513958, 0.3301450466, 0.6577075124),
    ("DPMSolverMultistepScheduler", {}, 5, 318.4110982, 0.4145977841, 0.1884143353),
    (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "v_prediction"},
        *(0, 172.8739736, 0.2250963197, 0.4484317899),
    ),
    (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "v_prediction", "use_karras_sigmas": True},
        *(0, 160.6642017, 0.2091981793, 0.4167598784),
    ),
    (
        "DPMSolverMultistepScheduler",
        {"final_sigmas_type": "zero", "lower_order_final": True, "use_karras_sigmas": True, **SD},
        *(0, 212.5729973, 0.2767877569, 0.5514101386),
    ),
]
UPSTREAM: dict[str, dict[str, Any]] = {  # the config each upstream test starts from, without clipping
    "DDPMScheduler": {"clip_sample": False},
    "DDIMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    **{name: {"num_train_timesteps": 1100} for name in VE},
}


@pytest.mark.parametrize(("name", "changes", "begin", "total", "mean", "corner"), RECORDED)
def test_recorded_results_of_diffusers(
    name: str, changes: dict[str, Any], begin: int, total: float, mean: float, corner: float
) -> None:
    linear = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    config = {**linear, **UPSTREAM[name], **changes}
    sampling = from_config({"_class_name": name, **config})
    # their float32 tables, from which some of these results (with T = 1000 and no clipping) are not 1e-5 away otherwise
    table = getattr(diffusers, name)(**config).alphas_cumprod.double().numpy()
    schedule = NoiseSchedule.trained(1 - table / np.concatenate([[1.0], table[:-1]]))
    n = 1000 if name == "DDPMScheduler" else 10
    run = sampling.scheduler.levels(schedule, n, sampling.spacing)
    solver = sampling.scheduler.bound(sampling.options)
    noise = stream(SAMPLE, seed=0)
    if name in VE:
        x = SAMPLE * run.start + (FLIPPED * run.sigmas[begin] if begin else 0)
        x = run_rescaled(solver, run, begin, sampling.prediction, x, noise)
    else:
        alpha = c_in(run.sigmas[begin])
        x = alpha * SAMPLE + alpha * run.sigmas[begin] * FLIPPED if begin else SAMPLE
        x = run_from(solver, run, begin, sampling.prediction, x, noise)
    ours = [float(x.abs().sum()), float(x.abs().mean()), float(x[0, -1, -1, -1])]
    # DDPM's step computes 1 - alpha_t / alpha_{t-1}, of some 1e-4, in float32
    np.testing.assert_allclose(ours, [total, mean, corner], rtol=1e-4 if name == "DDPMScheduler" else 2e-5)


# Closed forms. The Gaussian N(mean, spread^2) has the posterior mean, and so the ideal denoiser, in closed form.

MEAN, SPREAD = 0.7, 0.5
STARTS = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)


def gaussian(x: Tensor, sigma: float) -> Estimate:
    return Estimate((SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2))


def never() -> Tensor:
    raise AssertionError("a deterministic run drew noise")


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (euler, 1), (heun, 2), (dpmpp_2m, 2)])
@pytest.mark.parametrize("grid", ["karras", "even in log sigma"])
def test_order_of_convergence(solver: Solver, order: int, grid: str) -> None:
    top, bottom = float(SCHEDULE.sigmas[-1]), float(SCHEDULE.sigmas[0])
    x = MEAN + top * STARTS
    # the solution of dx/dsigma = (x - x0) / sigma
    exact = MEAN + (x - MEAN) * math.sqrt((SPREAD**2 + bottom**2) / (SPREAD**2 + top**2))
    lengths, errors = [40, 80, 160, 320], []
    for n in lengths:
        sigmas = (karras(n + 1, bottom, top) if grid == "karras" else np.geomspace(top, bottom, n + 1)).tolist()
        (*_, last) = solver(gaussian, x, sigmas, never)
        assert last.x.dtype == torch.float64 and last.sigma == sigmas[-1]
        errors.append(float((last.x - exact).abs().max()))
    slope = -np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.15, f"errors {errors}, order {slope:.3f}"


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("n", [1000, 50])
def test_ddpm_has_the_moments_of_its_own_recursion(variance: Any, n: int) -> None:
    """In the paper's frame x_{t-1} = a x0 + b x_t + sqrt(v) z, and x0 is linear in x_t: mean and variance recur."""
    run = levels(SCHEDULE, n, Spacing("leading"), "ddim")
    count = 8_000
    x = math.hypot(1, run.sigmas[0]) * stream(torch.empty(count, 1, 1, 1, dtype=torch.float64), seed=3)()
    (*_, last) = ddpm(gaussian, x, run.sigmas, stream(x, seed=4), variance=variance)

    mean, spread = 0.0, 1.0  # of x_T, of unit variance
    for t, previous in pairwise([*map(int, run.timesteps), -1]):
        alpha = SCHEDULE.alphas_cumprod[t] ** 0.5
        on_x, constant = ideal(alpha)
        to_x0, to_xt, _ = SCHEDULE.q_posterior(t, previous)
        added = SCHEDULE.variance(t, variance, previous) if previous >= 0 else 0.0
        mean = to_x0 * (on_x * mean + constant) + to_xt * mean
        spread = (to_x0 * on_x + to_xt) ** 2 * spread + added
    assert abs(float(last.x.mean()) - mean) < 4 * math.sqrt(spread / count)
    assert abs(float(last.x.var()) - spread) < 4 * spread * math.sqrt(2 / count)


def ideal(alpha: float) -> tuple[float, float]:
    """Bayes' rule: E[x0 | x_t] = a x_t + b for x0 ~ N(MEAN, SPREAD^2) and x_t = alpha x0 + sqrt(1 - alpha^2) noise."""
    total = alpha**2 * SPREAD**2 + 1 - alpha**2
    return alpha * SPREAD**2 / total, (1 - alpha**2) * MEAN / total


def test_equalities_between_solvers() -> None:
    run = levels(SCHEDULE, 12, Spacing("trailing"), "ddim")
    denoise, x = denoiser(run, "epsilon"), UNIT * run.start

    def end(solver: Solver) -> Tensor:
        (*_, last) = solver(denoise, x, run.sigmas, stream())
        return last.x

    assert torch.equal(end(ddim), end(euler))
    assert torch.equal(end(ddpm), end(euler_ancestral))
    assert torch.equal(end(SCHEDULERS["ddim"].bound({"eta": 1.0})), end(ddpm))
    assert torch.equal(end(SCHEDULERS["euler_a"].bound({"eta": 0.0})), end(euler))
    assert not torch.equal(end(SCHEDULERS["ddpm"].bound({"variance": "fixed_large"})), end(ddpm))


@pytest.mark.parametrize("row", SCHEDULERS.values(), ids=SCHEDULERS)
def test_runs_share_no_state_and_keep_their_dtype(row: Any) -> None:
    run = row.levels(SCHEDULE, 6)
    calls = 0

    def counted(x: Tensor, sigma: float) -> Estimate:
        nonlocal calls
        calls += 1
        return Estimate(PREDICTIONS["epsilon"].to_x0(x, sigma, network(x * c_in(sigma), SCHEDULE.t(sigma))))

    def begin(seed: int, dtype: torch.dtype = torch.float32) -> Iterator[Step]:
        x = (UNIT * (1 + seed) * run.start).to(dtype)
        solver: Solver = row.bound()
        return solver(counted, x, run.sigmas, stream(x, seed))

    alone = [list(begin(0)), list(begin(1))]
    assert calls == 2 * (11 if row.name == "heun" else 6)  # Heun calls at both ends of a step, but not at sigma 0
    for first, second, a, b in zip(begin(0), begin(1), *alone, strict=True):
        assert torch.equal(first.x, a.x) and torch.equal(second.x, b.x) and torch.equal(second.x0, b.x0)
    assert all(step.x.dtype == torch.float64 and step.x0.dtype == torch.float64 for step in begin(0, torch.float64))


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_eta_out_of_range_is_refused_before_the_first_step(bad: float) -> None:
    for solver in (ddim, euler_ancestral):
        with pytest.raises(UsageError, match="from 0"):
            solver(gaussian, STARTS, (1.0, 0.0), never, eta=bad)
    with pytest.raises(UsageError, match="did you mean 'fixed_small'"):
        SCHEDULERS["ddpm"].bound({"variance": "fixed_smal"})(gaussian, STARTS, (1.0, 0.0), never)


# Names and configs.


def test_every_name_finds_its_scheduler() -> None:
    names = {"Euler a": "euler_a", "DPM++ 2M": "dpm++2m", "dpm++ 2m karras": "dpm++2m_karras", "HEUN": "heun"}
    for name, short in names.items():
        assert find(name) is SCHEDULERS[short]
    for row in SCHEDULERS.values():
        assert find(row.name) is row and all(find(alias.upper()) is row for alias in row.aliases)
        assert hasattr(diffusers, row.diffusers_class)
        if row.name != "dpm++2m_karras":
            assert find(row.diffusers_class) is row
            assert row.spacing.timestep_spacing == getattr(diffusers, row.diffusers_class)().config.timestep_spacing
    assert all(hasattr(diffusers, name) for name in SUBSTITUTED)


STABLE_DIFFUSION = json.loads(  # the scheduler_config.json of SD 1.x as published
    """{"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012, "beta_start": 0.00085,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
    "steps_offset": 1, "trained_betas": null, "clip_sample": false}"""
)


def test_stable_diffusions_config() -> None:
    sampling = from_config(STABLE_DIFFUSION)
    assert sampling.scheduler is SCHEDULERS[FALLBACK] and "PNDMScheduler" in sampling.note and FALLBACK in sampling.note
    assert sampling.prediction == "epsilon"
    np.testing.assert_array_equal(sampling.schedule.betas, SCHEDULE.betas)
    for name in ("ddim", "dpm++2m", "euler", "euler_a", "heun"):
        chosen = from_config(STABLE_DIFFUSION, name)
        assert chosen.scheduler is SCHEDULERS[name] and not chosen.note
        oracle = getattr(diffusers, chosen.scheduler.diffusers_class).from_config(
            diffusers.PNDMScheduler.from_config(STABLE_DIFFUSION).config
        )
        oracle.set_timesteps(20)
        ours = chosen.scheduler.levels(chosen.schedule, 20, chosen.spacing).timesteps
        np.testing.assert_allclose(ours, oracle.timesteps[:: 2 if name == "heun" else 1], atol=1e-4)
    assert from_config(STABLE_DIFFUSION, "ddim").spacing == Spacing("leading", 1, False, "sigma_min")
    assert from_config(STABLE_DIFFUSION, "dpm++ 2m karras").spacing == Spacing("linspace", 1, True, "zero")


def test_every_class_reads_its_own_defaults() -> None:
    for name in sorted({row.diffusers_class for row in SCHEDULERS.values()} | set(SUBSTITUTED)):
        if name == "LMSDiscreteScheduler":
            continue  # diffusers' needs scipy
        oracle = getattr(diffusers, name)()
        sampling = from_config({"_class_name": name, "clip_sample": False})
        np.testing.assert_allclose(sampling.schedule.betas, oracle.betas.numpy(), rtol=1e-5)
        if name not in SUBSTITUTED:
            assert sampling.scheduler.diffusers_class == name
            assert sampling.spacing.timestep_spacing == oracle.config.timestep_spacing
    with pytest.raises(ModelError, match="clip_sample"):
        from_config({"_class_name": "DDIMScheduler"})  # diffusers' default there is to clip


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("DDIMScheduler", "clip_sample", True),
        ("DDIMScheduler", "thresholding", True),
        ("DDPMScheduler", "variance_type", "learned_range"),
        ("DPMSolverMultistepScheduler", "algorithm_type", "sde-dpmsolver++"),
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("DPMSolverMultistepScheduler", "solver_type", "heun"),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
        ("DPMSolverMultistepScheduler", "prediction_type", "flow_prediction"),
        ("EulerDiscreteScheduler", "use_exponential_sigmas", True),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "sigma_max", 700.0),
        ("EulerDiscreteScheduler", "timestep_spacing", "tailing"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("FlowMatchEulerDiscreteScheduler", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("EulerDiscreteScheduler", "rescale_betas_zero_snr", True),
    ],
)
def test_what_would_be_computed_differently_is_refused_by_name(name: str, field: str, value: Any) -> None:
    fine = {"_class_name": name, "clip_sample": False}
    with pytest.raises(ModelError, match=field):
        from_config({**fine, field: value})


def test_the_network_can_be_read_whatever_the_solver() -> None:
    config = {"_class_name": "SomeScheduler", **SD, **ZERO_SNR, "clip_sample": True}
    schedule, prediction = network_of(config)
    assert prediction == "v_prediction" and schedule.zero_terminal_snr
    with pytest.raises(UsageError, match="did you mean 'scaled_linear'"):
        network_of({"beta_schedule": "scaled_liner"})
