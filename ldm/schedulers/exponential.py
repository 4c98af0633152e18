"""What the exponential integrators share: DPM-Solver (Lu et al. 2022, arXiv:2206.00927), DPM-Solver++ (2211.01095) and
UniPC (Zhao et al. 2023, arXiv:2302.04867).

They step in lambda = -log(sigma), by h = log(sigma / sigma_next), and integrate exactly what is linear in x. What is
left of the network is extrapolated: its x0 ("data prediction") or the noise in x ("noise prediction"). With m one of
them and derivatives D_k = h^k d^k m / dlambda^k at the step's beginning, all read

    x_next = carry * x - scale * (phi_1(hh) m + phi_2(hh) D_1 + phi_3(hh) D_2 + ...) + fresh * noise

with hh = -h (data) or h (noise), and phi as in `phis`. For the reverse SDE h is taken twice in the deterministic part.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ldm.errors import choose
from ldm.schedulers.solver import Leg, Past


class Algorithm(NamedTuple):
    """A name of diffusers' algorithm_type: whether x0 is extrapolated (else the noise in x), and of the SDE."""

    of_data: bool
    of_sde: bool

    def model(self, at: Past) -> Tensor:
        """What is extrapolated."""
        return at.x0 if self.of_data else at.slope

    def step(self, sigma: float, sigma_next: float) -> "Frame":
        """The coefficients of a step to a level above 0."""
        h, times = math.log(sigma / sigma_next), 1.0 + self.of_sde
        if self.of_data:
            fresh = sigma_next * math.sqrt(-math.expm1(-2 * h))
            return Frame(h, -times * h, math.exp(-times * h), 1.0, fresh * self.of_sde)
        fresh = math.sqrt(max(0.0, sigma**2 - sigma_next**2))
        return Frame(h, h, 1.0, times * sigma_next, fresh * self.of_sde)


class Frame(NamedTuple):
    """h > 0, the step in lambda; hh, carry, scale and fresh of the equation above."""

    h: float
    hh: float
    carry: float
    scale: float
    fresh: float

    def x_next(self, leg: Leg, x: Tensor, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
        """x at the end of the step, with noise; terms: factor and tensor of each summand in brackets."""
        total = self.carry * x
        for factor, tensor in terms:
            total = total - self.scale * factor * tensor
        return leg.renewed(total, self.fresh)


ALGORITHMS = {
    "dpmsolver": Algorithm(of_data=False, of_sde=False),
    "dpmsolver++": Algorithm(of_data=True, of_sde=False),
    "sde-dpmsolver": Algorithm(of_data=False, of_sde=True),
    "sde-dpmsolver++": Algorithm(of_data=True, of_sde=True),
}


def algorithm(name: str) -> Algorithm:
    """The algorithm of a name. UsageError: unknown (the nearest is offered)."""
    return ALGORITHMS[choose("algorithm_type", name, ALGORITHMS)]


def phis(hh: float, count: int) -> list[float]:
    """phi_1 .. phi_count: phi_1 = e^hh - 1 and phi_(k+1) = phi_k / hh - 1 / k!; hh is not 0."""
    values = [math.expm1(hh)]
    for k in range(1, count):
        values.append(values[-1] / hh - 1 / math.factorial(k))
    return values
