"""Reading a diffusers scheduler_config.json: its solver, noise schedule, prediction and noise levels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm.diffusion.continuous import EDMSchedule, FlowSchedule
from ldm.diffusion.grids import GRIDS, find_grid
from ldm.diffusion.guidance import bounded, clipped, thresholded
from ldm.diffusion.prediction import FLOW, PREDICTIONS, Denoiser, Prediction, edm
from ldm.diffusion.schedule import VARIANCES, NoiseSchedule
from ldm.diffusion.spacing import SPACINGS, Levels, Schedule, Spacing, levels
from ldm.errors import ModelError, UsageError
from ldm.schedulers.solver import Solver
from ldm.schedulers.table import SCHEDULERS, Option, Scheduler, find

EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"

_BOOLS = (False, True, None)
_ANY = None
_KNOWN: dict[str, tuple[Any, ...] | None] = {
    "num_train_timesteps": _ANY, "beta_start": _ANY, "beta_end": _ANY, "beta_schedule": _ANY, "trained_betas": _ANY,
    "rescale_betas_zero_snr": _BOOLS, "steps_offset": _ANY, "prediction_type": _ANY,
    "timestep_spacing": SPACINGS, "final_sigmas_type": ("zero", "sigma_min"), "set_alpha_to_one": _BOOLS,
    "clip_sample": _BOOLS, "clip_sample_range": _ANY, "thresholding": _BOOLS, "dynamic_thresholding_ratio": _ANY,
    "sample_max_value": _ANY, "skip_prk_steps": _BOOLS, "solver_order": _ANY, "algorithm_type": _ANY,
    "solver_type": _ANY, "lower_order_final": _BOOLS, "euler_at_final": _BOOLS, "predict_x0": _BOOLS,
    "disable_corrector": _ANY, "variance_type": (*VARIANCES, "fixed_small_log", "fixed_large_log", None),
    **{row.field: _BOOLS for row in GRIDS.values() if row.field}, "original_inference_steps": _ANY,
    "timestep_scaling": _ANY, "noise_sampler_seed": _ANY, "sigma_data": _ANY, "rho": _ANY, "shift": _ANY,
    "sigma_schedule": ("karras", "exponential"), "shift_terminal": _ANY, "stochastic_sampling": _BOOLS,
    "base_shift": _ANY, "max_shift": _ANY, "base_image_seq_len": _ANY, "max_image_seq_len": _ANY,
    "time_shift_type": _ANY, "flow_shift": _ANY, "use_flow_sigmas": (False, None), "solver_p": (None,),
    "use_dynamic_shifting": (False, None), "invert_sigmas": (False, None), "interpolation_type": ("linear",),
    "timestep_type": ("discrete",), "sigma_min": _ANY, "sigma_max": _ANY,
    "lambda_min_clipped": (-math.inf, None, "-inf", "-Infinity"),
    "tensor_format": _ANY, "predict_epsilon": (True, None), "timestep_values": (None,),  # of 2022
}  # fmt: skip
"""Every field of the classes of SCHEDULERS -> the values we compute as diffusers does (_ANY: read or checked where it
is used, or of no effect); another value, or another field, is refused."""

_NUMBERS = ("num_train_timesteps", "beta_start", "beta_end", "steps_offset", "clip_sample_range", "sample_max_value",
            "dynamic_thresholding_ratio", "original_inference_steps", "timestep_scaling", "sigma_data", "rho",
            "shift")  # fmt: skip
_NARROW_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"clip_sample": True},
    "DDIMScheduler": {"clip_sample": True},
    "PNDMScheduler": {"set_alpha_to_one": False, "skip_prk_steps": False},
    "HeunDiscreteScheduler": _NARROW_BETAS,
    "KDPM2DiscreteScheduler": _NARROW_BETAS,
    "KDPM2AncestralDiscreteScheduler": _NARROW_BETAS,
    "DPMSolverSDEScheduler": _NARROW_BETAS,
    "DPMSolverMultistepScheduler": _DPM,
    "EDMDPMSolverMultistepScheduler": _DPM,
    "DPMSolverSinglestepScheduler": _DPM | {"lower_order_final": False},
    "UniPCMultistepScheduler": {"solver_type": "bh2"},
    "LCMScheduler": _NARROW_BETAS | {"beta_schedule": "scaled_linear"},
    "TCDScheduler": _NARROW_BETAS | {"beta_schedule": "scaled_linear"},
}
"""What a class does when its config does not say, where that is not what others do."""

_SAME = {"solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
         "algorithm_type": {"deis": "dpmsolver++"}}  # fmt: skip
_SAME_UNIPC = {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}}
"""Values of another class's solver -> what this one takes them for, as in diffusers."""


