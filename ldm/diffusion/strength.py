"""How much of a picture a run draws anew: the levels of an image-to-image run, and one strength for each pixel."""

import math
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.schedule import Array, NoiseSchedule
from ldm.diffusion.spacing import Levels, Schedule
from ldm.errors import UsageError

LEAST = 1e-6  # the strength that stands for 0, at which a run still has levels that fall


def stronger(lay_out: Callable[[int], Levels], n: int, strength: float, schedule: Schedule) -> Levels:
    """The levels of a run of n network steps over the last `strength`, in 0..1, of the way from noise to the picture.

    Where n / strength is a whole number M they are the last n levels of the run of M steps that `lay_out` (as
    Sampling.levels) lays out: 20 steps at strength 0.8 are what diffusers walks for 25 steps at 0.8. Between two such
    strengths every level goes evenly, in the schedule's time, from the one run's to the other's: so there are n steps,
    and levels that fall, at any strength, and they depend on it continuously. Below the strength of the longest run
    that the schedule holds (of 1000 steps at most), the levels stand closer on that: at strengths towards 0 all of
    them tend to its last. Strength 1 is lay_out(n) itself; any other run begins with image + sigmas[0] * noise.

    n, where `lay_out` makes another number of steps of it, gives that number. UsageError: n does not fit the schedule.
    """
    run, strength = lay_out(n), max(strength, LEAST)
    count, total = len(run.timesteps), schedule.num_train_timesteps

    def fits(steps: int) -> bool:
        try:
            longer = lay_out(min(steps, total))
        except UsageError:
            return False
        # listed levels are the same for any number
        return steps <= total and longer.sigmas != run.sigmas and _ends_still(longer) <= _ends_still(run)

    wanted, near = round(n / strength, 9), 1.0
    steps, more = math.floor(wanted), math.ceil(wanted)
    if not (steps == n or fits(steps)) or not (more == n or fits(more)):
        steps = more = n + bisect_left(range(n + 1, total + 1), True, key=lambda steps: not fits(steps))
        near = steps * strength / n
    runs = lay_out(steps), lay_out(more)
    if steps == more and near == 1:
        first = runs[0].sigmas[-count - 1]
        return run if steps == n else Levels(runs[0].sigmas[-count - 1 :], runs[0].timesteps[-count:], first)
    (times, told), (others, aside) = (_last(each, count, near, schedule) for each in runs)
    share = more * (n - strength * steps) / n if more > steps else 0.0
    times, told = times + share * (others - times), told + share * (aside - told)
    sigmas = _level(times, schedule)
    told = np.maximum(told + schedule.t(sigmas[:-1]), min(0.0, runs[0].timesteps[-1]))
    return Levels(tuple(sigmas.tolist()), tuple(told.tolist()), float(sigmas[0]))


def _last(run: Levels, count: int, near: float, schedule: Schedule) -> tuple[Array, Array]:
    """Of the last count + 1 places of a run, each `near` times as far from its end: their times, and by how much what
    the network is told differs from the time of the level (some runs tell it whole numbers).
    """
    end = len(run.timesteps) - (near != 1 and _ends_still(run))
    sigmas, places = np.array(run.sigmas[: end + 1]), end - near * np.arange(count, -1, -1)
    aside = np.array(run.timesteps[:end]) - schedule.t(sigmas[:-1])
    return np.interp(places, np.arange(end + 1), _time(sigmas, schedule)), np.interp(places[:-1], np.arange(end), aside)


def _ends_still(run: Levels) -> bool:
    """Whether its last step has no length but for rounding: of some that end at sigma_min."""
    return run.sigmas[-1] > run.sigmas[-2] * (1 - 1e-9)


def _clock(schedule: Schedule) -> tuple[Array, Array]:
    """The schedule's time as a function of atan(sigma), the angle between image and noise, by points that both rise:
    from -1, the clean image, to a T that stands for noise alone. Of a schedule without a table, the angle itself.
    """
    if not isinstance(schedule, NoiseSchedule):
        return np.array([0, math.pi / 2]), np.array([0, math.pi / 2])
    return np.array([0, *np.arctan(schedule.sigmas), math.pi / 2]), np.arange(-1.0, schedule.num_train_timesteps + 1)


def _time(sigmas: Array, schedule: Schedule) -> Array:
    angles, times = _clock(schedule)
    return np.interp(np.arctan(sigmas), angles, times)


def _level(times: Array, schedule: Schedule) -> Array:
    angles, clock = _clock(schedule)
    return np.tan(np.interp(times, clock, angles))


def stronger_as_diffusers(levels: Levels, strength: float) -> Levels:
    """diffusers' image-to-image: the last int(n * strength) of a run's n steps, and so fewer steps than were asked for.
    Strength 1 is the run itself, which begins with noise alone. UsageError: no step is left.
    """
    n = len(levels.timesteps)
    left = min(int(n * strength), n)
    if left < 1:
        raise UsageError(f"strength {strength:g} leaves none of {n} steps; take more steps, or more strength")
    first = n - left
    return Levels(levels.sigmas[first:], levels.timesteps[first:], levels.sigmas[first]) if first else levels


def freed(levels: Levels, mask: Tensor) -> Callable[[float], Tensor]:
    """A strength for each pixel, for `ldm.diffusion.guidance.held`: level -> how far each may leave the picture there.

    mask: [1, 1, H, W] in 0..1. In the step that begins at sigmas[i], of n, that is n * mask - (n - 1 - i), cut to 0..1:
    where the mask is 1 it is 1 from the first step on, where it is 0 never, and where it is 0.5 from the middle of the
    run on, as in differential diffusion (Levin & Fried 2023, arXiv:2306.00950, alg. 1), whose steps are whole: here the
    step in which a place becomes free is shared, so that the picture depends on the mask continuously. A mask of 0 and
    1 is its own answer at every level. Levels between two of the run, of half steps, count by their share.
    """
    n = len(levels.timesteps)
    falling, places = [-sigma for sigma in levels.sigmas[:-1]], np.arange(n)

    def freedom(sigma: float) -> Tensor:
        place = float(np.interp(-sigma, falling, places))
        return torch.clamp(n * mask - (n - 1 - place), 0, 1)

    return freedom
