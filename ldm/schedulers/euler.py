"""Euler's method and its ancestral form: Karras et al. 2022 (arXiv:2206.00364); k-diffusion."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ldm.diffusion.prediction import Denoiser
from ldm.schedulers.solver import Noise, Step, first_order, renewal


def euler(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al. 2022, eq. 1, time = sigma): DDIM with eta 0."""
    return first_order(denoise, x, sigmas, noise, renewal(0.0))


def euler_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0
) -> Iterator[Step]:
    """Euler's method down to sigma_down, then fresh noise up to the next level: DDIM with eta 1, which is DDPM.

    eta scales the noise (k-diffusion's name for it too). UsageError: eta outside 0..1.
    """
    return first_order(denoise, x, sigmas, noise, renewal(eta))