@dataclass(frozen=True)
class Sampling:
    """What a scheduler_config.json and the user's wishes come to.

    schedule, kind and prediction (the kind's name) belong to the network; scheduler, spacing and options (arguments of
    the solver) are how to sample from it. clip: x0 is cut to +- so much. threshold: ratio and highest value of dynamic
    thresholding. boundary: timestep scaling of a consistency model. discards: one level more is laid out and the last
    but one left out. note: what was decided that was not asked for, one sentence for the user; empty if nothing was.
    """

    scheduler: Scheduler
    schedule: Schedule
    prediction: str
    kind: Prediction
    spacing: Spacing
    options: dict[str, Option]
    clip: float | None = None
    threshold: tuple[float, float] | None = None
    boundary: float | None = None
    family: str = ""
    noise: str = ""
    discards: bool = False
    note: str = ""

    def levels(self, n: int) -> Levels:
        """The levels of a run of n steps. UsageError: they do not fit."""
        run = levels(self.schedule, n + self.discards, self.spacing, self.family or self.scheduler.family)
        if self.discards:
            run = Levels((*run.sigmas[:-2], run.sigmas[-1]), run.timesteps[:-1], run.start)
        return run

    def solver(self, eta: float | None = None) -> Solver:
        """The solver with the file's options, and eta where one is asked for. UsageError: it has none."""
        if eta is not None and "eta" not in self.scheduler.options:
            having = ", ".join(row.name for row in SCHEDULERS.values() if "eta" in row.options)
            raise UsageError(f"eta is {eta}, but {self.scheduler.name} has none; use one of {having}, or leave it out")
        return self.scheduler.bound(self.options | ({} if eta is None else {"eta": eta}), self.schedule)

    def denoiser(self, denoise: Denoiser, levels: Levels) -> Denoiser:
        """The denoiser with what this scheduler does to its x0. levels: of the run."""
        if self.threshold:
            denoise = thresholded(denoise, *self.threshold)
        elif self.clip is not None:
            denoise = clipped(denoise, self.clip)
        if self.boundary is not None:
            denoise = bounded(denoise, levels.told, self.boundary)
        return denoise

    def t(self, sigma: float) -> float:
        """What the network is told at a level between two of a run."""
        return float(self.schedule.t(sigma))

    def scale(self, sigma: float) -> float:
        """The factor of x at a level in the latents that a decoder, or the next model, takes."""
        return self.kind.c_in(sigma) if sigma > 0 and not isinstance(self.schedule, EDMSchedule) else 1.0


def from_config(
    config: Mapping[str, Any],
    scheduler: str | None = None,
    *,
    schedule_type: str | None = None,
    a1111: bool = False,
    timesteps: tuple[float, ...] = (),
    sigmas: tuple[float, ...] = (),
    xl: bool = False,
) -> Sampling:
    """Read a diffusers scheduler_config.json (a dict); absent fields have the default of the class that runs.

    scheduler: the name (see `find`) of another scheduler than the file's to sample with; as in diffusers it keeps the
    file's spacing, offset, grid and final level where it has such fields, and its own defaults elsewhere.
    schedule_type: a grid (ldm.diffusion.grids) or a spacing in place of the file's; "automatic" is as None. a1111:
    levels are laid out as k-diffusion does under stable-diffusion-webui. timesteps, sigmas: the run's own, as of
    Spacing. xl: whether the network is SDXL's.

    ModelError, naming the field: an unknown class or field; a value whose meaning we would compute differently, or of
    the wrong type; epsilon prediction with zero terminal SNR, which no sampler can begin from. UsageError: an unknown
    scheduler, schedule_type or beta_schedule, or a grid that this scheduler cannot use.
    """
    theirs = _class_of(config)
    config = _filled(config, theirs)
    row, asked = find(scheduler) if scheduler else (_own_row(config, theirs), "")
    schedule, prediction, kind = _network(config, theirs)
    wanted = asked if schedule_type is None or schedule_type.lower() == "automatic" else schedule_type
    spacing = replace(_spacing(config, row), timesteps=timesteps, sigmas=sigmas, xl=xl)
    if wanted in SPACINGS:
        spacing = replace(spacing, timestep_spacing=wanted, sigma_grid="")
    elif wanted:
        spacing = replace(spacing, sigma_grid=find_grid(wanted).name)
    if isinstance(schedule, FlowSchedule) and row.by_slopes:
        others = ", ".join(name for name, other in SCHEDULERS.items() if not other.by_slopes)
        raise UsageError(
            f"{row.name} goes along slopes of x by sigma, which of a flow-matching model begins at infinity, where "
            f"float32 has no digits left for them; use one of {others}"
        )
    if row.family == "distilled" and spacing.sigma_grid:
        raise UsageError(
            f"{row.name} visits the times that its model was distilled at, not the grid {spacing.sigma_grid}; "
            "leave the schedule type out, or choose another scheduler"
        )
    sampling = Sampling(
        row, schedule, prediction, kind, spacing, _options(config, row, prediction), noise=row.noise,
        clip=_clip(config, row), threshold=_threshold(config, row), boundary=_boundary(config, row, schedule),
    )  # fmt: skip
    return _as_a1111(sampling, wanted) if a1111 else sampling


