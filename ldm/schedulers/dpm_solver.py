"""DPM-Solver++: Lu et al. 2022 (arXiv:2211.01095)."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.prediction import Denoiser
from ldm.schedulers.solver import Noise, Step


def dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Iterator[Step]:
    """DPM-Solver++(2M), algorithm 2 there: exponential integrator in lambda = -log(sigma), one network call a step.

    x_next = (sigma_next / sigma) x + (1 - sigma_next / sigma) D, where D = x0 + (h / 2 h_last) (x0 - x0_last) is x0
    extended along its last change to the middle of the step h in lambda ("midpoint"). First order (D = x0): the first
    step, a step to sigma 0, whose h is infinite, and as diffusers has it the last step with euler_at_final, or with
    lower_order_final below 15 steps.
    """
    last = len(sigmas) - 2
    first_order_last = euler_at_final or (lower_order_final and last + 1 < 15)
    h_last, x0_last = 0.0, None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma).x0
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        if x0_last is None or math.isinf(h) or (index == last and first_order_last):
            middle = x0
        else:
            middle = x0.lerp(x0_last, -h / (2 * h_last))
        x = middle.lerp(x, sigma_next / sigma)
        h_last, x0_last = h, x0
        yield Step(index, sigma_next, x, x0)
