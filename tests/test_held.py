"""Keeping a part of a picture with any solver, and resampling: against the laws of linear recursions."""

import math
import pickle
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from solving import SD15, UNIT, denoiser, field, network
from torch import Tensor

from ldm.brownian import Brownian
from ldm.diffusion import PREDICTIONS, Estimate, NoiseSchedule, c_in
from ldm.diffusion.grids import karras
from ldm.diffusion.guidance import held
from ldm.errors import UsageError
from ldm.schedulers import SCHEDULERS, Noise, Scheduler, Step, from_config
from ldm.schedulers.laps import Lap, laps, total, walked

pytestmark = pytest.mark.usefixtures("one_thread")
SD = NoiseSchedule.scaled_linear()
ROWS = [pytest.param(row, id=name) for name, row in SCHEDULERS.items()]
STILL = [pytest.param(row, id=name) for name, row in SCHEDULERS.items() if not row.noise]
NOISY = [pytest.param(row, id=name) for name, row in SCHEDULERS.items() if row.noise]
KNOWN = UNIT.flip(0) * 0.8 + 0.1
MASK = (torch.arange(4) % 2).float().view(1, 1, 1, 4)  # every other column is drawn
LEVELS = (*karras(12, 0.03, 14.6).tolist(), 0.0)


def sampled(row: Scheduler, noise: Noise, config: dict[str, Any] = SD15, n: int = 12) -> tuple[list[Step], list[float]]:
    """A run by this row from the picture under noise, MASK held."""
    sampling = from_config({"_class_name": "DDIMScheduler", "clip_sample": False} | config, row.name)
    run = sampling.levels(n)
    denoise = held(denoiser(sampling, run), KNOWN, lambda sigma: MASK)
    x = KNOWN + run.sigmas[0] * UNIT
    return list(sampling.solver()(denoise, x, run.sigmas, noise, None)), list(run.sigmas)


