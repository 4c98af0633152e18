"""What a network predicts, and what it says of the clean image.

Noisy samples are written x = x0 + sigma * noise (Karras et al. 2022, arXiv:2206.00364). Networks see them scaled to
unit variance,

    x * c_in(sigma) = alpha * x0 + beta * noise,

with the signal rate alpha = c_in and the noise rate beta = sigma * c_in on the unit circle (alpha^2 = alphas_cumprod).
Every kind of prediction is a point in the plane of x0 and noise,

    output = of_x0(alpha, beta) * x0 + of_noise(alpha, beta) * noise,

and that one row gives both the loss's target and, with the line above solved for x0, the denoiser used in sampling.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Rate = float | Tensor


class Estimate(NamedTuple):
    """What a denoiser says of a noisy x [B, C, H, W]: the clean image, and its variance if a model learned one."""

    x0: Tensor
    variance: Tensor | None = None


Denoiser = Callable[[Tensor, float], Estimate]
"""(x = x0 + sigma * noise [B, C, H, W], sigma) -> Estimate. The whole batch shares the noise level."""


def c_in(sigma: float) -> float:
    """1 / sqrt(1 + sigma^2), which scales x to unit variance: the signal rate. 0 at sigma = inf."""
    return 1 / math.hypot(1.0, sigma)


def rates(sigma: float) -> tuple[float, float]:
    """Signal and noise rate (sqrt(alphas_cumprod), sqrt(1 - alphas_cumprod)) of a level; (0, 1) at sigma = inf."""
    return c_in(sigma), 1.0 if math.isinf(sigma) else sigma * c_in(sigma)


@dataclass(frozen=True)
class Prediction:
    """One kind of network output, as its coordinates on x0 and on noise at given signal and noise rates."""

    of_x0: Callable[[Rate, Rate], Rate]
    of_noise: Callable[[Rate, Rate], Rate]

    def target(self, x0: Tensor, noise: Tensor, alpha: Rate, beta: Rate) -> Tensor:
        """What the network should have said. x0, noise [B, ...]; the rates are floats or broadcast against them."""
        return self.of_x0(alpha, beta) * x0 + self.of_noise(alpha, beta) * noise

    def determinant(self, alpha: Rate, beta: Rate) -> Rate:
        """Of the map from (x0, noise) to the network's (input, output): alpha of epsilon, 1 of v, -beta of sample."""
        return alpha * self.of_noise(alpha, beta) - beta * self.of_x0(alpha, beta)

    def c_skip(self, sigma: float) -> float:
        """Factor of x in x0 = c_skip * x + c_out * output. sigma in (0, inf]."""
        alpha, beta = rates(sigma)
        determinant = float(self.determinant(alpha, beta))
        return alpha * float(self.of_noise(alpha, beta)) / determinant if determinant else 1.0

    def c_out(self, sigma: float) -> float:
        """Factor of the output there. sigma in (0, inf]; -inf for epsilon at inf, which says nothing of x0."""
        alpha, beta = rates(sigma)
        determinant = float(self.determinant(alpha, beta))
        return -beta / determinant if determinant else -math.inf

    def to_x0(self, x: Tensor, sigma: float, output: Tensor) -> Tensor:
        """The clean image a network's output stands for. x = x0 + sigma * noise, finite; output of the same shape."""
        return self.c_skip(sigma) * x + self.c_out(sigma) * output


PREDICTIONS: dict[str, Prediction] = {
    # noise itself: Ho et al. 2020 (arXiv:2006.11239), eq. 14
    "epsilon": Prediction(of_x0=lambda alpha, beta: 0.0, of_noise=lambda alpha, beta: 1.0),
    # the velocity of the rotation from image to noise: Salimans & Ho 2022 (arXiv:2202.00512), appendix D
    "v_prediction": Prediction(of_x0=lambda alpha, beta: -beta, of_noise=lambda alpha, beta: alpha),
    # the clean image
    "sample": Prediction(of_x0=lambda alpha, beta: 1.0, of_noise=lambda alpha, beta: 0.0),
}
