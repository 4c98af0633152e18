"""DDPM: Ho et al. 2020 (arXiv:2006.11239)."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from ldm.diffusion.prediction import Denoiser
from ldm.diffusion.schedule import Variance
from ldm.errors import choose
from ldm.schedulers.solver import Noise, Split, Step, first_order, renewal


def ddpm(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, variance: Variance = "fixed_small"
) -> Iterator[Step]:
    """x_next = sqrt(a_next) b / (1 - a) x0 + sqrt(1 - b) (1 - a_next) / (1 - a) x + deviation * noise.

    Equations 6-7 and algorithm 2; a is alphas_cumprod and b = 1 - a / a_next the variance added between the two levels:
    beta_t in a run over every timestep, else its respaced counterpart (Nichol & Dhariwal 2021, eq. 19). Divided by
    sqrt(a_next) the mean reads x0 + (sigma_next / sigma)^2 (x - x0).

    variance: "fixed_small", the posterior's, or "fixed_large", b. The last step, to sigma 0, draws no noise, as in the
    paper (diffusers' fixed_large draws some there unless the timestep is 0). UsageError: unknown variance.
    """
    return first_order(denoise, x, sigmas, noise, SPLITS[choose("variance", variance, SPLITS)])


def _fixed_large(sigma: float, sigma_next: float) -> tuple[float, float]:
    # b / a_next = (1 + sigma_next^2) (1 - (1 + sigma_next^2) / (1 + sigma^2)), as 1 / a = 1 + sigma^2
    added = (1 + sigma_next**2) * (sigma**2 - sigma_next**2) / (1 + sigma**2)
    return sigma_next**2 / sigma, math.sqrt(added) if sigma_next > 0 else 0.0


SPLITS: dict[str, Split] = {"fixed_small": renewal(1.0), "fixed_large": _fixed_large}