def test_held_is_exact_at_both_ends_and_keeps_the_rest_of_an_estimate() -> None:
    said, variance = UNIT * 1e4, UNIT.sigmoid()
    denoise = held(lambda x, sigma: Estimate(said, variance), KNOWN[:1], lambda sigma: MASK * 0.5 * sigma)
    whole, half = denoise(UNIT, 2.0), denoise(UNIT, 1.0)
    assert torch.equal(whole.x0, torch.where(MASK == 1, said, KNOWN[:1])) and whole.variance is variance
    expected = torch.where(MASK == 1, (said + KNOWN[:1]) / 2, KNOWN[:1])
    torch.testing.assert_close(half.x0, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", STILL)
def test_a_deterministic_solver_keeps_the_noise_of_what_is_held(row: Scheduler) -> None:
    steps, sigmas = sampled(row, field)
    free = (MASK == 1).expand_as(UNIT)
    for step in steps:
        expected = KNOWN + step.sigma * UNIT
        assert float((step.x - expected)[~free].abs().max()) <= 4e-6 * sigmas[0], step.index
        assert float((step.x - expected)[free].abs().max()) > 1e-3
    exact = sigmas[-1] == 0 and not row.by_slopes
    assert not exact or torch.equal(steps[-1].x[~free], KNOWN[~free])


@pytest.mark.parametrize("row", NOISY)
def test_a_stochastic_solver_keeps_noise_of_its_level_on_what_is_held(row: Scheduler) -> None:
    """x - known is a sum of factors times independent noises: its variance at each level, exactly, is sigma^2."""
    drawn: list[tuple[float, float]] = []
    run = from_config({"_class_name": "DDIMScheduler", "clip_sample": False} | SD15, row.name).levels(12)

    def walk(unit: int) -> list[Step]:
        """With the noise of one interval 1 and all other 0."""
        drawn.clear()

        def noise(sigma: float, sigma_next: float) -> Tensor:
            drawn.append((sigma, sigma_next))
            return torch.full((1, 1, 1, 1), float(len(drawn) == unit), dtype=torch.float64)

        denoise = held(lambda x, sigma: Estimate(torch.zeros_like(x)), known, lambda sigma: nothing)
        begin = known + run.sigmas[0] * float(unit == 0)
        return list(row.bound({}, SD)(denoise, begin, run.sigmas, noise, None))

    known, nothing = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    walk(0)
    factors = np.array([[float(s.x - known) for s in walk(unit)] for unit in range(len(drawn) + 1)])
    if row.noise == "brownian":  # the two pieces of a step lie on one path, and only that of the whole step stays in x
        assert not factors[1::2].any()
    spread, wanted = np.sqrt((factors**2).sum(0)), np.array(run.sigmas[1:])
    if row.name == "dpm_solver_sde":  # of first order in what it keeps of the noise: never less than it should be
        assert (spread[:-1] > wanted[:-1]).all() and spread[-1] == wanted[-1] == 0
    else:
        np.testing.assert_allclose(spread, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("row", NOISY)
def test_a_stochastic_run_to_zero_ends_at_what_is_known(row: Scheduler) -> None:
    steps, sigmas = sampled(row, field)
    kept = (MASK == 0).expand_as(UNIT)
    if sigmas[-1] == 0:
        assert torch.equal(steps[-1].x[kept], KNOWN[kept])
    else:
        assert float((steps[-1].x - KNOWN)[kept].abs().max()) <= 8 * sigmas[-1]  # what it then still has of the noise


# Inpainting of a Gaussian, whose denoiser is linear: every run is a linear map of its noise.

D = 6
_DRAW = np.random.default_rng(3)
_MIX = _DRAW.standard_normal((D, D)) * np.array([1.0, 0.9, 0.7, 0.6, 0.4, 0.3])
C = _MIX @ _MIX.T / D + 0.02 * np.eye(D)  # of full rank and correlated
MU = _DRAW.standard_normal(D) * 0.5
Y = MU[:3] + np.linalg.cholesky(C[:3, :3]) @ np.array([1.1, -0.7, 0.9])  # the known half
SAMPLES = 20_000


def ideal(x: Tensor, sigma: float) -> Estimate:
    """E[x0 | x] of N(MU, C)."""
    gain = torch.from_numpy(C @ np.linalg.inv(C + sigma**2 * np.eye(D))).to(x)
    mean = torch.from_numpy(MU).to(x)
    return Estimate(mean + (x - mean) @ gain.T)


def law(rule: str, times: int, jump: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of x at the end: the recursions of the papers, in their frame, on the levels LEVELS.

    Ho et al. 2020, eqs. 6-7 ("ddpm"); Song et al. 2021, eqs. 12 and 16 ("ddim", of eta 0); Lugmayr et al. 2022, alg. 1.
    """
    a = [1 / (1 + sigma**2) for sigma in LEVELS]
    known = np.zeros((D, D))
    known[:3, :3] = np.eye(3)
    y = np.concatenate([Y, np.zeros(3)])
    mean, cov = a[0] ** 0.5 * y, (1 - a[0]) * np.eye(D)

    def down(i: int) -> None:
        nonlocal mean, cov
        # x0 = A x_t + b, of which what is known is overwritten
        gain = C @ np.linalg.inv(C + (1 - a[i]) / a[i] * np.eye(D))
        matrix = (np.eye(D) - known) @ gain / a[i] ** 0.5
        offset = (np.eye(D) - known) @ (MU - gain @ MU) + y
        if rule == "ddpm":
            beta = 1 - a[i] / a[i + 1]
            of_x0 = a[i + 1] ** 0.5 * beta / (1 - a[i])
            of_x = (1 - beta) ** 0.5 * (1 - a[i + 1]) / (1 - a[i])
            variance = beta * (1 - a[i + 1]) / (1 - a[i])
        else:
            of_x, variance = ((1 - a[i + 1]) / (1 - a[i])) ** 0.5, 0.0
            of_x0 = a[i + 1] ** 0.5 - of_x * a[i] ** 0.5
        whole = of_x * np.eye(D) + of_x0 * matrix
        mean, cov = whole @ mean + of_x0 * offset, whole @ cov @ whole.T + variance * np.eye(D)

    n = len(LEVELS) - 1
    down(0)
    begin = 1
    while begin < n:
        end = min(begin + jump, n)
        for time in range(times):
            if time:
                ratio = a[begin] / a[end]
                mean, cov = ratio**0.5 * mean, ratio * cov + (1 - ratio) * np.eye(D)
            for i in range(begin, end):
                down(i)
        begin = end
    return mean, cov


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def distance(mean: np.ndarray, cov: np.ndarray) -> float:
    """2-Wasserstein distance from the true conditional of the unknown half."""
    gain = C[3:, :3] @ np.linalg.inv(C[:3, :3])
    right, spread = MU[3:] + gain @ (Y - MU[:3]), C[3:, 3:] - gain @ C[:3, 3:]
    half = root(spread)
    cross = root(half @ cov[3:, 3:] @ half)
    return math.sqrt(((mean[3:] - right) ** 2).sum() + np.trace(spread + cov[3:, 3:] - 2 * cross))


def drawn(rule: str, times: int, jump: int) -> np.ndarray:
    """Samples [SAMPLES, D] of our functions."""
    generator = torch.Generator().manual_seed(11)
    shape = (SAMPLES, 1, 1, D)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    known = torch.from_numpy(np.concatenate([Y, np.zeros(3)])).view(1, 1, 1, D)
    mask = torch.tensor([0.0, 0, 0, 1, 1, 1], dtype=torch.float64).view(1, 1, 1, D)
    solver = SCHEDULERS[rule].bound({}, SD)
    x = known + LEVELS[0] * noise(0, 0)
    walk = laps(len(LEVELS) - 1, times, jump)
    (*_, last) = walked(solver, held(ideal, known, lambda sigma: mask), x, LEVELS, noise, walk)
    return last.x.view(SAMPLES, D).numpy()


@pytest.mark.parametrize(("times", "jump"), [(1, 1), (5, 1), (4, 4)])
@pytest.mark.parametrize("rule", ["ddim", "ddpm"])
def test_the_filled_part_of_a_gaussian_follows_the_recursion_of_the_papers(rule: str, times: int, jump: int) -> None:
    mean, cov = law(rule, times, jump)
    x = drawn(rule, times, jump)
    assert np.array_equal(x[:, :3], np.broadcast_to(Y, (SAMPLES, 3)))
    spread = np.diag(cov)
    off = np.abs(x.mean(0) - mean)[3:] / np.sqrt(spread[3:] / SAMPLES)
    errors = np.sqrt((np.outer(spread, spread) + cov**2)[3:, 3:] / SAMPLES)
    beside = np.abs(np.cov(x.T)[3:, 3:] - cov[3:, 3:]) / errors
    print(f"{rule}, {times} times {jump} steps: mean {off.max():.1f}, covariance {beside.max():.1f} standard errors")
    assert off.max() < 4 and beside.max() < 4


def test_resampling_brings_the_filled_part_nearer_to_the_true_conditional() -> None:
    """Held noise that is not told of the rest leaves a bias, which going back and forth takes away."""
    for rule in ("ddim", "ddpm"):
        table = {(r, j): distance(*law(rule, r, j)) for r in (1, 2, 5, 10, 20) for j in (1, 4)}
        gain = C[3:, :3] @ np.linalg.inv(C[:3, :3])
        size = math.sqrt(np.trace(C[3:, 3:] - gain @ C[:3, 3:]))
        print(f"\n{rule}: 2-Wasserstein distance from the true conditional (of deviation {size:.3f})")
        for (r, j), found in table.items():
            print(f"  {r:2d} times {j} steps, {total(laps(len(LEVELS) - 1, r, j)):3d} calls: {found:.4f}")
        for jump in (1, 4):
            falling = [table[r, jump] for r in (1, 2, 5, 10)]
            assert all(more < less for less, more in pairwise(falling)), falling
            assert table[10, jump] < 0.6 * table[1, jump]


# laps


def test_laps_cover_the_run_and_leave_the_first_step_out() -> None:
    assert laps(20, 1, 5) == (Lap(0, 20),) and laps(1, 7, 3) == (Lap(0, 1),)
    assert laps(8, 2, 4) == (Lap(0, 1), Lap(1, 5), Lap(1, 5), Lap(5, 8), Lap(5, 8))
    for n, times, jump in [(1, 1, 1), (2, 3, 1), (20, 10, 10), (25, 4, 7), (3, 2, 100)]:
        walk = laps(n, times, jump)
        assert total(walk) == (n if times == 1 else 1 + (n - 1) * times)
        assert sorted({i for lap in walk for i in range(*lap)}) == list(range(n))
    for wrong in [(0, 1), (1, 0)]:
        with pytest.raises(UsageError, match="at least 1"):
            laps(20, *wrong)


def small(x: Tensor, sigma: float) -> Estimate:
    return Estimate(PREDICTIONS["v_prediction"].to_x0(x, sigma, network(x * c_in(sigma), float(SD.t(sigma)))))


@pytest.mark.parametrize("row", ROWS)
def test_one_lap_has_the_bits_of_the_solver_and_parts_go_on_as_parts(row: Scheduler) -> None:
    solver = row.bound({}, SD)
    x = UNIT * LEVELS[0]
    plain = list(solver(small, x, LEVELS, field, None))
    whole = list(walked(solver, small, x, LEVELS, field, laps(12, 1, 3)))
    rest = list(walked(solver, small, plain[4].x, LEVELS, field, (Lap(0, 4), Lap(4, 7)), skipped=5))
    alone = list(solver(small, plain[4].x, LEVELS, field, Step(4, LEVELS[5], plain[4].x, plain[4].x, 0)))
    assert [s.index for s in rest] == list(range(7))
    for a, b in [*zip(plain, whole, strict=True), *zip(alone, rest, strict=True)]:
        assert torch.equal(a.x, b.x) and torch.equal(a.x0, b.x0) and (a.sigma, a.calls) == (b.sigma, b.calls)


@pytest.mark.parametrize("row", ROWS)
def test_a_walk_goes_on_after_any_step_with_the_same_bits(row: Scheduler) -> None:
    """Also where the next thing is a throw back; with noise that is a sequence, whose state is put back."""
    solver, walk, x = row.bound({}, SD), laps(8, 2, 3), UNIT * LEVELS[0]
    sigmas = (*LEVELS[:8], 0.0)
    generator = torch.Generator().manual_seed(5)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(UNIT.shape, generator=generator)

    def steps(resume: Step | None) -> Iterator[tuple[Step, Tensor]]:
        for step in walked(solver, small, x, sigmas, noise, walk, resume=resume):
            yield step, generator.get_state()

    whole = list(steps(None))
    assert [s.index for s, _ in whole] == list(range(total(walk))) == list(range(15))
    assert whole[-1][0].sigma == 0 and torch.isfinite(whole[-1][0].x).all()
    for k in (0, 2, 3, 4, 6, 12, 13):
        step, state = whole[k]
        generator.set_state(state)
        for (a, _), (b, _) in zip(whole[k + 1 :], steps(pickle.loads(pickle.dumps(step))), strict=True):
            assert torch.equal(a.x, b.x) and (a.index, a.sigma, a.calls) == (b.index, b.sigma, b.calls)


def test_a_throw_back_asks_for_its_noise_and_forgets_the_steps_before() -> None:
    asked: list[tuple[float, float]] = []

    def noise(sigma: float, sigma_next: float) -> Tensor:
        asked.append((sigma, sigma_next))
        return torch.ones_like(UNIT)

    solver, sigmas = SCHEDULERS["dpm++2m"].bound({}, SD), LEVELS[:6]
    steps = list(walked(solver, small, UNIT * LEVELS[0], sigmas, noise, laps(5, 2, 2)))
    assert asked == [(sigmas[3], sigmas[1]), (sigmas[5], sigmas[3])]
    assert [len(step.past) for step in steps] == [1, 2, 3, 1, 2, 3, 4, 1, 2]
    assert [step.calls for step in steps] == list(range(1, 10))
    thrown = steps[2].x + math.sqrt(sigmas[1] ** 2 - sigmas[3] ** 2)
    assert torch.equal(steps[3].past[0].x, thrown) and steps[3].past[0].sigma == sigmas[1]


@pytest.mark.parametrize("anew", [True, False])
def test_a_brownian_path_is_another_in_each_lap(anew: bool) -> None:
    """On one and the same path, a second lap gets the noise again that x still holds, and what is held is then not
    noise of its level any more; with a path of its own, and other noise for the throws, it is.
    """
    shape, generator = (1, 64, 64), torch.Generator().manual_seed(9)
    sigmas = (10.0, 8.0, 6.4, 5.1, 4.0, 3.2)

    def path(lap: int) -> Noise:
        return Brownian([lap if anew else 0], shape, torch.device("cpu"), sigmas[-1], sigmas[0])

    def noise(sigma: float, sigma_next: float) -> Tensor:
        return torch.randn((1, *shape), generator=generator)

    denoise = held(lambda x, sigma: Estimate(x), torch.zeros(1, *shape), lambda sigma: torch.zeros(1))
    walk = walked(
        SCHEDULERS["dpm++sde"].bound({}, SD), denoise, 10 * noise(0, 0), sigmas, noise, laps(5, 3, 1), path=path
    )
    off = [abs(float(step.x.std()) / step.sigma - 1) * math.sqrt(2 * 64 * 64) for step in walk]
    print(f"{max(off):.1f} standard errors off")
    assert max(off) < 4 if anew else max(off) > 10
