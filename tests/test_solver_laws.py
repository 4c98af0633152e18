"""The order of every solver, in float64, against the solution of its differential equation."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ldm.diffusion import Estimate, NoiseSchedule
from ldm.diffusion.grids import exponential, karras
from ldm.schedulers import SCHEDULERS, Option, Past, Scheduler, Step

pytestmark = pytest.mark.usefixtures("one_thread")
SD = NoiseSchedule.scaled_linear()
LOW, HIGH = 0.3, 6.0
GRIDS = {"karras": karras, "even in log sigma": exponential}

# The mixture of two Gaussians of deviation SPREAD around 0.2 -+ 0.5, of weights 1 to 2, has the posterior mean, and so
# the ideal denoiser, in closed form.

SPREAD = 0.6
STARTS = HIGH * torch.linspace(-1.5, 1.5, 5, dtype=torch.float64).view(1, 1, 1, 5)


def mixture(x: Tensor, sigma: float) -> Estimate:
    total = SPREAD**2 + sigma**2
    upper = torch.sigmoid((x - 0.2) / total + math.log(2))
    return Estimate((x * SPREAD**2 + (upper - 0.3) * sigma**2) / total)


@cache
def solution(times: int, low: float, high: float) -> Callable[[float], Tensor]:
    """x(sigma) of dx/dsigma = times (x - x0) / sigma: the probability flow (1), or the SDE without its noise (2)."""

    def slope(u: float, x: Any) -> Any:
        return times * (x - mixture(torch.from_numpy(x), math.exp(u)).x0.numpy())

    start = STARTS.flatten().numpy() * high / HIGH
    span = (math.log(high), math.log(low))
    found = solve_ivp(slope, span, start, "DOP853", dense_output=True, rtol=1e-12, atol=1e-14)
    return lambda sigma: torch.from_numpy(found.sol(math.log(sigma))).view_as(STARTS)


def nothing(sigma: float, sigma_next: float) -> Tensor:
    return torch.zeros_like(STARTS)


def errors(
    row: Scheduler, options: dict[str, Option], times: int, lay_out: Any, lengths: Sequence[int], memory: int,
    low: float = LOW, high: float = HIGH, schedule: NoiseSchedule = SD,
) -> list[float]:  # fmt: skip
    """The error at the end of runs of these lengths, with so many first steps taken from the solution itself."""
    exact, found = solution(times, low, high), []
    for n in lengths:
        sigmas = lay_out(n + 1, low, high).tolist()
        past = tuple(Past(s, exact(s), mixture(exact(s), s).x0) for s in sigmas[:memory][::-1])
        x = exact(sigmas[memory])
        step = Step(memory - 1, sigmas[memory], x, x, memory, past) if memory else None
        (*_, last) = row.bound(options, schedule)(mixture, STARTS * high / HIGH, sigmas, nothing, step)
        assert last.x.dtype == torch.float64 and last.sigma == sigmas[-1] and last.index == n - 1
        found.append(float((last.x - exact(low)).abs().max()))
    return found


def fitted(lengths: Sequence[int], found: Sequence[float]) -> float:
    return float(-np.polyfit(np.log(lengths), np.log(found), 1)[0])


WHOLE: dict[str, Option] = {"lower_order_final": False}
NO_CORRECTION = {"disable_corrector": tuple(range(1000))}


def orders() -> Iterator[tuple[str, dict[str, Option], int, int, float]]:
    """Row, options, of the flow or of the SDE's mean, steps taken from the solution, order."""
    for name in ("ddim", "euler", "dpm++1", "dpm++1s"):
        yield name, {}, 1, 0, 1
    for name in ("ddpm", "euler_a", "dpm++1_sde"):
        yield name, {}, 2, 0, 1
    for name in ("ddim", "euler_a", "dpm2_a", "dpm++2s_a"):  # what they split off to add as noise is of first order
        yield name, {"eta": 1.0}, 2, 0, 1
    for name in ("heun", "dpm2", "dpm++2m", "dpm_solver", "dpm++2s"):
        yield name, {}, 1, 0, 2
    for name in ("dpm2_a", "dpm++2s_a", "dpm++sde"):
        yield name, {"eta": 0.0}, 1, 0, 2
    for name in ("dpm++2m_sde", "dpm++2m_sde_heun", "dpm_solver_sde", "dpm++sde"):
        yield name, {}, 2, 0, 2
    for algorithm, order, kind in product(("dpmsolver++", "dpmsolver"), (1, 2, 3), ("midpoint", "heun")):
        for times in (1, 2):
            options = {"algorithm_type": "sde-" * (times == 2) + algorithm, "solver_order": order, "solver_type": kind}
            yield "dpm++2s", options | WHOLE, times, 0, order
            # the multistep form of order 3 takes half of D_2, as its authors' code does: it stays of order 2
            yield "dpm++2m", options | WHOLE, times, order - 1, min(order, 2)
    for order, kind, of_data in product((1, 2, 3), ("bh1", "bh2"), (True, False)):
        options = {"solver_order": order, "solver_type": kind, "predict_x0": of_data} | WHOLE
        yield "unipc", options, 1, order, order + 1
        yield "unipc", options | NO_CORRECTION, 1, order - 1, order
    yield "unipc", {"solver_order": 4} | WHOLE, 1, 4, 5
    yield from (("deis", {"solver_order": order, **WHOLE}, 1, order - 1, order) for order in (1, 2, 3))
    yield from (("lms", {"order": order}, 1, order - 1, order) for order in (1, 2, 3, 4))


RUNS = [(*case, grid) for k, case in enumerate(orders()) for g, grid in enumerate(GRIDS) if k < 25 or (k + g) % 2]


@pytest.mark.parametrize(("name", "options", "times", "memory", "order", "grid"), RUNS)
def test_order_of_convergence(
    name: str, options: dict[str, Option], times: int, memory: int, order: float, grid: str
) -> None:
    lengths = [120, 240] if memory and name in ("dpm++2m", "unipc") else [48, 96]  # those whose error changes its sign
    found = errors(SCHEDULERS[name], options, times, GRIDS[grid], lengths, memory)
    assert abs(fitted(lengths, found) - order) < 0.2, found


@pytest.mark.parametrize(("skip_prk_steps", "memory"), [(False, 0), (True, 3)])
def test_pndm_is_of_order_4_on_even_levels(skip_prk_steps: bool, memory: int) -> None:
    """Its weights are those of even steps; Runge and Kutta's start is of that order too (Heun's is not)."""
    levels = np.linspace(LOW, 3.0, 3841)  # so that those visited, and the middles in between, lie on times
    alphas_cumprod = 1 / (1 + levels**2)
    even = NoiseSchedule.trained(1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]]))
    options: dict[str, Option] = {"skip_prk_steps": skip_prk_steps}
    found = errors(
        SCHEDULERS["plms"],
        options,
        1,
        lambda n, low, high: np.linspace(high, low, n),
        (96, 192),
        memory,
        LOW,
        3.0,
        even,
    )
    assert abs(fitted((96, 192), found) - 4) < 0.2, found
