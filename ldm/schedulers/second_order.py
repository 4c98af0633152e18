"""Two network calls a step: Heun (Karras et al. 2022, arXiv:2206.00364), the midpoint methods of Lu et al. 2022
(arXiv:2206.00927, 2211.01095), and their ancestral and stochastic forms in k-diffusion.
"""

import math
from collections.abc import Callable

from torch import Tensor

from ldm.schedulers.solver import Advance, Leg, Past, renewal


def heun() -> Advance:
    """The mean of the slopes (x - x0) / sigma at both ends of the step (Karras et al., algorithm 1).

    One call in a step to sigma 0, where it is Euler's.
    """

    def advance(leg: Leg) -> Tensor:
        slope, length = leg.starts[0].slope, leg.next - leg.sigma
        if leg.next > 0:
            slope = (slope + leg.again(leg.x + length * slope, leg.next).slope) / 2
        return leg.x + length * slope

    return advance


def dpm2(eta: float = 0.0) -> Advance:
    """The slope in the middle of the step, in log sigma: DPM-Solver-2 in the frame of Karras et al.; k-diffusion.

    eta: 0, or 1 for the ancestral form, which goes down to sigma_down and adds noise. One call in a step to sigma 0.
    UsageError: eta outside 0..1.
    """
    return _by_the_middle(eta, lambda leg, middle, down: leg.x + (down - leg.sigma) * middle.slope)


def dpmpp_2s_ancestral(eta: float = 1.0) -> Advance:
    """DPM-Solver++(2S) with ancestral noise: x0 of the middle of the step, in log sigma, for the whole of it.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 1 with r = 1/2; k-diffusion's noise. One call in a step to sigma 0.
    UsageError: eta outside 0..1.
    """
    return _by_the_middle(eta, lambda leg, middle, down: leg.toward(middle.x0, down))


def _by_the_middle(eta: float, end: Callable[[Leg, Past, float], Tensor]) -> Advance:
    """A step to sigma_down by what the network says half-way there in log sigma, then noise up to the next level."""
    split = renewal(eta)

    def advance(leg: Leg) -> Tensor:
        down, fresh = split(leg.sigma, leg.next)
        if down == 0:
            return leg.toward(leg.x0, 0.0)
        # at eta 1 this is the next level but for rounding; a hair off, since that may have a rounded time of its own
        middle = math.sqrt(leg.sigma * down) * (1 - 1e-9)
        return leg.renewed(end(leg, leg.again(leg.toward(leg.x0, middle), middle), down), fresh)

    return advance


def dpmpp_sde(eta: float = 1.0) -> Advance:
    """DPM-Solver++ for the reverse SDE with r = 1/2: as the 2S form, with noise also on the way to the middle.

    k-diffusion, and diffusers' DPMSolverSDE. The two pieces of noise lie on one Brownian path. One call in a step to
    sigma 0. UsageError: eta outside 0..1.
    """
    split = renewal(eta)

    def advance(leg: Leg) -> Tensor:
        if leg.next == 0:
            return leg.toward(leg.x0, 0.0)
        middle = math.sqrt(leg.sigma * leg.next)
        down, fresh = split(leg.sigma, middle)
        ahead = leg.again(leg.renewed(leg.toward(leg.x0, down), fresh, middle), middle)
        down, fresh = split(leg.sigma, leg.next)
        return leg.renewed(leg.toward(ahead.x0, down), fresh)

    return advance
