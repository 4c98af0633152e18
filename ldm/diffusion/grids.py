"""Grids of noise levels that go by a name, each as the tool that made the name known has it.

A grid is n falling levels; what follows the last of them, 0 but for kl_optimal, is appended by who runs it. Some fill a
range of levels (the switches of diffusers' scheduler_config.json are of these); others walk the times of the trained
schedule. "A1111" is stable-diffusion-webui 1.10, modules/sd_schedulers.py. On purpose:

- one step begins at the highest level in every grid; A1111's DDIM and Align Your Steps begin at the lowest, where a run
  from noise cannot begin;
- ddim_uniform has n levels for every n, those of A1111 where n divides T; elsewhere A1111 runs more steps than asked;
- levels fall strictly: more than the table of a trained schedule holds (simple, ddim_uniform) are refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ldm.diffusion.schedule import Array, NoiseSchedule
from ldm.errors import UsageError, choose


def karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Array:
    """Evenly spaced in sigma^(1/rho): Karras et al. 2022 (arXiv:2206.00364), eq. 5 -> float64 [n]."""
    ramp: Array = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho
    return ramp


def exponential(n: int, sigma_min: float, sigma_max: float) -> Array:
    """Evenly spaced in log sigma, so in lambda = -log sigma too: Lu et al. 2022 (arXiv:2206.00927)."""
    return np.asarray(np.geomspace(sigma_max, sigma_min, n), dtype=np.float64)


def beta(n: int, sigma_min: float, sigma_max: float) -> Array:
    """Evenly spaced quantiles of Beta(0.6, 0.6) over the range, dense at both ends: Lee et al. 2024 (arXiv:2407.12173).

    They place timesteps so (as ComfyUI does); diffusers and A1111 place sigma, and so does this.
    """
    return sigma_min + (sigma_max - sigma_min) * beta_quantile(np.linspace(1.0, 0.0, n), 0.6)


def beta_quantile(q: Array, a: float) -> Array:
    """The x in 0..1 with I_x(a, a) = q, the quantile function of Beta(a, a) for 0 < a <= 1, to 1e-14.

    a B(a, a) I_x(a, a) = x^a F(a, 1 - a; a + 1; x) (DLMF 8.17.7), a power series with positive terms. In v = x^a it is
    convex with slope (1 - x)^(a - 1) >= 1, so that v = a B(a, a) q lies above the root and Newton's method falls onto
    it. Symmetry leaves q <= 1/2, where x <= 0.6 all the way and 80 terms reach the last bit.
    """
    k = np.arange(1, 80)
    series = np.cumprod([1.0, *((k - a) / k)]) * a / np.array([a, *(a + k)])
    target = a * math.gamma(a) ** 2 / math.gamma(2 * a) * np.minimum(q, 1 - q)
    v = target
    for _ in range(6):  # the error squares each time
        x = v ** (1 / a)
        v = v - (v * np.polynomial.polynomial.polyval(x, series) - target) * (1 - x) ** (1 - a)
    x = v ** (1 / a)
    return np.where(q <= 0.5, x, 1 - x)


def kl_optimal(n: int, sigma_min: float, sigma_max: float) -> Array:
    """Evenly spaced in arctan sigma: Sabour et al. 2024 (arXiv:2404.14507), theorem 3.1. Step n ends at sigma_min."""
    return np.tan(np.linspace(math.atan(sigma_max), math.atan(sigma_min), n + 1)[:-1])


def uniform(n: int, schedule: NoiseSchedule) -> Array:
    """Evenly spaced in time from T - 1 to 0: k-diffusion's own grid of a model trained at T times."""
    return _sigma(schedule, np.linspace(schedule.num_train_timesteps - 1, 0, n))


def normal(n: int, sigma_min: float, sigma_max: float, schedule: NoiseSchedule) -> Array:
    """Evenly spaced in time from that of sigma_max to that of sigma_min."""
    return _sigma(schedule, np.linspace(schedule.t(sigma_max), schedule.t(sigma_min), n))


def sgm_uniform(n: int, sigma_min: float, sigma_max: float, schedule: NoiseSchedule) -> Array:
    """`normal` with n + 1 levels, the last left out."""
    return normal(n + 1, sigma_min, sigma_max, schedule)[:-1]


def simple(n: int, schedule: NoiseSchedule) -> Array:
    """Every (T / n)-th entry of the table of sigmas, rounded down, from the highest."""
    falling, stride = schedule.sigmas[::-1], schedule.num_train_timesteps / n
    return np.array([falling[int(i * stride)] for i in range(n)])


