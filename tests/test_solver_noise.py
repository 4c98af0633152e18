"""The law of a stochastic run against the recursion of its paper: exactly, and by samples."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion import Estimate, NoiseSchedule, c_in
from ldm.schedulers import SCHEDULERS, Option

pytestmark = pytest.mark.usefixtures("one_thread")
SD = NoiseSchedule.scaled_linear()
WHOLE: dict[str, Option] = {"lower_order_final": False}

# With a Gaussian denoiser x0 = (S^2 x + sigma^2 M) / (S^2 + sigma^2) every step is linear, and x is
# a number plus a sum of independent noises: here a vector of that number and of their factors.

MEAN, DEVIATION = 0.7, 0.5
LEVELS = (14.6, 8.0, 3.1, 1.4, 1.2, 0.5, 0.11, 0.03)
Vector = Any  # float64 [1 + noises]
Rule = Callable[[Vector, float, float, Callable[[], Vector], list[tuple[float, Vector]]], Vector]


def gaussian(x: Tensor, sigma: float) -> Estimate:
    return Estimate((DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2))


def x0_of(x: Vector, sigma: float) -> Vector:
    constant = np.zeros_like(x)
    constant[0] = MEAN * sigma**2 / (DEVIATION**2 + sigma**2)
    return x * DEVIATION**2 / (DEVIATION**2 + sigma**2) + constant


def of_ddpm(kind: str) -> Rule:
    """Ho et al. 2020, equations 6-7, in their frame, respaced."""

    def rule(x: Vector, s: float, n: float, z: Any, past: Any) -> Vector:
        a, a_next = 1 / (1 + s**2), 1 / (1 + n**2)
        beta = 1 - a / a_next
        x_t = x * a**0.5
        mean = a_next**0.5 * beta / (1 - a) * x0_of(x, s) + (1 - beta) ** 0.5 * (1 - a_next) / (1 - a) * x_t
        small, large = beta * (1 - a_next) / (1 - a), beta
        variance = {"small": small, "large": large, "range": small**0.75 * large**0.25, "learned": math.exp(-3)}[kind]
        return (mean + variance**0.5 * z()) / a_next**0.5

    return rule


def of_ddim(eta: float) -> Rule:
    """Song et al. 2021, equations 12 and 16."""

    def rule(x: Vector, s: float, n: float, z: Any, past: Any) -> Vector:
        a, a_next = 1 / (1 + s**2), 1 / (1 + n**2)
        x0 = x0_of(x, s)
        noise = (x * a**0.5 - a**0.5 * x0) / (1 - a) ** 0.5
        fresh = eta * ((1 - a_next) / (1 - a)) ** 0.5 * (1 - a / a_next) ** 0.5
        x_next = a_next**0.5 * x0 + (1 - a_next - fresh**2) ** 0.5 * noise + fresh * z()
        return x_next / a_next**0.5

    return rule


def ancestral(s: float, n: float) -> tuple[float, float]:
    up = (n**2 * (s**2 - n**2) / s**2) ** 0.5
    return (n**2 - up**2) ** 0.5, up


def of_dpm2(x: Vector, s: float, n: float, z: Any, past: Any) -> Vector:
    down, up = ancestral(s, n)
    middle = math.exp((math.log(s) + math.log(down)) / 2)
    x_2 = x + (x - x0_of(x, s)) / s * (middle - s)
    return x + (x_2 - x0_of(x_2, middle)) / middle * (down - s) + up * z()


def of_2s(x: Vector, s: float, n: float, z: Any, past: Any) -> Vector:
    down, up = ancestral(s, n)
    h = math.log(s / down)
    x_2 = math.exp(-h / 2) * x + (1 - math.exp(-h / 2)) * x0_of(x, s)
    return math.exp(-h) * x + (1 - math.exp(-h)) * x0_of(x_2, s * math.exp(-h / 2)) + up * z()


def of_sde(x: Vector, s: float, n: float, z: Any, past: Any) -> Vector:
    """Both noises are rises of one Brownian motion: over s..middle, and over s..n."""
    middle, first, second = (s * n) ** 0.5, z(), z()
    down, up = ancestral(s, middle)
    x_2 = down / s * x + (1 - down / s) * x0_of(x, s) + up * first
    down, up = ancestral(s, n)
    whole = ((s - middle) ** 0.5 * first + (middle - n) ** 0.5 * second) / (s - n) ** 0.5
    return down / s * x + (1 - down / s) * x0_of(x_2, middle) + up * whole


def of_multistep(order: int, heun: bool) -> Rule:
    """k-diffusion's 2M SDE and 3M SDE."""

    def rule(x: Vector, s: float, n: float, z: Any, past: list[tuple[float, Vector]]) -> Vector:
        x0, h = x0_of(x, s), math.log(s / n)
        x_next = math.exp(-2 * h) * x + (1 - math.exp(-2 * h)) * x0 + n * (1 - math.exp(-2 * h)) ** 0.5 * z()
        phi_2 = (math.exp(-2 * h) - 1) / (2 * h) + 1
        phi_3 = phi_2 / (2 * h) - 0.5
        if past:
            r_0 = math.log(past[0][0] / s) / h
            d_0 = (x0 - past[0][1]) / r_0
        if len(past) > 1 and order == 3:
            r_1 = math.log(past[1][0] / past[0][0]) / h
            d_1 = (past[0][1] - past[1][1]) / r_1
            d = d_0 + (d_0 - d_1) * r_0 / (r_0 + r_1)
            return x_next + phi_2 * d - phi_3 * (d_0 - d_1) / (r_0 + r_1)
        if past and order > 1:
            return x_next + (phi_2 if heun else (1 - math.exp(-2 * h)) / 2) * d_0
        return x_next

    return rule


