"""What every solver is: one rule of how to step, walked down a list of noise levels with all its state in the call.

A solver is written as an Advance, which makes one step; `solve` does what they have in common: it calls the network
where x stands, remembers the last steps for those that extrapolate, counts calls, and yields after every step. So a
solver is its paper's equations, and any run can be stopped, pickled and taken up again.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.prediction import Denoiser, Estimate
from ldm.errors import UsageError

MEMORY = 4  # steps that are remembered: as many as a corrector of order 4 wants


class Past(NamedTuple):
    """Where a step began: its level, x there (as the solver corrected it) and the network's x0. [B, C, H, W]"""

    sigma: float
    x: Tensor
    x0: Tensor

    @property
    def slope(self) -> Tensor:
        """dx / dsigma = (x - x0) / sigma, the noise in x: Karras et al. 2022 (arXiv:2206.00364), eq. 1."""
        return (self.x - self.x0) / self.sigma


@dataclass(frozen=True, slots=True)
class Step:
    """What a solver yields after each step, and all it needs to go on from there; it can be pickled.

    index: from 0. sigma: the level reached. x: x0 + sigma * noise there. x0: the network's estimate at the step's
    beginning, the best there is of the picture. calls: of the network so far. past: the last steps' beginnings, newest
    first. scale, state: the factor of x in `latents`, and where the noise stands; both filled in by whoever runs it. No
    tensor is written to again. Progress, previews, streaming and stopping are the caller's loop.
    """

    index: int
    sigma: float
    x: Tensor
    x0: Tensor
    calls: int
    past: tuple[Past, ...] = ()
    scale: float = 1.0
    state: tuple[bytes, ...] = ()

    @property
    def latents(self) -> Tensor:
        """x in the network's frame: of the last step, what a decoder takes. [B, C, H, W]"""
        return self.x * self.scale


Noise = Callable[[float, float], Tensor]
"""(sigma, next sigma) -> fresh unit noise of x's shape, dtype and device for that interval; called in order, once for
each interval that adds noise. A source that is a sequence ignores the levels; a Brownian path does not."""

Solver = Callable[[Denoiser, Tensor, Sequence[float], Noise, Step | None], Iterator[Step]]
"""(denoise, x at sigmas[0], n + 1 falling levels, noise, step to go on from) -> Steps."""

Split = Callable[[float, float], tuple[float, float]]
"""(sigma, next sigma) -> how much of the noise at the next level is the old noise kept, and how much is drawn fresh."""


@dataclass
class Leg:
    """A step under way, from x at `sigma` to `next`: what the rule may read, and the x it may correct."""

    denoise: Denoiser
    noise: Noise
    sigmas: Sequence[float]
    index: int
    x: Tensor
    said: Estimate
    past: tuple[Past, ...]
    calls: int

    @property
    def sigma(self) -> float:
        """The level where the step begins."""
        return self.sigmas[self.index]

    @property
    def next(self) -> float:
        """The level where it ends."""
        return self.sigmas[self.index + 1]

    @property
    def left(self) -> int:
        """How many steps the run still has, this one included."""
        return len(self.sigmas) - 1 - self.index

    @property
    def x0(self) -> Tensor:
        """The network's estimate at the beginning."""
        return self.said.x0

    @property
    def starts(self) -> tuple[Past, ...]:
        """The beginnings of this step and of those before it, newest first."""
        return (Past(self.sigma, self.x, self.x0), *self.past)

    def again(self, x: Tensor, sigma: float) -> Past:
        """One more network call, at another point."""
        self.calls += 1
        return Past(sigma, x, self.denoise(x, sigma).x0)

    def toward(self, x0: Tensor, sigma: float) -> Tensor:
        """x with its distance from x0 shrunk to what `sigma` leaves of it: the exact step if x0 were constant."""
        return x0.lerp(self.x, sigma / self.sigma)

    def renewed(self, x: Tensor, fresh: float | Tensor, until: float | None = None) -> Tensor:
        """x with `fresh` times the noise of the way from `sigma` to `until` (default the step's end)."""
        if isinstance(fresh, float) and fresh <= 0:
            return x
        return x + fresh * self.noise(self.sigma, self.next if until is None else until)


Advance = Callable[[Leg], Tensor]
"""One step: x at leg.next."""


def solve(
    advance: Advance,
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    resume: Step | None = None,
) -> Iterator[Step]:
    """Walk x from sigmas[0] to sigmas[-1] by `advance`, or go on after the step `resume` of the same run (x is then not
    read), with the same bits as if it had never stopped.
    """
    begin, calls, past = (resume.index + 1, resume.calls, resume.past) if resume else (0, 0, ())
    x = resume.x if resume else x
    for i in range(begin, len(sigmas) - 1):
        leg = Leg(denoise, noise, sigmas, i, x, denoise(x, sigmas[i]), past, calls + 1)
        x = advance(leg)
        calls, past = leg.calls, leg.starts[:MEMORY]
        yield Step(i, leg.next, x, leg.x0, calls, past)


def first_order(split: Split) -> Advance:
    """x_next = x0 + kept * (x - x0) / sigma + fresh * noise: every one-step, one-call method in this frame."""

    def advance(leg: Leg) -> Tensor:
        kept, fresh = split(leg.sigma, leg.next)
        return leg.renewed(leg.toward(leg.x0, kept), fresh)

    return advance


def renewal(eta: float) -> Split:
    """The fresh noise has eta times the deviation of the posterior q(x_next | x, x0), and the rest is kept.

    fresh^2 = eta^2 sigma_next^2 (1 - sigma_next^2 / sigma^2) and kept^2 + fresh^2 = sigma_next^2; k-diffusion calls the
    two sigma_up and sigma_down. UsageError: eta outside 0..1.
    """
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta}; it must be from 0 (no fresh noise) to 1 (as much as DDPM)")

    def split(sigma: float, sigma_next: float) -> tuple[float, float]:
        ratio = sigma_next / sigma
        fresh = eta * sigma_next * math.sqrt(max(0.0, 1 - ratio**2))
        return sigma_next * math.hypot(math.sqrt(1 - eta**2), eta * ratio), fresh

    return split


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum_k weights[k] * tensors[k]."""
    return torch.stack([w * t for w, t in zip(weights, tensors, strict=True)]).sum(0)
