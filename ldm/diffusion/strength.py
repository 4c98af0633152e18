"""How much of a picture a run draws anew: the levels of an image-to-image run, and one strength for each pixel."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.schedule import Array, NoiseSchedule
from ldm.diffusion.spacing import Levels, Schedule
from ldm.errors import UsageError

LEAST = 1e-6  # the strength that stands for 0, at which a run still has levels that fall


def stronger(levels: Levels, strength: float, schedule: Schedule) -> Levels:
    """The levels of an image-to-image run: those of a run from noise, at `strength`, in 0..1, of their way up from its
    end. They are as many, and fall.

    The way is the schedule's time: t -> end + strength * (t - end), where the end of a run to a clean picture is at -1.
    So every strength is another noise level to begin with, the same in all grids that begin at the same one; where a
    layout's times stand evenly down to -1 ("trailing"), these are the last n levels of its run of n / strength steps,
    as diffusers, A1111 and ComfyUI take them. At strengths towards 0 all levels tend to the end. Strength 1 is the run
    itself; any other begins with image + sigmas[0] * noise.
    """
    if strength == 1:
        return levels
    strength, times = max(strength, LEAST), _time(np.array(levels.sigmas), schedule)
    sigmas = _level(times[-1] + strength * (times - times[-1]), schedule)
    if isinstance(schedule, NoiseSchedule):
        told = np.maximum(times[-1] + strength * (np.array(levels.timesteps) - times[-1]), 0)
    else:
        told = schedule.t(sigmas[:-1])
    return Levels(tuple(sigmas.tolist()), tuple(told.tolist()), float(sigmas[0]))


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
