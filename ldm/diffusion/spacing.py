"""Which noise levels a run visits, in the meanings diffusers gives its spacings in each family of schedulers.

The spacings are those of Lin et al. 2023 (arXiv:2305.08891), table 2; for 4 steps of 1000 in the Euler family: leading
750 500 250 0 (+ steps_offset), trailing 999 749 499 249, linspace 999 666 333 0. Three things differ on purpose:

- linspace with one step visits the last timestep; diffusers visits the first, where a run from noise cannot begin;
- more steps than the schedule has are refused; diffusers repeats timesteps or leaves the schedule;
- each step of DDIM ends at the next level visited; diffusers' goes down T // n timesteps whatever the spacing, and then
  calls the network at another level than x has (linspace; trailing when n does not divide T).

With the cosine schedule and Karras levels diffusers' DPM-Solver cuts timesteps off where it rounds them otherwise; here
they are rounded.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ldm.diffusion.schedule import Array, NoiseSchedule
from ldm.errors import UsageError, choose

SPACINGS = ("leading", "trailing", "linspace")
FINALS = ("zero", "sigma_min")


class Levels(NamedTuple):
    """The noise levels of a run of n steps, as Python floats, so that no step waits for a device.

    sigmas: n + 1 levels; step i goes from sigmas[i] to sigmas[i + 1]. Where the last is above 0 the result is still
        x0 + sigma * noise, and whoever ran it scales it into the network's frame: x * c_in(sigmas[-1]).
    timesteps: n times; timesteps[i] is what the network is told at sigmas[i]; fractional in the Euler family.
    start: a run from nothing begins with x = start * unit noise: sigmas[0], or sqrt(1 + sigmas[0]^2) where diffusers
        takes the noise for a network's input. One from an image begins with x = image + sigmas[i] * noise.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    start: float

    def part(self, start: float, end: float, num_train_timesteps: int) -> "Levels":
        """The steps from `start` to `end`, shares in 0..1 of the way down: those whose timestep is below
        T - start T and not below T - end T, as diffusers' SDXL pipelines share a run between base and refiner.

        A part that starts above 0 begins with latents in the network's frame. UsageError: it has no step.
        """
        T = num_train_timesteps
        high, low = (math.inf if start == 0 else round(T - start * T)), (-math.inf if end == 1 else round(T - end * T))
        kept = [i for i, t in enumerate(self.timesteps) if low <= t < high]
        if not kept:
            raise UsageError(f"no step of {len(self.timesteps)} lies between {start} and {end} of the run; take more")
        sigmas = self.sigmas[kept[0] : kept[-1] + 2]
        return Levels(sigmas, self.timesteps[kept[0] : kept[-1] + 1], math.hypot(1, sigmas[0]) if start else self.start)


@dataclass(frozen=True)
class Spacing:
    """How a run's levels are chosen; the fields are those of diffusers' scheduler_config.json.

    timestep_spacing: a name of SPACINGS.
    steps_offset: added to the times of "leading"; the others ignore it.
    use_karras_sigmas: the levels of Karras et al. 2022, eq. 5, rho = 7, over a range that depends on the family.
    final_sigmas_type: "zero", or "sigma_min" to end at the schedule's lowest level (DDIM's set_alpha_to_one = False).
    UsageError: an unknown name (the nearest is offered).
    """

    timestep_spacing: str = "leading"
    steps_offset: int = 0
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"

    def __post_init__(self) -> None:
        choose("timestep_spacing", self.timestep_spacing, SPACINGS)
        choose("final_sigmas_type", self.final_sigmas_type, FINALS)


@dataclass(frozen=True)
class Family:
    """What a family of diffusers' schedulers makes of a spacing.

    unvisited: how many points leading and linspace lay out below the n visited ones (1: they count the run's end).
    whole: timesteps are rounded to integers.
    karras_over: the range of Karras levels, "visited" (by the spacing) or "trained".
    terminal_sigma: the finite level that stands for infinity when a schedule has zero terminal SNR.
    starts_at_sigma: the spacings whose run begins with sigma * noise instead of sqrt(1 + sigma^2) * noise.
    """

    unvisited: int
    whole: bool
    karras_over: str
    terminal_sigma: float
    starts_at_sigma: tuple[str, ...] = ()


