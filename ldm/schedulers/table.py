"""The table of schedulers, and how one is found by any of its names."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.spacing import Levels, Spacing, levels
from ldm.errors import UsageError, choose
from ldm.schedulers.ddim import ddim
from ldm.schedulers.ddpm import ddpm
from ldm.schedulers.dpm_solver import dpmpp_2m
from ldm.schedulers.euler import euler, euler_ancestral
from ldm.schedulers.heun import heun
from ldm.schedulers.solver import Solver, Step

Option = float | bool | str


@dataclass(frozen=True)
class Scheduler:
    """One row: a solver and what belongs to it.

    name: its short name.
    description: one line for a list of schedulers.
    solver: the function; it takes `options` as keyword arguments beyond those of Solver.
    family: a name of diffusion.spacing.FAMILIES, how a spacing is read.
    diffusers_class: the class whose numbers it has.
    spacing: the grid when none is chosen, that of the class.
    aliases: other names people know it by (A1111's).
    reads: the fields of a scheduler_config.json that this class heeds beyond those all share.
    """

    name: str
    description: str
    solver: Callable[..., Iterator[Step]]
    family: str
    diffusers_class: str
    spacing: Spacing
    aliases: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    def levels(self, schedule: NoiseSchedule, n: int, spacing: Spacing | None = None) -> Levels:
        """The levels of a run of n steps; see diffusion.spacing.levels."""
        return levels(schedule, n, spacing or self.spacing, self.family)

    def bound(self, options: Mapping[str, Option] | None = None) -> Solver:
        """The solver with these options set. UsageError: an option it does not have."""
        chosen = dict(options or {})
        for name in chosen:
            if name not in self.options:
                takes = ", ".join(self.options) or "no options"
                raise UsageError(f"{name!r} is not an option of the scheduler {self.name}; it takes {takes}")
        return partial(self.solver, **chosen)


_LEADING, _LINSPACE = Spacing("leading"), Spacing("linspace")
_DPMPP_2M = Scheduler(
    name="dpm++2m",
    description="DPM-Solver++(2M): second order, one network call a step; good pictures in 20 steps",
    solver=dpmpp_2m,
    family="dpm_solver",
    diffusers_class="DPMSolverMultistepScheduler",
    spacing=_LINSPACE,
    aliases=("DPM++ 2M", "dpmpp_2m"),
    options=("lower_order_final", "euler_at_final"),
    reads=("final_sigmas_type", "use_karras_sigmas", "lower_order_final", "euler_at_final"),
)
_ROWS = (
    Scheduler(
        name="ddpm",
        description="DDPM: ancestral sampling as trained; fresh noise at every step; wants hundreds of steps",
        solver=ddpm,
        family="ddim",
        diffusers_class="DDPMScheduler",
        spacing=_LEADING,
        options=("variance",),
        reads=("variance_type",),
    ),
    Scheduler(
        name="ddim",
        description="DDIM: first order, deterministic at eta 0, DDPM at eta 1",
        solver=ddim,
        family="ddim",
        diffusers_class="DDIMScheduler",
        spacing=_LEADING,
        options=("eta",),
        reads=("set_alpha_to_one",),
    ),
    Scheduler(
        name="euler",
        description="Euler: first order, deterministic",
        solver=euler,
        family="euler",
        diffusers_class="EulerDiscreteScheduler",
        spacing=_LINSPACE,
        reads=("final_sigmas_type", "use_karras_sigmas"),
    ),
    Scheduler(
        name="euler_a",
        description="Euler ancestral: Euler with fresh noise at every step",
        solver=euler_ancestral,
        family="euler",
        diffusers_class="EulerAncestralDiscreteScheduler",
        spacing=_LINSPACE,
        aliases=("Euler a", "euler_ancestral"),
        options=("eta",),
    ),
    Scheduler(
        name="heun",
        description="Heun: second order, deterministic, two network calls a step",
        solver=heun,
        family="euler",
        diffusers_class="HeunDiscreteScheduler",
        spacing=_LINSPACE,
        reads=("use_karras_sigmas",),
    ),
    _DPMPP_2M,
    replace(
        _DPMPP_2M,
        name="dpm++2m_karras",
        description="DPM-Solver++(2M) on the noise levels of Karras et al. 2022",
        spacing=replace(_LINSPACE, use_karras_sigmas=True),
        aliases=("DPM++ 2M Karras", "dpmpp_2m_karras"),
    ),
)
SCHEDULERS: dict[str, Scheduler] = {row.name: row for row in _ROWS}


def _names() -> dict[str, Scheduler]:
    """Every name in small letters. Of two rows with one diffusers class the earlier has it."""
    names = {row.diffusers_class.lower(): row for row in reversed(_ROWS)}
    return names | {name.lower(): row for row in _ROWS for name in (row.name, *row.aliases)}


def find(name: str) -> Scheduler:
    """The scheduler of a short name, an alias or a diffusers class name, in any case.

    UsageError: there is none (the nearest short name is offered).
    """
    names = _names()
    if name.strip().lower() in names:
        return names[name.strip().lower()]
    return SCHEDULERS[choose("scheduler", name, SCHEDULERS)]
