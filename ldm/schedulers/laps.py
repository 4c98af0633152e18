"""Resampling: stretches of a run that are walked several times, so that what is drawn and what is held agree better.

RePaint: Lugmayr et al. 2022 (arXiv:2201.09865), section 4.2 and algorithm 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.prediction import Denoiser
from ldm.errors import UsageError
from ldm.schedulers.solver import Noise, Solver, Step


class Lap(NamedTuple):
    """The steps `begin` to `end` - 1 of a run, walked once. Where the lap before it ended further down, x is first
    thrown back up by fresh noise.
    """

    begin: int
    end: int


def laps(n: int, times: int, jump: int) -> tuple[Lap, ...]:
    """A run of n steps in stretches of `jump` steps, each walked `times` times: 1 + (n - 1) * times steps in all.

    The first step is in no stretch and made once: it begins at next to nothing but noise, or at an infinite level, and
    whatever was thrown back to there would be lost. times 1 is one lap. UsageError: times or jump below 1.
    """
    for name, value in (("resample", times), ("resample_jump", jump)):
        if value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    if times == 1 or n == 1:
        return (Lap(0, n),)
    stretches = [Lap(begin, min(begin + jump, n)) for begin in range(1, n, jump)]
    return (Lap(0, 1), *(stretch for stretch in stretches for _ in range(times)))


def total(laps: Sequence[Lap]) -> int:
    """How many steps they have."""
    return sum(lap.end - lap.begin for lap in laps)


def walked(
    solver: Solver,
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    laps: Sequence[Lap],
    skipped: int = 0,
    resume: Step | None = None,
    path: Callable[[int], Noise] | None = None,
) -> Iterator[Step]:
    """Walk `laps` of a run by `solver`, or go on after the step `resume` of the same walk with the same bits.

    Steps are counted on from 0 through all laps, and so are network calls. Between two laps over the same stretch x is
    thrown back, x + sqrt(sigma_begin^2 - sigma_end^2) * noise(sigma_end, sigma_begin), which has the law of x at
    sigma_begin, and the solver forgets the steps before. Where nothing is walked again, the bits are those of the
    solver alone.

    skipped: the step of `sigmas` that laps count from, in a part of a run. noise: of the steps, and of the throws,
    which must be independent of all else. path: lap number -> noise of its steps, where noise belongs to its interval
    (a Brownian path): it must be another path in each lap, since the same steps on the same path get the noise again
    that x still holds; `noise` is then only that of the throws, and no such path.
    """
    done, before = 0, 0  # steps in the laps before this one, and where the last of them ended
    last = resume or Step(-1, sigmas[skipped], x, x, 0)
    for number, lap in enumerate(laps):
        first, length = skipped + lap.begin, lap.end - lap.begin
        made = last.index + 1 - done  # of this lap
        if made < length:
            if made == 0 and lap.begin < before:
                low, high = sigmas[skipped + before], sigmas[first]
                last = replace(last, x=last.x + math.sqrt(high**2 - low**2) * noise(low, high), sigma=high, past=())
            source, begun = path(number) if path else noise, replace(last, index=first + made - 1)
            for step in islice(solver(denoise, x, sigmas, source, begun), length - made):
                last = replace(step, index=done + step.index - first)
                yield last
        done, before = done + length, lap.end
