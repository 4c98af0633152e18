"""DDPM: Ho et al. 2020 (arXiv:2006.11239); learned variances: Nichol & Dhariwal 2021 (arXiv:2102.09672)."""

import math
from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.schedule import VARIANCES
from ldm.errors import ModelError, choose
from ldm.schedulers.solver import Advance, Leg, renewal

_posterior = renewal(1.0)


def ddpm(variance_type: str = "fixed_small") -> Advance:
    """x_next = sqrt(a_next) b / (1 - a) x0 + sqrt(1 - b) (1 - a_next) / (1 - a) x + deviation * noise.

    Ho et al., equations 6-7 and algorithm 2; a is alphas_cumprod and b = 1 - a / a_next the variance added between the
    two levels: beta_t in a run over every timestep, else its respaced counterpart (Nichol & Dhariwal, eq. 19). Divided
    by sqrt(a_next) the mean reads x0 + (sigma_next / sigma)^2 (x - x0).

    variance_type: "fixed_small", the posterior's; "fixed_large", b; or what the network says of it beside its
    prediction: "learned_range", v in -1..1 between the two (their logarithms: Nichol & Dhariwal, eq. 15), and
    "learned", its logarithm itself (diffusers takes the value for the variance, which is not finite where it is below
    0). The last step, to sigma 0, draws no noise, as in the paper (diffusers' fixed_large draws some there unless the
    timestep is 0). UsageError: unknown variance. ModelError, when run: a learned one of a network that learned none.
    """
    deviation = DEVIATIONS[choose("variance_type", variance_type.removesuffix("_log"), DEVIATIONS)]

    def advance(leg: Leg) -> Tensor:
        x = leg.toward(leg.x0, leg.next**2 / leg.sigma)
        return leg.renewed(x, deviation(leg)) if leg.next > 0 else x

    return advance


def _small(leg: Leg) -> float:
    return _posterior(leg.sigma, leg.next)[1]


def _large(leg: Leg) -> float:
    # b / a_next = (1 + sigma_next^2) (1 - (1 + sigma_next^2) / (1 + sigma^2)), as 1 / a = 1 + sigma^2
    added = (1 + leg.next**2) * (leg.sigma**2 - leg.next**2) / (1 + leg.sigma**2)
    return math.sqrt(added)


def _learned(leg: Leg) -> Tensor:
    return (_said(leg) / 2).exp() * math.hypot(1, leg.next)


def _learned_range(leg: Leg) -> Tensor:
    low, high = math.log(_small(leg)), math.log(_large(leg))
    return (low + (_said(leg) + 1) / 2 * (high - low)).exp()


def _said(leg: Leg) -> Tensor:
    if leg.said.variance is None:
        raise ModelError("the scheduler wants a learned variance, and this network learned none; use fixed_small")
    return leg.said.variance


DEVIATIONS: dict[str, Callable[[Leg], float | Tensor]] = dict(
    zip(VARIANCES, (_small, _large, _learned, _learned_range), strict=True)
)
