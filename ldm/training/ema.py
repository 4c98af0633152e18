"""The running average of a model's weights, which is what a training run gives as its result."""

import copy

import numpy as np
import torch
from torch import nn

from ldm.errors import UsageError

WIDEST = 12**-0.5  # sigma_rel of the profile in which all steps count alike


class EMA:
    """Exponential moving average of a model's parameters, with warm-up: decay = min(decay, (1 + n) / (10 + n)) at
    update n.

    `model` is the averaged copy, in eval mode and without gradients.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))

    def update(self, step: int) -> None:
        """Move the average towards the model's weights of now; `step` counts updates from 0."""
        self.keep(min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def keep(self, share: float) -> None:
        """The average keeps this share of itself; the rest is the model's weights of now."""
        for average, now in self._pairs:
            average.lerp_(now.detach(), 1 - share)


def gamma_of(sigma_rel: float) -> float:
    """The power gamma of the average whose profile over a run of length T, (gamma + 1) t^gamma / T^(gamma + 1), has the
    standard deviation sigma_rel T.

    Karras et al. 2024 (arXiv:2312.02696, sec. 3.1): sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for
    its largest root. UsageError unless 0 < sigma_rel < 12^-0.5.
    """
    if not 0 < sigma_rel < WIDEST:
        raise UsageError(f"sigma_rel is {sigma_rel}; it must be above 0 and below {WIDEST:.4f}, as 0.05 and 0.1 are")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
