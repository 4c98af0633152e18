"""What every solver is: a generator that walks x down a list of noise levels, with all its state in the call."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.prediction import Denoiser, c_in
from ldm.errors import UsageError


@dataclass(frozen=True, slots=True)
class Step:
    """What a solver yields after each step: its index from 0, the level it reached, x there, and the x0 it made for.

    x = x0 + sigma * noise [B, C, H, W]; neither tensor is written to again. Progress, previews, streaming and stopping
    are the caller's loop.
    """

    index: int
    sigma: float
    x: Tensor
    x0: Tensor

    @property
    def latents(self) -> Tensor:
        """x in the network's frame, x * c_in(sigma): of the last step, what a decoder takes. [B, C, H, W]"""
        return self.x * c_in(self.sigma)


Noise = Callable[[], Tensor]
"""Draws fresh unit noise of x's shape, dtype and device; called once for each step that adds noise, in order."""

Solver = Callable[[Denoiser, Tensor, Sequence[float], Noise], Iterator[Step]]
"""(denoise, x at sigmas[0], n + 1 falling levels, noise) -> n Steps. Solvers know nothing of timesteps."""

Split = Callable[[float, float], tuple[float, float]]
"""(sigma, next sigma) -> how much of the noise at the next level is the old noise kept, and how much is drawn fresh."""


def first_order(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, split: Split) -> Iterator[Step]:
    """x_next = x0 + kept * (x - x0) / sigma + fresh * noise: every one-step, one-call method in this frame."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        kept, fresh = split(sigma, sigma_next)
        x0 = denoise(x, sigma).x0
        x = x0.lerp(x, kept / sigma)
        if fresh > 0:
            x = x + fresh * noise()
        yield Step(index, sigma_next, x, x0)


def renewal(eta: float) -> Split:
    """The fresh noise has eta times the deviation of the posterior q(x_next | x, x0), and the rest is kept.

    fresh^2 = eta^2 sigma_next^2 (1 - sigma_next^2 / sigma^2) and kept^2 + fresh^2 = sigma_next^2.
    UsageError: eta outside 0..1.
    """
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta}; it must be from 0 (no fresh noise) to 1 (as much as DDPM)")

    def split(sigma: float, sigma_next: float) -> tuple[float, float]:
        ratio = sigma_next / sigma
        return sigma_next * math.hypot(math.sqrt(1 - eta**2), eta * ratio), eta * sigma_next * math.sqrt(1 - ratio**2)

    return split
