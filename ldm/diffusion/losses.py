"""The training objective of a denoiser."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.continuous import FlowSchedule
from ldm.diffusion.prediction import FLOW, PREDICTIONS, Prediction
from ldm.diffusion.schedule import Array, NoiseSchedule
from ldm.errors import UsageError, choose

Network = Callable[[Tensor, Tensor], Tensor]
"""(noisy x at unit variance [B, ...], t [B]) -> output [B, ...]"""

KINDS: dict[str, Prediction] = {**PREDICTIONS, "flow": FLOW}
"""What a network may be taught to say: "flow" on a FlowSchedule, the others on a NoiseSchedule."""

# Khrapov et al. 2024 (arXiv:2403.16728), as kohya's scripts and diffusers' scheduled_huber_loss_training name and scale
# them. "huber" is the pseudo-Huber 2 c (sqrt(r^2 + c^2) - c): r^2 near 0 and 2 c |r| far out; "smooth_l1" is that over
# c. Written as below, for the difference of two nearly equal numbers would keep few digits of a small residual's loss.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda square, c: square,
    "huber": lambda square, c: 2 * c * square / ((square + c.square()).sqrt() + c),
    "smooth_l1": lambda square, c: 2 * square / ((square + c.square()).sqrt() + c),
}
"""(squared residual [B, ...], c [B, 1, ...]) -> the loss of each place."""

HUBER_SCHEDULES: dict[str, Callable[[float, Array], Array]] = {
    "snr": lambda c, sigmas: (1 - c) / (1 + sigmas) ** 2 + c,  # kohya's: from 1 without noise to c
    "exponential": lambda c, sigmas: c ** (np.arange(len(sigmas)) / len(sigmas)),  # c^(t/T), the authors'
    "constant": lambda c, sigmas: np.full_like(sigmas, c),
}
"""(huber_c, sigmas [T]) -> c at every level [T]."""


def min_snr_weights(alphas_cumprod: Array, prediction: str, gamma: float) -> Array:
    """min-SNR-gamma weights of the squared error of a network's output: Hang et al. 2023 (arXiv:2303.09556), eq. 8.

    alphas_cumprod: float64 of any shape, in [0, 1]; -> the same shape. The paper weighs the squared error of x0 by
    min(SNR, gamma); an output error is an x0 error over c_out = -beta / determinant, and SNR = alpha^2 / beta^2, so the
    weight is min(alpha^2, gamma beta^2) / determinant^2: min(1, gamma / SNR) for epsilon, min(SNR, gamma) / (SNR + 1)
    for v and min(SNR, gamma) for sample, each with its finite limit at SNR 0 and at SNR infinity.
    """
    choose("prediction", prediction, PREDICTIONS)
    return _min_snr(np.asarray(alphas_cumprod), 1 - np.asarray(alphas_cumprod), PREDICTIONS[prediction], gamma)


def _min_snr(signal_power: Array, noise_power: Array, kind: Prediction, gamma: float) -> Array:
    """`min_snr_weights` of signal and noise rates given squared, on the unit circle or not."""
    tiny = float(np.finfo(np.float64).tiny)  # the limits themselves would be 0 / 0
    signal, noise = (torch.from_numpy(np.maximum(power, tiny)) for power in (signal_power, noise_power))
    determinant = torch.as_tensor(kind.determinant(signal.sqrt(), noise.sqrt()))
    weights: Array = (torch.minimum(signal, gamma * noise) / determinant.square()).numpy()
    return weights


@dataclass(frozen=True, eq=False)
class DiffusionLoss:
    """The error of a network's prediction at random levels of a schedule, per sample: squared (Ho et al. 2020, eq. 14)
    or one that grows more slowly, so that outliers in the data count less.

    prediction: a name of KINDS; "flow" (Lipman et al. 2023, arXiv:2210.02747) and a FlowSchedule need each other.
    snr_gamma: min-SNR weighting with this gamma (the paper's is 5); None weighs all levels alike. Made for the squared
    error; the others are weighed by the same numbers, as kohya's scripts do.
    loss_type: a name of LOSSES. huber_c: residual at which they turn from square to straight, in units of the target;
    at low noise it is larger, unless huber_schedule (a name of HUBER_SCHEDULES) is constant. Both are idle for "l2".
    UsageError: unknown names, gamma or huber_c not above 0, or epsilon with a schedule of zero terminal SNR (at that
    level the network's input is the noise itself, which teaches nothing, and sampling could not begin there).
    """

    schedule: NoiseSchedule | FlowSchedule
    prediction: str = "epsilon"
    snr_gamma: float | None = None
    loss_type: str = "l2"
    huber_c: float = 0.1
    huber_schedule: str = "snr"

    def __post_init__(self) -> None:
        choose("prediction", self.prediction, KINDS)
        if (self.prediction == "flow") != isinstance(self.schedule, FlowSchedule):
            raise UsageError(f"prediction {self.prediction!r} does not go with a {type(self.schedule).__name__}")
        choose("loss_type", self.loss_type, LOSSES)
        choose("huber_schedule", self.huber_schedule, HUBER_SCHEDULES)
        if not 0 < self.huber_c < math.inf:
            raise UsageError(f"huber_c is {self.huber_c}; it must be a finite number above 0")
        if self.snr_gamma is not None and not 0 < self.snr_gamma < math.inf:
            raise UsageError(
                f"snr_gamma is {self.snr_gamma}; it must be a finite number above 0, or None for no weighting"
            )
        if self.prediction == "epsilon" and self.schedule.rates[0][-1] == 0:
            raise UsageError("epsilon prediction cannot start from zero terminal SNR; use v_prediction or sample")

    def __call__(
        self,
        network: Network,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        mask: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """x0, noise [B, ...] of one dtype; t [B] integers in 0 .. T-1, places in the table of levels -> float32 [B]
        (float64 if x0 is), weighted.

        mask: [B, 1, ...] in [0, 1], which multiplies the error of each place, so that none comes from where it is 0.
        The mean is still over all places, as in kohya's scripts: a picture that is masked by half counts half.
        seen: the noise in the network's input where that is not the `noise` of the target (`noising.perturbed`).
        """
        target = self.target(x0, t, noise)
        told = torch.from_numpy(self.schedule.told).to(t.device)[t]
        output = network(self.noised(x0, t, noise if seen is None else seen), told)
        square = (output.to(target.dtype) - target).square()
        error = LOSSES[self.loss_type](square, _at(self._huber_c, t, square))
        loss = (error if mask is None else error * mask.to(error.dtype)).flatten(1).mean(1)
        return loss if self._weights is None else loss * _at(self._weights, t, loss)

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A draw of q(x_t | x0), what the network sees: alpha x0 + beta noise at the schedule's rates."""
        alpha, beta = rates_at(self.schedule, t, x0)
        return alpha * x0 + beta * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should say of `noised(x0, t, noise)`; at least float32."""
        x0, noise = _widened(x0), _widened(noise)
        return KINDS[self.prediction].target(x0, noise, *rates_at(self.schedule, t, x0))

    @cached_property
    def _huber_c(self) -> Array:
        alpha, beta = self.schedule.rates
        with np.errstate(divide="ignore"):
            return HUBER_SCHEDULES[self.huber_schedule](self.huber_c, beta / alpha)

    @cached_property
    def _weights(self) -> Array | None:
        if self.snr_gamma is None:
            return None
        alpha, beta = self.schedule.rates
        return _min_snr(alpha**2, beta**2, KINDS[self.prediction], self.snr_gamma)


def rates_at(schedule: NoiseSchedule | FlowSchedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise rate at the places t [B] of a schedule's table, in `like`'s dtype, to broadcast against it."""
    alpha, beta = schedule.rates
    return _at(alpha, t, like), _at(beta, t, like)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _at(table: Array, t: Tensor, like: Tensor) -> Tensor:
    """table[t] [B], rounded once to `like`'s dtype and shaped to broadcast against it."""
    values = torch.from_numpy(table).to(like.dtype).to(t.device)[t]
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))