def of_noise(x: Vector, s: float, n: float, z: Any, past: list[tuple[float, Vector]]) -> Vector:
    """sde-dpmsolver of order 2, in the variance-preserving frame: the noise twice, and half its first difference."""
    alpha, alpha_next, h = c_in(s), c_in(n), math.log(s / n)
    sigma_next, noise = n * alpha_next, (x - x0_of(x, s)) / s
    x_next = alpha_next / alpha * (alpha * x) - 2 * sigma_next * (math.exp(h) - 1) * noise
    if past:
        difference = (noise - past[0][1]) / (math.log(past[0][0] / s) / h)
        x_next = x_next - sigma_next * (math.exp(h) - 1) * difference
    return (x_next + sigma_next * (math.exp(2 * h) - 1) ** 0.5 * z()) / alpha_next


def of_tcd(eta: float) -> Rule:
    """Zheng et al. 2024, algorithm 4: down to the time s, then the forward process up to t_next."""

    def rule(x: Vector, s: float, n: float, z: Any, past: Any) -> Vector:
        x0, between = x0_of(x, s), SD.alphas_cumprod[math.floor((1 - eta) * SD.t(n) + 1e-6)]
        a_next = 1 / (1 + n**2)
        x_s = between**0.5 * x0 + (1 - between) ** 0.5 * (x - x0) / s
        return ((a_next / between) ** 0.5 * x_s + (1 - a_next / between) ** 0.5 * z()) / a_next**0.5

    return rule


def of_lcm(x: Vector, s: float, n: float, z: Any, past: Any) -> Vector:
    return x0_of(x, s) + n * z()