def ddim_uniform(n: int, schedule: NoiseSchedule) -> Array:
    """The times 1 + floor(i T / n), i = n - 1 .. 0: DDIM's "leading" times with offset 1. One step begins at T - 1."""
    last = schedule.num_train_timesteps - 1
    times = np.minimum(1 + np.arange(n) * (last + 1) // n, last) if n > 1 else np.array([last])
    return schedule.sigmas[times[::-1]]


AYS = {
    False: (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    True: (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""Whether it is SDXL -> the levels of 10 steps and their end: Sabour et al. 2024, the authors' quickstart guide."""


def align_your_steps(n: int, xl: bool) -> Array:
    """The table of Align Your Steps at n evenly spaced places, log sigma linear in between: A1111's."""
    table = AYS[xl]
    return np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(table)), np.log(table)))


def ays(n: int, xl: bool) -> Array:
    """`align_your_steps` with n + 1 levels, the last left out, so that 10 steps visit the published levels.

    The authors end the run at that last level; diffusers and ComfyUI end it at 0, and so does this.
    """
    return align_your_steps(n + 1, xl)[:-1]


def _sigma(schedule: NoiseSchedule, times: Array) -> Array:
    """k-diffusion's level at a fractional time: log sigma is linear in between (in NoiseSchedule.sigma, sigma is)."""
    below, above = np.floor(times).astype(int), np.ceil(times).astype(int)
    share = times - below
    between: Array = schedule.sigmas[below] ** (1 - share) * schedule.sigmas[above] ** share
    return between


@dataclass(frozen=True)
class Grid:
    """One row: a grid and what belongs to it.

    name: its short name. label: its name in A1111, "" where it has none. aliases: further names.
    levels: the function, n and then the arguments that `needs` names -> float64 [n], falling.
    needs: of "sigma_min", "sigma_max" (a range to fill), "schedule" (the trained levels), "xl" (whether it is SDXL).
    description: one line for a list of grids.
    field: the switch of a scheduler_config.json that asks for it, "" where diffusers has none.
    final: what follows the last level, "zero" or "sigma_min" (a name of spacing.FINALS).
    """

    name: str
    levels: Callable[..., Array]
    needs: tuple[str, ...]
    description: str
    label: str = ""
    field: str = ""
    aliases: tuple[str, ...] = ()
    final: str = "zero"


_RANGE, _TABLE = ("sigma_min", "sigma_max"), ("schedule",)
_ROWS = (
    Grid("karras", karras, _RANGE, "even in sigma^(1/7): most levels where there is little noise",
         label="Karras", field="use_karras_sigmas"),
    Grid("exponential", exponential, _RANGE, "even in log sigma", label="Exponential", field="use_exponential_sigmas"),
    Grid("polyexponential", exponential, _RANGE, "k-diffusion's at its rho of 1, the same as exponential",
         label="Polyexponential"),
    Grid("lu", exponential, _RANGE, "even in lambda (DPM-Solver), the same as exponential", field="use_lu_lambdas"),
    Grid("beta", beta, _RANGE, "quantiles of Beta(0.6, 0.6): dense at both ends", label="Beta",
         field="use_beta_sigmas"),
    Grid("kl_optimal", kl_optimal, _RANGE, "even in arctan sigma; ends at the lowest level instead of 0",
         label="KL Optimal", final="sigma_min"),
    Grid("uniform", uniform, _TABLE, "even in time, k-diffusion's own", label="Uniform"),
    Grid("normal", normal, _RANGE + _TABLE, "even in time over a range, both ends visited", label="Normal"),
    Grid("sgm_uniform", sgm_uniform, _RANGE + _TABLE, "even in time, the lowest level left to the end; SDXL, Turbo",
         label="SGM Uniform", aliases=("SGMUniform",)),
    Grid("simple", simple, _TABLE, "entries of the trained table, evenly from the highest", label="Simple"),
    Grid("ddim_uniform", ddim_uniform, _TABLE, "entries of the trained table, evenly from the second lowest",
         label="DDIM"),
    Grid("ays", ays, ("xl",), "Align Your Steps, made for SD and SDXL in 10 steps; as in diffusers and ComfyUI"),
    Grid("align_your_steps", align_your_steps, ("xl",), "Align Your Steps as in A1111: its lowest level is visited",
         label="Align Your Steps"),
)  # fmt: skip
GRIDS: dict[str, Grid] = {row.name: row for row in _ROWS}


def find_grid(name: str) -> Grid:
    """The grid of a short name, a label of A1111 or an alias, in any case. UsageError: none (the nearest is named)."""
    names = {known.lower(): row for row in _ROWS for known in (row.name, row.label, *row.aliases) if known}
    return names.get(name.strip().lower()) or GRIDS[choose("grid of noise levels", name, GRIDS)]


def grid(
    name: str, n: int, sigma_min: float, sigma_max: float, schedule: NoiseSchedule | None, *, xl: bool = False
) -> Array:
    """The n levels of the grid of any of its names -> float64 [n], strictly falling; see Grid.final for what follows.

    sigma_min, sigma_max: the range to fill. schedule: the trained levels, all finite; None where there are none.
    xl: whether the model is SDXL, for Align Your Steps.
    UsageError: an unknown name; no steps; a range that is empty or not finite; no schedule where the grid needs one;
    more levels than it has (the message says how many those are).
    """
    row = find_grid(name)
    if n < 1:
        raise UsageError(f"{n} steps were asked for; a run has at least 1")
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise UsageError(f"noise levels from {sigma_max} to {sigma_min} are no range; they fall and are above 0")
    if schedule is None and "schedule" in row.needs:
        others = ", ".join(other.name for other in _ROWS if "schedule" not in other.needs)
        raise UsageError(f"the grid {row.name} is laid out on a trained schedule and there is none; take {others}")
    given = {"sigma_min": sigma_min, "sigma_max": sigma_max, "schedule": schedule, "xl": xl}
    levels = row.levels(n, *(given[need] for need in row.needs))
    if "sigma_min" in row.needs:
        levels = np.clip(levels, sigma_min, sigma_max)  # a last bit outside would be a step upwards at the end
    if not (np.diff(levels) < 0).all():
        most = len(np.unique(levels))
        raise UsageError(f"{n} steps do not fit the grid {row.name} on these noise levels; at most {most} do")
    return levels