def network_of(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """The noise schedule a network was trained on and what it predicts, whatever solver the scheduler config names.

    Errors as of `from_config`, but for those of the solver; ModelError for a network without a table of noise levels
    (EDM, flow matching).
    """
    schedule, prediction = trained_on(config)
    if not isinstance(schedule, NoiseSchedule):
        raise _untabled(config)
    return schedule, prediction


def trained_on(config: Mapping[str, Any]) -> tuple[NoiseSchedule | FlowSchedule, str]:
    """The same also of flow matching, whose levels can be tabled. ModelError for EDM."""
    theirs = _class_of(config)
    schedule, prediction, _ = _network(_filled(config, theirs), theirs)
    if isinstance(schedule, EDMSchedule):
        raise _untabled(config)
    return schedule, prediction


def _untabled(config: Mapping[str, Any]) -> ModelError:
    theirs = config["_class_name"]
    return ModelError(f"the scheduler config has _class_name {theirs}: a network without a table of noise levels")


def _class_of(config: Mapping[str, Any]) -> str:
    """The config's class, after what is known of its fields was checked."""
    theirs = str(config.get("_class_name", ""))
    known = dict.fromkeys(name for row in SCHEDULERS.values() for name in row.classes)
    if theirs not in known:
        raise ModelError(
            f"the scheduler config has _class_name {theirs!r}, whose noise schedule is not known; known: "
            f"{', '.join(known)}"
        )
    for field, value in config.items():
        if field.startswith("_"):
            continue
        if field not in _KNOWN:
            raise ModelError(
                f"the scheduler config has a field {field!r}, which no scheduler known here has; remove it"
            )
        allowed = _KNOWN[field]
        if allowed is not None and value not in allowed:
            named = " or ".join(repr(one) for one in allowed if one is not None)
            raise ModelError(f"the scheduler config has {field} = {value!r}, which is not built; it must be {named}")
        if field in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ModelError(f"the scheduler config has {field} = {value!r}; it must be a number")
    return theirs


def _filled(config: Mapping[str, Any], theirs: str) -> dict[str, Any]:
    """The config with its class's defaults where it does not say; None says nothing."""
    return _DEFAULTS.get(theirs, {}) | {name: value for name, value in config.items() if value is not None}


def _own_row(config: Mapping[str, Any], theirs: str) -> Scheduler:
    """The row of the config's class, and of what else tells rows of one class apart."""
    if config.get("stochastic_sampling"):
        return SCHEDULERS["lcm"]
    rows = [row for row in SCHEDULERS.values() if theirs in row.classes]
    for row in rows:
        if all(name not in config or _translated(config, row, name) == value for name, value in row.fixed.items()):
            return row
    named = ", ".join(f"{name} = {config[name]!r}" for name in rows[0].fixed if name in config)
    raise ModelError(f"the scheduler config of a {theirs} has {named}, which is not built")


def _network(config: Mapping[str, Any], theirs: str) -> tuple[Schedule, str, Prediction]:
    """What the network was trained on, what it predicts, and that in its frame."""
    prediction = str(config.get("prediction_type", "epsilon"))
    if theirs == FLOW_MATCH:
        terminal, shift = config.get("shift_terminal"), float(config.get("shift", 1.0))
        return FlowSchedule(shift, terminal, True, int(config.get("num_train_timesteps", 1000))), "flow", FLOW
    if theirs in EDM:
        _one_of(config, "prediction_type", ("epsilon", "v_prediction"))
        low, high = float(config.get("sigma_min", 0.002)), float(config.get("sigma_max", 80.0))
        exponential = config.get("sigma_schedule") == "exponential"
        schedule = EDMSchedule(low, high, float(config.get("rho", 7.0)), exponential)
        return schedule, prediction, edm(prediction, float(config.get("sigma_data", 0.5)))
    for field in ("sigma_min", "sigma_max"):
        _one_of(config, field, (None,))
    _one_of(config, "prediction_type", tuple(PREDICTIONS))
    table = NoiseSchedule.from_config(config)
    if prediction == "epsilon" and table.zero_terminal_snr:
        raise ModelError(
            "the scheduler config has rescale_betas_zero_snr with prediction_type 'epsilon', which draws no image;"
            " prediction_type must be 'v_prediction' or 'sample'"
        )
    return table, prediction, PREDICTIONS[prediction]


def _one_of(config: Mapping[str, Any], field: str, allowed: tuple[Any, ...]) -> None:
    if field in config and config[field] not in allowed:
        named = " or ".join(repr(value) for value in allowed)
        raise ModelError(
            f"the scheduler config has {field} = {config[field]!r}, which is not built; it must be {named}"
        )


def _spacing(config: Mapping[str, Any], row: Scheduler) -> Spacing:
    """The file's spacing, in what the row's class reads of it."""
    spacing = replace(
        row.spacing,
        timestep_spacing=config.get("timestep_spacing", row.spacing.timestep_spacing),
        steps_offset=int(config.get("steps_offset", 0)),
        original_inference_steps=int(config.get("original_inference_steps", 50)),
    )
    grids = [name for name, grid in GRIDS.items() if grid.field and config.get(grid.field)]
    if len(grids) > 1:
        raise ModelError(f"the scheduler config asks for the grids {', '.join(grids)} at once; it must be one of them")
    if grids and "grids" in row.reads:
        spacing = replace(spacing, sigma_grid=grids[0])
    if "set_alpha_to_one" in row.reads and not config.get("set_alpha_to_one", True):
        spacing = replace(spacing, final_sigmas_type="sigma_min")
    if "final_sigmas_type" in row.reads:
        spacing = replace(spacing, final_sigmas_type=config.get("final_sigmas_type", "zero"))
    return spacing


def _translated(config: Mapping[str, Any], row: Scheduler, name: str) -> Any:
    """A value of the file as this row's solver understands it."""
    value, same = config[name], _SAME_UNIPC if "predict_x0" in row.options else _SAME
    return same.get(name, {}).get(value, value) if isinstance(value, str) else value


def _options(config: Mapping[str, Any], row: Scheduler, prediction: str) -> dict[str, Option]:
    """The file's values of the row's options, but for what makes it this row."""
    options: dict[str, Option] = {}
    for name in row.options:
        if name in config and name not in row.fixed:
            value = _translated(config, row, name)
            options[name] = tuple(value) if isinstance(value, list) else value
    if "prediction" in row.options:
        options["prediction"] = prediction if prediction in PREDICTIONS else "epsilon"
    return options


def _clip(config: Mapping[str, Any], row: Scheduler) -> float | None:
    if not config.get("clip_sample") or "clip_sample" not in row.reads:
        return None
    _refuse_for_ddim(row, "clip_sample")
    return float(config.get("clip_sample_range", 1.0))


def _threshold(config: Mapping[str, Any], row: Scheduler) -> tuple[float, float] | None:
    if not config.get("thresholding") or "thresholding" not in row.reads:
        return None
    if "predict_x0" in row.options and not config.get("predict_x0", True):
        return None  # as in diffusers, where the noise is not cut
    _refuse_for_ddim(row, "thresholding")
    return float(config.get("dynamic_thresholding_ratio", 0.995)), float(config.get("sample_max_value", 1.0))


def _refuse_for_ddim(row: Scheduler, field: str) -> None:
    if row.name == "ddim":
        raise ModelError(
            f"the scheduler config has {field} = True, which with DDIM is not built (its noise would stay that of the "
            "uncut image); it must be False, or take another scheduler"
        )


def _boundary(config: Mapping[str, Any], row: Scheduler, schedule: Schedule) -> float | None:
    ours = row.name == "lcm" and isinstance(schedule, NoiseSchedule)
    return float(config.get("timestep_scaling", 10.0)) if ours else None


def _as_a1111(sampling: Sampling, wanted: str) -> Sampling:
    """The same scheduler as stable-diffusion-webui 1.10 runs it: k-diffusion's functions, or CompVis' DDIM and PLMS."""
    row = sampling.scheduler
    if not isinstance(sampling.schedule, NoiseSchedule) or sampling.spacing.timesteps or sampling.spacing.sigmas:
        return sampling
    if row.name in ("ddim", "plms"):
        spacing = replace(sampling.spacing, final_sigmas_type="sigma_min", sigma_grid="")
        plms: dict[str, Option] = {"skip_prk_steps": True, "prediction": "epsilon"}
        options = plms if row.name == "plms" else sampling.options
        return replace(sampling, spacing=spacing, family="compvis", options=options)
    if not row.label or row.family not in ("euler", "kdpm2", "dpm_solver") or row.name in ("unipc", "deis"):
        note = f"stable-diffusion-webui's own {row.label or row.name} is not built; it runs as in diffusers"
        return replace(sampling, note=note)
    grid = find_grid(wanted if wanted and wanted not in SPACINGS else row.a1111_grid).name
    spacing = replace(sampling.spacing, sigma_grid=grid, final_sigmas_type="zero")
    options = sampling.options | ({"lower_order_final": False} if "lower_order_final" in row.options else {})
    noise = "brownian" if row.fixed.get("algorithm_type") == "sde-dpmsolver++" else row.noise
    return replace(sampling, spacing=spacing, family="k_diffusion", options=options, noise=noise, discards=row.discards)
