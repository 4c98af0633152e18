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
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ldm.diffusion.continuous import EDMSchedule, FlowSchedule
from ldm.diffusion.grids import exponential, find_grid, grid, karras
from ldm.diffusion.schedule import Array, NoiseSchedule
from ldm.errors import UsageError, choose

SPACINGS = ("leading", "trailing", "linspace")
FINALS = ("zero", "sigma_min")
Schedule = NoiseSchedule | EDMSchedule | FlowSchedule


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

    @property
    def told(self) -> dict[float, float]:
        """The level of each step -> what the network is told there."""
        return dict(zip(self.sigmas[:-1], self.timesteps, strict=True))

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
    sigma_grid: a name of ldm.diffusion.grids.GRIDS, laid over the range of levels that the family says; "" is none.
    final_sigmas_type: "zero", or "sigma_min" to end at the schedule's lowest level (DDIM's set_alpha_to_one = False).
    original_inference_steps: of LCM and TCD, the steps of the run they were distilled from.
    timesteps: falling times to visit instead of all the above; `respaced` makes some. sigmas: falling levels, likewise.
    xl: whether the network is SDXL's, for Align Your Steps.
    UsageError: an unknown name (the nearest is offered), times or levels that do not fall, or both.
    """

    timestep_spacing: str = "leading"
    steps_offset: int = 0
    sigma_grid: str = ""
    final_sigmas_type: str = "zero"
    original_inference_steps: int = 50
    timesteps: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    xl: bool = False

    def __post_init__(self) -> None:
        choose("timestep_spacing", self.timestep_spacing, SPACINGS)
        choose("final_sigmas_type", self.final_sigmas_type, FINALS)
        if self.sigma_grid:
            find_grid(self.sigma_grid)
        if self.timesteps and self.sigmas:
            raise UsageError("timesteps and sigmas were both given; each says the whole run, so give one")
        for name in ("timesteps", "sigmas"):
            values = getattr(self, name)
            if any(not math.isfinite(v) or v < 0 for v in values) or (np.diff(values) >= 0).any():
                raise UsageError(f"{name} are {values}; they must be numbers that fall, none below 0")


@dataclass(frozen=True)
class Family:
    """What a family of diffusers' schedulers makes of a spacing.

    unvisited: how many points leading and linspace lay out below the n visited ones (1: they count the run's end).
    whole: timesteps are rounded to integers.
    rounded, cut: the grids whose timesteps are rounded, or cut down, to integers all the same.
    grid_over: the range of a grid's levels, "visited" (by the spacing) or "trained".
    terminal_sigma: the finite level that stands for infinity when a schedule has zero terminal SNR.
    starts_at_sigma: the spacings whose run begins with sigma * noise instead of sqrt(1 + sigma^2) * noise.
    only: the one spacing this family knows, "" where it knows all of SPACINGS.
    lowest: the time of the level that "sigma_min" ends a run at.
    """

    unvisited: int = 0
    whole: bool = False
    rounded: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    grid_over: str = "visited"
    terminal_sigma: float = math.sqrt(2.0**24 - 1)  # 4096: alphas_cumprod of 2^-24, diffusers' stand-in
    starts_at_sigma: tuple[str, ...] = ()
    only: str = ""
    lowest: int = 0


_EULER = Family(starts_at_sigma=("trailing", "linspace"))
_DPM_SOLVER = Family(
    unvisited=1, whole=True, rounded=("karras", "lu"), cut=("exponential", "beta"), grid_over="trained"
)
FAMILIES: dict[str, Family] = {
    # DDIM and DDPM are exact at SNR 0 in diffusers, which 1e8 is as well in float32 (1e6 is not: DDPM is 1e-4 off then)
    "ddim": Family(whole=True, terminal_sigma=1e8),
    "euler": _EULER,
    "kdpm2": replace(_EULER, rounded=("karras",)),
    "dpm_solver": _DPM_SOLVER,
    "dpm_single": replace(_DPM_SOLVER, only="linspace"),
    "distilled": Family(whole=True, terminal_sigma=1e8, only="leading"),
    # not of diffusers: stable-diffusion-webui's; k-diffusion's runs all begin with sigma * noise
    "k_diffusion": Family(grid_over="trained", starts_at_sigma=SPACINGS),
    "compvis": Family(whole=True, only="leading", lowest=1),
}


def levels(schedule: Schedule, n: int, spacing: Spacing | None = None, family: str = "euler") -> Levels:
    """The levels of a run of n steps in the manner of `family` (a name of FAMILIES); no spacing given means Spacing().

    A continuous schedule has a spacing of its own, which a grid replaces; n is ignored where the spacing has timesteps
    or sigmas. UsageError: n below 1, more steps than the schedule holds in this spacing (the message says how many it
    does), a time that it does not have, or a grid that needs a table where there is none.
    """
    spacing, kind = spacing or Spacing(), FAMILIES[choose("family", family, FAMILIES)]
    if n < 1:
        raise UsageError(f"{n} steps were asked for; a run has at least 1")
    if not isinstance(schedule, NoiseSchedule):
        return _continuous(schedule, n, spacing)
    if schedule.zero_terminal_snr:
        schedule = schedule.with_terminal_sigma(kind.terminal_sigma)
    if spacing.sigmas:
        sigmas = np.array(spacing.sigmas, dtype=np.float64)
        times = schedule.t(sigmas)
    else:
        times = _timesteps(schedule, n, spacing, family)
        sigmas = schedule.sigma(times)
    if spacing.sigma_grid and not spacing.sigmas:
        name = find_grid(spacing.sigma_grid).name
        bounds = sigmas if kind.grid_over == "visited" else schedule.sigmas
        sigmas = grid(name, n, float(bounds.min()), float(bounds.max()), schedule, xl=spacing.xl)
        times = schedule.t(sigmas)
        if name in kind.rounded:
            times = np.round(times)
        elif name in kind.cut:  # the highest too: diffusers' float32 has 998.9999 there on Stable Diffusion's levels
            times = np.maximum(np.floor(times - 1e-6), 0)
    first = float(sigmas[0])
    start = first if spacing.timestep_spacing in kind.starts_at_sigma else math.hypot(1.0, first)
    lowest = min(float(schedule.sigmas[kind.lowest]), float(sigmas[-1]))
    return Levels((*sigmas.tolist(), _final(spacing, lowest)), tuple(times.tolist()), start)


def respaced(total: int, sections: str) -> tuple[float, ...]:
    """Falling times of a run over part of `total` timesteps: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 3.3.

    sections: "250", so many times evenly spaced; "10,15,20", so many in each third; "ddim50", 50 times in DDIM's whole
    strides, which must exist. UsageError: other text, or more times than a section holds.
    """
    if sections.startswith("ddim") and sections[4:].isdecimal():
        count = int(sections[4:])
        strides = [s for s in range(1, total) if len(range(0, total, s)) == count]
        if not strides:
            raise UsageError(f"no whole stride takes {count} of {total} timesteps; choose another number than {count}")
        return tuple(float(t) for t in range(0, total, strides[0]))[::-1]
    counts = [int(word) if word.strip().isdecimal() else 0 for word in sections.split(",")]
    if min(counts) < 1 or len(counts) > total:
        raise UsageError(f"timesteps are {sections!r}; write how many, as in '250', '10,15,20' or 'ddim50'")
    taken: list[float] = []
    start = 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if count > size:
            raise UsageError(f"{count} timesteps were asked of a section of {size}; ask for at most {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        taken += [float(start + round(stride * k)) for k in range(count)]
        start += size
    return tuple(taken[::-1])


def _continuous(schedule: EDMSchedule | FlowSchedule, n: int, spacing: Spacing) -> Levels:
    """Of networks trained on a range: diffusers' EDM and FlowMatchEulerDiscrete schedulers."""
    if isinstance(schedule, FlowSchedule):
        total = schedule.num_train_timesteps
        lowest = schedule.shifted(1 / total) if schedule.twice else 1 / total
        s = schedule.shifted(np.linspace(1.0, float(lowest), n))
        if schedule.shift_terminal:
            s = 1 - (1 - s) * (1 - schedule.shift_terminal) / (1 - s[-1])
        if spacing.sigma_grid:  # over s itself, as there
            s = grid(spacing.sigma_grid, n, float(s.min()), float(s.max()), None)
        sigmas = schedule.sigma(s * total)
    else:
        low, high = schedule.sigma_min, schedule.sigma_max
        if spacing.sigma_grid:
            sigmas = grid(spacing.sigma_grid, n, low, high, None)
        else:
            sigmas = exponential(n, low, high) if schedule.exponential else karras(n, low, high, schedule.rho)
    if spacing.sigmas or spacing.timesteps:
        sigmas = np.array(spacing.sigmas) if spacing.sigmas else schedule.sigma(spacing.timesteps)
    first = float(sigmas[0])
    start = 1.0 + first if isinstance(schedule, FlowSchedule) else math.hypot(1.0, first)
    times = tuple(schedule.t(sigmas).tolist())
    return Levels((*sigmas.tolist(), _final(spacing, float(sigmas[-1]))), times, start)


def _final(spacing: Spacing, lowest: float) -> float:
    grid_ends = find_grid(spacing.sigma_grid).final if spacing.sigma_grid else "zero"
    return lowest if "sigma_min" in (spacing.final_sigmas_type, grid_ends) else 0.0


def _timesteps(schedule: NoiseSchedule, n: int, spacing: Spacing, family: str) -> Array:
    """The times visited, falling. UsageError: they leave the schedule, or do not fall."""
    total, kind = schedule.num_train_timesteps, FAMILIES[family]
    times = np.array(spacing.timesteps, dtype=np.float64)
    if not spacing.timesteps:
        if spacing.sigma_grid and kind.grid_over == "trained":
            n = min(n, total)  # only the grid's own levels are visited
        lay_out = {"distilled": _distilled, "compvis": _compvis}.get(family, _laid_out)
        times = lay_out(total, n, spacing, kind)
    if _fits(times, total):
        return times
    if spacing.timesteps:
        raise UsageError(f"timesteps begin at {times[0]:g}; this schedule has those from 0 to {total - 1}")
    raise UsageError(_too_many(total, n, spacing, kind))


def _laid_out(total: int, n: int, spacing: Spacing, kind: Family) -> Array:
    """The n times of a spacing; rounded as diffusers rounds them, half to even."""
    points, name = n + kind.unvisited, kind.only or spacing.timestep_spacing
    if name == "leading":
        return np.arange(points, dtype=np.float64)[::-1][:n] * (total // points) + spacing.steps_offset
    if name == "trailing":
        # arange and not linspace: their last bits differ, and with them which halves are rounded up
        return np.round(np.arange(total, 0, -total / n)[:n]) - 1
    line = np.linspace(0, total - 1, points)[::-1][:n] if points > 1 else np.array([total - 1.0])
    return np.round(line) if kind.whole else line


def _compvis(total: int, n: int, spacing: Spacing, kind: Family) -> Array:
    """Every (T // n)-th time from 1, and where n does not divide T there are more than n; the lowest is not visited but
    ends the run: stable-diffusion-webui's DDIM calls the network once less than it has times. One step begins at T - 1.
    """
    times = np.minimum(np.arange(0, total, max(total // n, 1), dtype=np.float64) + 1, total - 1)
    return times[:0:-1] if n > 1 else np.array([total - 1.0])


def _distilled(total: int, n: int, spacing: Spacing, kind: Family) -> Array:
    """n of the times of the run that was distilled (Luo et al. 2023, arXiv:2310.04378, sec. 4.3), from the highest."""
    original = min(spacing.original_inference_steps, total)
    if n > original:
        raise UsageError(
            f"{n} steps were asked for, and the model was distilled from a run of {original}; take at most {original}"
        )
    taught: Array = np.arange(original, 0, -1, dtype=np.float64) * (total // original) - 1
    return np.asarray(taught[np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)])


def _fits(times: Array, total: int) -> bool:
    return bool(times[0] <= total - 1 and times[-1] >= 0 and (np.diff(times) < 0).all())


def _too_many(total: int, n: int, spacing: Spacing, kind: Family) -> str:
    """The message for n steps that do not fit; finding the most that do is a search, so it is left to the failure."""
    fitting = (k for k in range(min(n, total), 0, -1) if _fits(_laid_out(total, k, spacing, kind), total))
    most = next(fitting, 0)
    allowed = f"at most {most} do" if most else "none does: choose a smaller steps_offset"
    return (
        f"{n} steps do not fit a schedule of {total} timesteps with {spacing.timestep_spacing} spacing"
        f" and steps_offset {spacing.steps_offset}; {allowed}"
    )
