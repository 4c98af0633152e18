"""The table of schedulers, and how one is found by any of its names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial

from ldm.diffusion.grids import GRIDS, find_grid
from ldm.diffusion.spacing import Schedule, Spacing
from ldm.errors import UsageError
from ldm.schedulers.ddim import ddim, euler, euler_ancestral, lcm, tcd
from ldm.schedulers.ddpm import ddpm
from ldm.schedulers.dpm_solver import multistep, singlestep
from ldm.schedulers.linear_multistep import deis, lms, pndm
from ldm.schedulers.second_order import dpm2, dpmpp_2s_ancestral, dpmpp_sde, heun
from ldm.schedulers.solver import Advance, Solver, solve
from ldm.schedulers.unipc import unipc

Option = float | bool | str | tuple[int, ...]
LINSPACE = Spacing("linspace")


@dataclass(frozen=True)
class Scheduler:
    """One row: a solver and what belongs to it.

    name: its short name. label: its name in A1111, and with `aliases` what else people know it by.
    description: one line for a list of schedulers.
    solver: the function that makes its Advance. options: its arguments that may be chosen, and of these `fixed` are
    what makes it this row, `defaults` what it takes where nothing is chosen.
    family: a name of diffusion.spacing.FAMILIES, how a spacing is read.
    classes: the diffusers classes whose numbers it has, the first of them its own; () where diffusers has none.
    spacing: the grid when none is chosen, that of the class.
    calls: network calls a step, and how many more (or fewer, in a run to sigma 0) in a whole run.
    noise: "" draws none, "fresh" a new tensor for each interval, "brownian" pieces of one path.
    a1111_grid: what A1111's schedule type "Automatic" means for it. discards: A1111 lays out one level more for it and
    leaves out the last but one. timed: the solver wants the noise schedule too.
    reads: what of a scheduler_config.json its class has a field for, and others leave unread: "grids" (any Grid.field),
    "final_sigmas_type", "set_alpha_to_one", "clip_sample", "thresholding". by_slopes: it goes along dx / dsigma, which
    must not begin at an infinite level.
    """

    name: str
    description: str
    solver: Callable[..., Advance]
    family: str
    classes: tuple[str, ...]
    label: str = ""
    aliases: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    fixed: Mapping[str, Option] = field(default_factory=dict)
    defaults: Mapping[str, Option] = field(default_factory=dict)
    spacing: Spacing = LINSPACE
    calls: tuple[int, int] = (1, 0)
    noise: str = ""
    a1111_grid: str = "uniform"
    discards: bool = False
    timed: bool = False
    reads: tuple[str, ...] = ()
    by_slopes: bool = False

    def bound(self, options: Mapping[str, Option] | None = None, schedule: Schedule | None = None) -> Solver:
        """The solver with these options set. UsageError: an option it does not have, or a value out of range."""
        chosen = {**self.fixed, **self.defaults, **(options or {})}
        for name in chosen:
            if name not in self.options:
                takes = ", ".join(self.options) or "no options"
                raise UsageError(f"{name!r} is not an option of the scheduler {self.name}; it takes {takes}")
        make = partial(self.solver, schedule) if self.timed else self.solver
        return partial(solve, make(**chosen))

    def network_calls(self, n: int, to_zero: bool = True) -> int:
        """How often a run of n steps calls the network. to_zero: its last level is 0, where half steps are saved."""
        each, more = self.calls
        if n == 1:
            return 1 if to_zero else each
        return n * each + (more if more > 0 or to_zero else 0)

    def steps_within(self, nfe: int) -> int:
        """The most steps, at least 1, that call the network no more than `nfe` times. UsageError: not even one does."""
        steps = max((n for n in range(1, nfe + 1) if self.network_calls(n) <= nfe), default=0)
        if not steps:
            raise UsageError(f"nfe is {nfe}; it must be at least 1, the network calls of one step")
        return steps


_MULTI = ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler")
_DPM = ("algorithm_type", "solver_order", "solver_type", "lower_order_final", "euler_at_final")
_UNIPC = ("solver_type", "solver_order", "predict_x0", "lower_order_final", "disable_corrector")
_HALVES = (2, -1)
_LEADING = Spacing("leading")
_GRIDS, _CUTS = ("grids",), ("clip_sample", "thresholding")
_READS = ("grids", "final_sigmas_type", "thresholding")  # of the DPM-Solvers
_ROWS = (
    Scheduler(
        "ddpm", "ancestral sampling as trained; fresh noise at every step; wants hundreds of steps",
        ddpm, "ddim", ("DDPMScheduler",), label="DDPM", options=("variance_type",), spacing=_LEADING, noise="fresh",
        reads=_CUTS,
    ),
    Scheduler(
        "ddim", "first order, deterministic at eta 0, DDPM at eta 1",
        ddim, "ddim", ("DDIMScheduler",), label="DDIM", options=("eta",), spacing=_LEADING, noise="fresh",
        reads=("set_alpha_to_one", *_CUTS),
    ),
    Scheduler(
        "plms", "PNDM: fourth order in even steps, of latent diffusion and the first Stable Diffusion",
        pndm, "ddim", ("PNDMScheduler",), label="PLMS", aliases=("pndm",), timed=True,
        options=("skip_prk_steps", "prediction"), spacing=_LEADING, calls=(1, 1),
        reads=("set_alpha_to_one",), by_slopes=True,
    ),
    Scheduler(
        "lms", "linear multistep of order 4 in sigma",
        lms, "euler", ("LMSDiscreteScheduler",), label="LMS", options=("order",), reads=_GRIDS,
        by_slopes=True,
    ),
    Scheduler(
        "euler", "first order, deterministic",
        euler, "euler", ("EulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"),
        label="Euler", reads=("grids", "final_sigmas_type"),
    ),
    Scheduler(
        "euler_a", "Euler with fresh noise at every step",
        euler_ancestral, "euler", ("EulerAncestralDiscreteScheduler",), label="Euler a",
        aliases=("euler_ancestral",), options=("eta",), noise="fresh",
    ),
    Scheduler(
        "heun", "second order, deterministic, two network calls a step",
        heun, "euler", ("HeunDiscreteScheduler",), label="Heun", calls=_HALVES,
        reads=("grids", "clip_sample"), by_slopes=True,
    ),
    Scheduler(
        "dpm2", "DPM-Solver-2: second order, the slope in the middle of the step, two network calls",
        dpm2, "kdpm2", ("KDPM2DiscreteScheduler",), label="DPM2", aliases=("kdpm2", "dpm_2"), calls=_HALVES,
        a1111_grid="karras", discards=True, reads=_GRIDS, by_slopes=True,
    ),
    Scheduler(
        "dpm2_a", "DPM2 with fresh noise at every step",
        dpm2, "kdpm2", ("KDPM2AncestralDiscreteScheduler",), label="DPM2 a", aliases=("dpm_2_ancestral",),
        options=("eta",), fixed={"eta": 1.0}, calls=_HALVES, noise="fresh", a1111_grid="karras", discards=True,
        reads=_GRIDS, by_slopes=True,
    ),
    Scheduler(
        "dpm++2s_a", "DPM-Solver++(2S) with fresh noise at every step, two network calls",
        dpmpp_2s_ancestral, "euler", (), label="DPM++ 2S a", aliases=("dpmpp_2s_ancestral",), options=("eta",),
        calls=_HALVES, noise="fresh", a1111_grid="karras", reads=_GRIDS,
    ),
    Scheduler(
        "dpm++sde", "DPM-Solver++ of the reverse SDE, two network calls a step; rich detail in few steps",
        dpmpp_sde, "euler", ("DPMSolverSDEScheduler",), label="DPM++ SDE", aliases=("dpmpp_sde",), options=("eta",),
        calls=_HALVES, noise="brownian", a1111_grid="karras", reads=_GRIDS,
    ),
    Scheduler(
        "dpm++2m", "DPM-Solver++(2M): second order, one network call a step; good pictures in 20 steps",
        multistep, "dpm_solver", _MULTI, label="DPM++ 2M", aliases=("dpmpp_2m",),
        options=_DPM, fixed={"algorithm_type": "dpmsolver++", "solver_order": 2}, a1111_grid="karras",
        reads=_READS,
    ),
    Scheduler(
        "dpm++2m_sde", "DPM++ 2M of the reverse SDE: fresh noise at every step",
        multistep, "dpm_solver", _MULTI, label="DPM++ 2M SDE",
        aliases=("dpmpp_2m_sde",), options=_DPM, fixed={"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
        noise="fresh", a1111_grid="exponential", reads=_READS,
    ),
    Scheduler(
        "dpm++2m_sde_heun", "DPM++ 2M SDE with the exact second-order factor",
        multistep, "dpm_solver", (), label="DPM++ 2M SDE Heun", options=_DPM, noise="fresh", a1111_grid="exponential",
        fixed={"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "heun"}, reads=_READS,
    ),
    Scheduler(
        "dpm++3m", "DPM-Solver++(3M): three steps' estimates",
        multistep, "dpm_solver", _MULTI, aliases=("dpmpp_3m",),
        options=_DPM, fixed={"algorithm_type": "dpmsolver++", "solver_order": 3}, reads=_READS,
    ),
    Scheduler(
        "dpm++3m_sde", "DPM++ 3M of the reverse SDE; wants 20 steps or more",
        multistep, "dpm_solver", _MULTI, label="DPM++ 3M SDE",
        aliases=("dpmpp_3m_sde",), options=_DPM, noise="fresh", a1111_grid="exponential", discards=True,
        fixed={"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, defaults={"solver_type": "heun"},
        reads=_READS,
    ),
    *(
        Scheduler(
            f"dpm++{order}s", f"DPM-Solver++ of order {order} in turns of {order} step{'s' * (order > 1)}",
            singlestep, "dpm_single", ("DPMSolverSinglestepScheduler",), aliases=(f"dpmpp_{order}s",),
            options=_DPM[:-1], fixed={"solver_order": order}, noise="fresh", reads=_READS,
        )
        for order in (2, 3, 1)
    ),
    *(
        Scheduler(
            f"dpm++1{sde}", "first order: DDIM on DPM-Solver's levels" + ", at eta 1" * bool(sde),
            multistep, "dpm_solver", _MULTI, options=_DPM, noise="fresh" * bool(sde), reads=_READS,
            fixed={"algorithm_type": "sde-dpmsolver++" if sde else "dpmsolver++", "solver_order": 1},
        )
        for sde in ("", "_sde")
    ),
    Scheduler(
        "dpm_solver", "DPM-Solver (without ++): extrapolates the noise; for small guidance",
        multistep, "dpm_solver", _MULTI, options=_DPM, fixed={"algorithm_type": "dpmsolver"}, reads=_READS,
        by_slopes=True,
    ),
    Scheduler(
        "dpm_solver_sde", "DPM-Solver of the reverse SDE",
        multistep, "dpm_solver", _MULTI, options=_DPM, fixed={"algorithm_type": "sde-dpmsolver"}, noise="fresh",
        reads=_READS, by_slopes=True,
    ),
    Scheduler(
        "unipc", "UniPC: predictor and corrector, one network call a step; good pictures in 10 steps",
        unipc, "dpm_solver", ("UniPCMultistepScheduler",), label="UniPC", aliases=("uni_pc_bh2",),
        options=_UNIPC, fixed={"solver_type": "bh2"}, reads=_READS,
    ),
    Scheduler(
        "unipc_bh1", "UniPC with B(h) = h",
        unipc, "dpm_solver", ("UniPCMultistepScheduler",), aliases=("uni_pc",),
        options=_UNIPC, fixed={"solver_type": "bh1"}, reads=_READS,
    ),
    Scheduler(
        "deis", "DEIS: multistep in log sigma",
        deis, "dpm_solver", ("DEISMultistepScheduler",), label="DEIS", options=("solver_order", "lower_order_final"),
        spacing=Spacing("linspace", final_sigmas_type="sigma_min"), reads=("grids", "thresholding"), by_slopes=True,
    ),
    Scheduler(
        "lcm", "for latent consistency models: 1 to 8 steps, fresh noise in between, guidance 1 to 2",
        lcm, "distilled", ("LCMScheduler",), label="LCM", spacing=_LEADING, noise="fresh", reads=_CUTS,
    ),
    Scheduler(
        "tcd", "for trajectory consistency models: few steps; eta 0 is deterministic",
        tcd, "distilled", ("TCDScheduler",), label="TCD", options=("eta",), noise="fresh", timed=True,
        spacing=Spacing("leading", final_sigmas_type="sigma_min"),
    ),
)  # fmt: skip
SCHEDULERS: dict[str, Scheduler] = {row.name: row for row in _ROWS}


def _names() -> dict[str, Scheduler]:
    """Every name in small letters. Of two rows with one diffusers class the earlier has it."""
    names = {name.lower(): row for row in reversed(_ROWS) for name in row.classes}
    return names | {name.lower(): row for row in _ROWS for name in (row.name, row.label, *row.aliases) if name}


def find(name: str) -> tuple[Scheduler, str]:
    """The scheduler of a short name, a name of A1111 or a diffusers class name, in any case, and the grid that may
    follow it ("DPM++ 2M Karras", "euler_karras"), "" where none does.

    UsageError: there is none (the nearest short name is offered).
    """
    names, asked = _names(), name.strip().lower()
    if asked in names:
        return names[asked], ""
    for known in {label.lower(): row.name for row in GRIDS.values() for label in (row.name, row.label) if label}:
        rest = asked.removesuffix(known)
        if rest != asked and rest[-1:] in ("_", " ") and rest[:-1].strip() in names:
            return names[rest[:-1].strip()], find_grid(known).name
    near = [names[known].name for known in get_close_matches(asked, names, n=1, cutoff=0.5)]
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown scheduler {name!r}; {hint}known: {', '.join(SCHEDULERS)}")