FP16_INFINITY = math.sqrt(2.0**24 - 1)  # 4096: alphas_cumprod of 2^-24, the smallest float16; diffusers' stand-in
FAMILIES: dict[str, Family] = {
    # DDIM and DDPM are exact at SNR 0 in diffusers, which 1e8 is as well in float32 (1e6 is not: DDPM is 1e-4 off then)
    "ddim": Family(unvisited=0, whole=True, karras_over="visited", terminal_sigma=1e8),
    "euler": Family(
        unvisited=0,
        whole=False,
        karras_over="visited",
        terminal_sigma=FP16_INFINITY,
        starts_at_sigma=("trailing", "linspace"),
    ),
    "dpm_solver": Family(unvisited=1, whole=True, karras_over="trained", terminal_sigma=FP16_INFINITY),
}


def levels(schedule: NoiseSchedule, n: int, spacing: Spacing | None = None, family: str = "euler") -> Levels:
    """The levels of a run of n steps in the manner of `family` (a name of FAMILIES); no spacing given means Spacing().

    UsageError: n below 1, or more steps than the schedule holds in this spacing (the message says how many it does).
    """
    spacing, kind = spacing or Spacing(), FAMILIES[choose("family", family, FAMILIES)]
    if n < 1:
        raise UsageError(f"{n} steps were asked for; a run has at least 1")
    total = schedule.num_train_timesteps
    if not _fits(times := _timesteps(total, n, spacing, kind), total):
        raise UsageError(_too_many(total, n, spacing, kind))
    if schedule.zero_terminal_snr:
        schedule = schedule.with_terminal_sigma(kind.terminal_sigma)
    sigmas = schedule.sigma(times)
    if spacing.use_karras_sigmas:
        bounds = sigmas if kind.karras_over == "visited" else schedule.sigmas
        sigmas = karras(n, float(bounds.min()), float(bounds.max()))
        times = schedule.t(sigmas)
        times = np.round(times) if kind.whole else times
    final = 0.0 if spacing.final_sigmas_type == "zero" else float(schedule.sigmas[0])
    first = float(sigmas[0])
    start = first if spacing.timestep_spacing in kind.starts_at_sigma else math.hypot(1.0, first)
    return Levels((*sigmas.tolist(), final), tuple(times.tolist()), start)


def karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Array:
    """n levels from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho): Karras et al. 2022, eq. 5 -> float64
    [n].
    """
    ramp: Array = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho
    return ramp


def _timesteps(total: int, n: int, spacing: Spacing, kind: Family) -> Array:
    """The n times visited, falling; rounded as diffusers rounds them, half to even."""
    points = n + kind.unvisited
    if spacing.timestep_spacing == "leading":
        return np.arange(points, dtype=np.float64)[::-1][:n] * (total // points) + spacing.steps_offset
    if spacing.timestep_spacing == "trailing":
        # arange and not linspace: their last bits differ, and with them which halves are rounded up
        return np.round(np.arange(total, 0, -total / n)[:n]) - 1
    line = np.linspace(0, total - 1, points)[::-1][:n] if points > 1 else np.array([total - 1.0])
    return np.round(line) if kind.whole else line


def _fits(times: Array, total: int) -> bool:
    return bool(times[0] <= total - 1 and times[-1] >= 0 and (np.diff(times) < 0).all())


def _too_many(total: int, n: int, spacing: Spacing, kind: Family) -> str:
    """The message for n steps that do not fit; finding the most that do is a search, so it is left to the failure."""
    fitting = (k for k in range(min(n, total), 0, -1) if _fits(_timesteps(total, k, spacing, kind), total))
    most = next(fitting, 0)
    allowed = f"at most {most} do" if most else "none does: choose a smaller steps_offset"
    return (
        f"{n} steps do not fit a schedule of {total} timesteps with {spacing.timestep_spacing} spacing"
        f" and steps_offset {spacing.steps_offset}; {allowed}"
    )
