"""DDIM: Song et al. 2021 (arXiv:2010.02502)."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ldm.diffusion.prediction import Denoiser
from ldm.schedulers.solver import Noise, Step, first_order, renewal


def ddim(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """x_next = sqrt(a_next) x0 + sqrt(1 - a_next - s^2) e + s noise, s = eta * the posterior's deviation.

    Equations 12 and 16; a is alphas_cumprod and e the noise in x, as x0 has it. Divided by sqrt(a_next) this reads
    x0 + kept * e + fresh * noise, since (1 - a) / a = sigma^2: Euler's method on dx/dsigma = (x - x0) / sigma when eta
    is 0, DDPM when it is 1. UsageError: eta outside 0..1.
    """
    return first_order(denoise, x, sigmas, noise, renewal(eta))
