"""First order: DDIM (Song et al. 2021, arXiv:2010.02502), Euler (Karras et al. 2022, arXiv:2206.00364), and two methods
for networks that were distilled to few steps.
"""

import math

from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UsageError
from ldm.schedulers.solver import Advance, first_order, renewal


def ddim(eta: float = 0.0) -> Advance:
    """x_next = sqrt(a_next) x0 + sqrt(1 - a_next - s^2) e + s noise, s = eta * the posterior's deviation.

    Equations 12 and 16; a is alphas_cumprod and e the noise in x, as x0 has it. Divided by sqrt(a_next) this reads
    x0 + kept * e + fresh * noise, since (1 - a) / a = sigma^2: Euler's method on dx/dsigma = (x - x0) / sigma when eta
    is 0, DDPM when it is 1. UsageError: eta outside 0..1.
    """
    return first_order(renewal(eta))


def euler() -> Advance:
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al. 2022, eq. 1, time = sigma): DDIM with eta 0."""
    return first_order(renewal(0.0))


def euler_ancestral(eta: float = 1.0) -> Advance:
    """Euler's method down to sigma_down, then fresh noise up to the next level: DDIM with eta 1, which is DDPM.

    eta scales the noise (k-diffusion's name for it too). UsageError: eta outside 0..1.
    """
    return first_order(renewal(eta))


def lcm() -> Advance:
    """x_next = x0 + sigma_next * noise: multistep consistency sampling, Luo et al. 2023 (arXiv:2310.04378), alg. 3.

    The boundary condition of its x0 (eq. 9 there) is the Denoiser's: see Sampling.denoiser.
    """
    return first_order(lambda sigma, sigma_next: (0.0, sigma_next))


def tcd(schedule: NoiseSchedule, eta: float = 0.3) -> Advance:
    """Strategic stochastic sampling: DDIM to the time s = floor((1 - eta) t_next), then noise up to t_next.

    Zheng et al. 2024 (arXiv:2402.19159), algorithm 4; eta is gamma there, from 0 (DDIM) to 1 (a consistency model).
    UsageError: eta outside 0..1.
    """
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta}; TCD's gamma must be from 0 (deterministic) to 1")

    def split(sigma: float, sigma_next: float) -> tuple[float, float]:
        # a millionth above, so that 0.7 * 490 is 343 and not what is left of it in binary
        between = schedule.sigma(math.floor((1 - eta) * schedule.t(sigma_next) + 1e-6)) if eta else sigma_next
        return between, math.sqrt(max(0.0, sigma_next**2 - between**2))

    return first_order(split)
