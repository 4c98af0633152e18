"""What a network predicts, and what it says of the clean image.

Noisy samples are written x = x0 + sigma * noise (Karras et al. 2022, arXiv:2206.00364). Networks see them scaled,

    x * c_in(sigma) = alpha * x0 + beta * noise,

with the signal rate alpha = c_in and the noise rate beta = sigma * c_in: on the unit circle in the variance-preserving
frame (alpha^2 = alphas_cumprod), on the line alpha + beta = 1 in that of flow matching. Every kind of prediction is a
point in the plane of x0 and noise,

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
    """What a denoiser says of a noisy x [B, C, H, W]: the clean image, and a model that learned it (Nichol & Dhariwal
    2021) of the variance of a step, raw.
    """

    x0: Tensor
    variance: Tensor | None = None


Denoiser = Callable[[Tensor, float], Estimate]
"""(x = x0 + sigma * noise [B, C, H, W], sigma) -> Estimate. The whole batch shares the noise level."""


def c_in(sigma: float) -> float:
    """1 / sqrt(1 + sigma^2), which scales x to unit variance: the signal rate. 0 at sigma = inf."""
    return 1 / math.hypot(1.0, sigma)


def rates(sigma: float) -> tuple[float, float]:
    """Signal and noise rate (sqrt(alphas_cumprod), sqrt(1 - alphas_cumprod)) of a level; (0, 1) at sigma = inf."""
    return _rates(c_in, sigma)


def _rates(c_in: Callable[[float], float], sigma: float) -> tuple[float, float]:
    return c_in(sigma), 1.0 if math.isinf(sigma) else sigma * c_in(sigma)


@dataclass(frozen=True)
class Prediction:
    """One kind of network output, as its coordinates on x0 and on noise at given signal and noise rates.

    c_in: sigma -> the factor of x in the network's input.
    """

    of_x0: Callable[[Rate, Rate], Rate]
    of_noise: Callable[[Rate, Rate], Rate]
    c_in: Callable[[float], float] = c_in

    def target(self, x0: Tensor, noise: Tensor, alpha: Rate, beta: Rate) -> Tensor:
        """What the network should have said. x0, noise [B, ...]; the rates are floats or broadcast against them."""
        return self.of_x0(alpha, beta) * x0 + self.of_noise(alpha, beta) * noise

    def determinant(self, alpha: Rate, beta: Rate) -> Rate:
        """Of the map from (x0, noise) to the network's (input, output): alpha of epsilon, 1 of v, -beta of sample."""
        return alpha * self.of_noise(alpha, beta) - beta * self.of_x0(alpha, beta)

    def c_skip(self, sigma: float) -> float:
        """Factor of x in x0 = c_skip * x + c_out * output. sigma in (0, inf]."""
        alpha, beta = _rates(self.c_in, sigma)
        determinant = float(self.determinant(alpha, beta))
        return alpha * float(self.of_noise(alpha, beta)) / determinant if determinant else 1.0

    def c_out(self, sigma: float) -> float:
        """Factor of the output there. sigma in (0, inf]; -inf for epsilon at inf, which says nothing of x0."""
        alpha, beta = _rates(self.c_in, sigma)
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

FLOW = Prediction(lambda alpha, beta: -1.0, lambda alpha, beta: 1.0, c_in=lambda sigma: 1 / (1 + sigma))
"""The velocity noise - x0 of the straight line from image to noise: Lipman et al. 2023 (arXiv:2210.02747)."""


def edm(kind: str, sigma_data: float) -> Prediction:
    """The preconditioning of Karras et al. 2022, table 1, for data of this standard deviation.

    kind: "epsilon", theirs; "v_prediction" has the other sign, as in diffusers. At sigma_data 1 that is v.
    """
    sign = {"epsilon": 1.0, "v_prediction": -1.0}[kind]
    return Prediction(
        of_x0=lambda alpha, beta: sign * beta / sigma_data,
        of_noise=lambda alpha, beta: -sign * alpha * sigma_data,
        c_in=lambda sigma: 1 / math.hypot(sigma_data, sigma),
    )
