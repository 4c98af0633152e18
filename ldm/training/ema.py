"""The running average of a model's weights, which is what a training run gives as its result."""

import copy

import torch
from torch import nn


class EMA:
    """Exponential moving average of a model's parameters, with warm-up: decay = min(decay, (1 + n) / (10 + n)) at
    update n.

    `model` is the averaged copy, in eval mode and without gradients.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the model's weights of now; `step` counts updates from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, now in self._pairs:
            average.lerp_(now.detach(), 1 - decay)
