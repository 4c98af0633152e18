"""Multistep methods on the slopes dx/dsigma of the last steps: PNDM (Liu et al. 2022, arXiv:2202.09778), LMS
(k-diffusion) and DEIS (Zhang & Chen 2023, arXiv:2204.13902).
"""

import math
from collections.abc import Callable, Sequence

from numpy.polynomial import Polynomial
from torch import Tensor

from ldm.diffusion.prediction import PREDICTIONS, rates
from ldm.diffusion.schedule import NoiseSchedule
from ldm.schedulers.solver import Advance, Leg, Past, weighted_sum

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(schedule: NoiseSchedule, skip_prk_steps: bool = True, prediction: str = "epsilon") -> Advance:
    """Adams-Bashforth of order 4 on the network's output, as if the levels were evenly spaced.

    Liu et al. 2022, equation 12, with DDIM as the transfer (eq. 9). Below order 4 it begins with one step of Heun
    ("PLMS" of latent diffusion, skip_prk_steps) or with three of Runge-Kutta over the middle timestep (algorithm 2).
    prediction: what is extrapolated, a name of PREDICTIONS: noise in the paper, in diffusers what the network says.
    """
    kind = PREDICTIONS[prediction]

    def output(at: Past) -> Tensor:
        return kind.target(at.x0, at.slope, *rates(at.sigma))

    def to(leg: Leg, said: Tensor, sigma: float) -> Tensor:
        return leg.toward(kind.to_x0(leg.x, leg.sigma, said), sigma)

    def runge_kutta(leg: Leg) -> Tensor:
        t, t_next = (round(schedule.t(max(level, schedule.sigmas[0]))) for level in (leg.sigma, leg.next))
        middle = schedule.sigma(t - (t - t_next) // 2)
        said = [output(leg.starts[0])]
        for sigma in (middle, middle, leg.next):
            said.append(output(leg.again(to(leg, said[-1], sigma), sigma)))
        return to(leg, weighted_sum((1 / 6, 1 / 3, 1 / 3, 1 / 6), said), leg.next)

    def advance(leg: Leg) -> Tensor:
        if not skip_prk_steps and leg.index < 3 and leg.next > 0:
            return runge_kutta(leg)
        said = [output(start) for start in leg.starts[: len(ADAMS_BASHFORTH)]]
        if leg.index == 0 and leg.left > 1:
            ahead = leg.again(to(leg, said[0], leg.next), leg.next)
            return to(leg, (said[0] + output(ahead)) / 2, leg.next)
        return to(leg, weighted_sum(ADAMS_BASHFORTH[len(said) - 1], said), leg.next)

    return advance


def lms(order: int = 4) -> Advance:
    """The slopes' polynomial in sigma through the last `order` levels, integrated over the step; k-diffusion."""

    def weights(sigmas: Sequence[float], end: float) -> list[float]:
        wholes = [basis.integ() for basis in _lagrange(sigmas)]
        return [float(whole(end) - whole(sigmas[0])) for whole in wholes]

    return _multistep(weights, order, lower_order_final=False)


def deis(solver_order: int = 2, lower_order_final: bool = True) -> Advance:
    """The slopes' polynomial in log sigma ("logrho") through the last `solver_order` levels, integrated over the step.

    Zhang & Chen 2023, equation 15 with rho = sigma. As diffusers has it the last steps are of lower order below 15
    steps; and a step to sigma 0, where log sigma ends, is of first order.
    """

    def weights(sigmas: Sequence[float], end: float) -> list[float]:
        # p(u) e^u has the integral (p - p' + p'' - ...) e^u, and du = dsigma / sigma
        logs, log_end, parts = [math.log(sigma) for sigma in sigmas], math.log(end), []
        for basis in _lagrange(logs):
            whole = sum((basis.deriv(k) * (-1) ** k for k in range(1, len(sigmas))), basis)
            parts.append(float(whole(log_end)) * end - float(whole(logs[0])) * sigmas[0])
        return parts

    return _multistep(weights, solver_order, lower_order_final)


def _multistep(
    weights: Callable[[Sequence[float], float], list[float]], order: int, lower_order_final: bool
) -> Advance:
    """x_next = x + sum_k weights_k slope_k over the last `order` slopes, fewer at the beginning."""

    def advance(leg: Leg) -> Tensor:
        most = min(order, leg.left) if lower_order_final and len(leg.sigmas) <= 15 else order
        starts = leg.starts[: 1 if leg.next == 0 and lower_order_final else most]
        if len(starts) == 1:
            return leg.toward(leg.x0, leg.next)
        return leg.x + weighted_sum(weights([s.sigma for s in starts], leg.next), [s.slope for s in starts])

    return advance


def _lagrange(points: Sequence[float]) -> list[Polynomial]:
    """The polynomials that are 1 at one of the points and 0 at the others."""
    bases = []
    for j, own in enumerate(points):
        others = [p for k, p in enumerate(points) if k != j]
        bases.append(Polynomial.fromroots(others) / math.prod(own - p for p in others))
    return bases
