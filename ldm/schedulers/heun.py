"""Heun's method: Karras et al. 2022 (arXiv:2206.00364), algorithm 1."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.prediction import Denoiser
from ldm.schedulers.solver import Noise, Step


def heun(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Second order: the mean of the slopes (x - x0) / sigma at both ends of the step.

    Two network calls a step, but one in a step to sigma 0, where it is Euler's; Step.x0 is the first call's.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma).x0
        slope = (x - x0) / sigma
        if sigma_next > 0:
            ahead = x + (sigma_next - sigma) * slope
            slope = (slope + (ahead - denoise(ahead, sigma_next).x0) / sigma_next) / 2
        x = x + (sigma_next - sigma) * slope
        yield Step(index, sigma_next, x, x0)