LAWS: dict[str, tuple[str, dict[str, Option], Rule]] = {
    **{f"ddpm {k}": ("ddpm", {"variance_type": f"fixed_{k}"}, of_ddpm(k)) for k in ("small", "large")},
    "ddpm range": ("ddpm", {"variance_type": "learned_range"}, of_ddpm("range")),
    "ddpm learned": ("ddpm", {"variance_type": "learned"}, of_ddpm("learned")),
    **{f"ddim {eta}": ("ddim", {"eta": eta}, of_ddim(eta)) for eta in (0.0, 0.4, 1.0)},
    "euler_a": ("euler_a", {}, of_ddim(1.0)),
    "euler_a 0.6": ("euler_a", {"eta": 0.6}, of_ddim(0.6)),
    "dpm++1_sde": ("dpm++1_sde", {}, of_multistep(1, False)),
    "dpm2_a": ("dpm2_a", {}, of_dpm2),
    "dpm++2s_a": ("dpm++2s_a", {}, of_2s),
    "dpm++sde": ("dpm++sde", {}, of_sde),
    "dpm++2m_sde": ("dpm++2m_sde", WHOLE, of_multistep(2, False)),
    "dpm++2m_sde_heun": ("dpm++2m_sde_heun", WHOLE, of_multistep(2, True)),
    "dpm++3m_sde": ("dpm++3m_sde", WHOLE, of_multistep(3, True)),
    "dpm_solver_sde": ("dpm_solver_sde", WHOLE, of_noise),
    "lcm": ("lcm", {}, of_lcm),
    "tcd 0.0": ("tcd", {"eta": 0.0}, of_ddim(0.0)),
    **{f"tcd {eta}": ("tcd", {"eta": eta}, of_tcd(eta)) for eta in (0.3, 1.0)},
}
SAID = {"ddpm range": -0.5, "ddpm learned": -3.0}  # of the variance: a quarter of the way up, and its logarithm


def law(rule: Rule, name: str) -> Vector:
    """x at the end as a number and the factors of its noises, the first of which it began with."""
    count = 2 + 2 * len(LEVELS)
    basis = iter(np.eye(count)[1:])
    x, past = LEVELS[0] * next(basis), []
    for s, n in pairwise(LEVELS):
        said = (x - x0_of(x, s)) / s if name == "dpm_solver_sde" else x0_of(x, s)
        x, past = rule(x, s, n, lambda: next(basis), past), [(s, said), *past][:2]
    return x


@pytest.mark.parametrize("name", LAWS)
def test_the_law_of_a_run_is_that_of_its_recursion(name: str) -> None:
    row, options, rule = LAWS[name]
    expected = law(rule, name)
    count = len(expected)
    eyes = iter(torch.eye(count, dtype=torch.float64)[1:])
    begun: dict[float, Tensor] = {}

    def denoise(x: Tensor, sigma: float) -> Estimate:
        said = gaussian(x, sigma).x0
        said[1:] -= gaussian(torch.zeros((), dtype=torch.float64), sigma).x0  # the factors have no constant
        variance = torch.full_like(x, SAID[name]) if name in SAID else None
        return Estimate(said, variance)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        """The rise over the step so far, for who asks twice; else fresh. Scaled by the learned deviation alone."""
        fresh = next(eyes).view(-1, 1, 1, 1)
        first = begun.get(sigma)
        begun[sigma] = fresh
        if first is None:
            return fresh
        middle = math.sqrt(sigma * sigma_next)
        rise = math.sqrt(sigma - middle) * first + math.sqrt(middle - sigma_next) * fresh
        return rise / math.sqrt(sigma - sigma_next)

    x = LEVELS[0] * next(eyes).view(-1, 1, 1, 1)
    (*_, last) = SCHEDULERS[row].bound(options, SD)(denoise, x, LEVELS, noise, None)
    torch.testing.assert_close(last.x.flatten(), torch.from_numpy(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in LAWS if name != "dpm++sde"])  # whose noise is no sequence
def test_samples_have_the_mean_and_variance_of_that_law(name: str) -> None:
    row, options, rule = LAWS[name]
    mean, *factors = law(rule, name)
    variance, count = float(np.square(factors).sum()), 8000
    generator = torch.Generator().manual_seed(3)

    def unit(sigma: float = 0.0, sigma_next: float = 0.0) -> Tensor:
        return torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)

    def denoise(x: Tensor, sigma: float) -> Estimate:
        return Estimate(gaussian(x, sigma).x0, torch.full_like(x, SAID[name]) if name in SAID else None)

    (*_, last) = SCHEDULERS[row].bound(options, SD)(denoise, LEVELS[0] * unit(), LEVELS, unit, None)
    assert abs(float(last.x.mean()) - mean) < 4 * math.sqrt(variance / count)
    assert abs(float(last.x.var()) - variance) < 4 * variance * math.sqrt(2 / count)
