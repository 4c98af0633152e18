"""Reading a diffusers scheduler_config.json: its solver, noise schedule, prediction and noise levels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.schedule import VARIANCES, NoiseSchedule
from ldm.diffusion.spacing import SPACINGS, Spacing
from ldm.errors import ModelError
from ldm.schedulers.table import SCHEDULERS, Option, Scheduler, find

FALLBACK = "dpm++2m"
"""Stands in for a class of SUBSTITUTED when the caller names no scheduler; deterministic multistep, as PNDM is."""

SUBSTITUTED = (
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
"""Classes whose schedule and prediction are read as they are, but which another solver runs."""

_HEUN_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_DEFAULT_BETAS = {
    "HeunDiscreteScheduler": _HEUN_BETAS,
    "KDPM2DiscreteScheduler": _HEUN_BETAS,
    "KDPM2AncestralDiscreteScheduler": _HEUN_BETAS,
}
"""Where the default beta_start and beta_end of a class are not 0.0001 and 0.02."""

_NUMBERS = ("num_train_timesteps", "beta_start", "beta_end", "steps_offset")

_SHARED: dict[str, tuple[Any, ...]] = {
    "prediction_type": tuple(PREDICTIONS),
    "timestep_spacing": SPACINGS,
    "thresholding": (False, None),
    "clip_sample": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
}
_OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDPMScheduler": {"variance_type": VARIANCES},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint",),
        "solver_order": (2,),
        "variance_type": (None,),
        "final_sigmas_type": ("zero", "sigma_min"),
        "lambda_min_clipped": (-math.inf, None, "-inf", "-Infinity"),
    },
    "EulerDiscreteScheduler": {"final_sigmas_type": ("zero", "sigma_min")},
}
"""Field -> the values we compute as that class does; any other is refused. _SHARED holds for every class."""

_UNSAID: dict[str, dict[str, Any]] = {"DDPMScheduler": {"clip_sample": True}, "DDIMScheduler": {"clip_sample": True}}
"""What a class does when its config does not say, where that is to be refused."""


@dataclass(frozen=True)
class Sampling:
    """What a scheduler_config.json says.

    schedule and prediction (a name of PREDICTIONS) belong to the network; scheduler, spacing and options (arguments of
    the solver, for `Scheduler.bound`) are how to sample from it. note: what was decided that the file does not say, one
    sentence for the user; empty if nothing was.
    """

    scheduler: Scheduler
    schedule: NoiseSchedule
    prediction: str
    spacing: Spacing
    options: dict[str, Option]
    note: str = ""


def from_config(config: Mapping[str, Any], scheduler: str | None = None) -> Sampling:
    """Read a diffusers scheduler_config.json (a dict); absent fields have the default of the class that runs.

    scheduler: the name (see `find`) of another scheduler than the file's to sample with; as in diffusers it keeps the
    file's spacing, offset and final level where it has such fields, and its own defaults elsewhere. Without it, a class
    of SUBSTITUTED is run by FALLBACK and the note says so.

    ModelError, naming the field: a class that is neither known nor of SUBSTITUTED; a value whose meaning we would
    compute differently, or of the wrong type; epsilon prediction with zero terminal SNR, which no sampler can begin
    from. UsageError: an unknown `scheduler` or beta_schedule.
    """
    theirs = str(config.get("_class_name", ""))
    rows = {row.diffusers_class: row for row in reversed(SCHEDULERS.values())}
    if theirs not in rows and theirs not in SUBSTITUTED:
        known = ", ".join([*rows, *SUBSTITUTED])
        raise ModelError(
            f"the scheduler config has _class_name {theirs!r}, whose noise schedule is not known; known: {known}"
        )
    row, note = rows.get(theirs), ""
    if scheduler is not None:
        row = find(scheduler)
    elif row is None:
        row = SCHEDULERS[FALLBACK]
        note = f"{theirs} is not built; sampling with {FALLBACK} on the same noise schedule instead"
    schedule, prediction = network_of(config)
    _refuse_others(config, row)
    return Sampling(row, schedule, prediction, _spacing(config, row), _options(config, row), note)


def network_of(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """The noise schedule a network was trained on and what it predicts, whatever solver the scheduler config names.

    Errors as of `from_config`, but for those of the solver.
    """
    for field in _NUMBERS:
        if not isinstance(config.get(field, 0), int | float):
            raise ModelError(f"the scheduler config has {field} = {config[field]!r}; it must be a number")
    prediction = config.get("prediction_type", "epsilon")
    _refuse(config, "prediction_type", tuple(PREDICTIONS))
    schedule = NoiseSchedule.from_config({**_DEFAULT_BETAS.get(str(config.get("_class_name")), {}), **config})
    if prediction == "epsilon" and schedule.zero_terminal_snr:
        raise ModelError(
            "the scheduler config has rescale_betas_zero_snr with prediction_type 'epsilon', which draws no image;"
            " prediction_type must be 'v_prediction' or 'sample'"
        )
    return schedule, str(prediction)


def _refuse_others(config: Mapping[str, Any], row: Scheduler) -> None:
    """ModelError where the class that runs would do with this config what we do not."""
    own: dict[str, tuple[Any, ...]] = {}
    if config.get("_class_name") == row.diffusers_class:
        own = _OWN.get(row.diffusers_class, {})
        config = {**_UNSAID.get(row.diffusers_class, {}), **config}
    for field, allowed in {**_SHARED, **own}.items():
        _refuse(config, field, allowed)


def _refuse(config: Mapping[str, Any], field: str, allowed: tuple[Any, ...]) -> None:
    if field in config and config[field] not in allowed:
        named = " or ".join(repr(value) for value in allowed)
        raise ModelError(
            f"the scheduler config has {field} = {config[field]!r}, which is not built; it must be {named}"
        )


def _spacing(config: Mapping[str, Any], row: Scheduler) -> Spacing:
    spacing = replace(
        row.spacing,
        timestep_spacing=config.get("timestep_spacing", row.spacing.timestep_spacing),
        steps_offset=int(config.get("steps_offset", 0)),
    )
    if "use_karras_sigmas" in row.reads and config.get("use_karras_sigmas"):
        spacing = replace(spacing, use_karras_sigmas=True)
    if "set_alpha_to_one" in row.reads and not config.get("set_alpha_to_one", True):
        spacing = replace(spacing, final_sigmas_type="sigma_min")
    if "final_sigmas_type" in row.reads:
        spacing = replace(spacing, final_sigmas_type=config.get("final_sigmas_type", "zero"))
    return spacing


def _options(config: Mapping[str, Any], row: Scheduler) -> dict[str, Option]:
    options: dict[str, Option] = {
        field: bool(config[field])
        for field in ("lower_order_final", "euler_at_final")
        if field in row.reads and field in config
    }
    if "variance_type" in row.reads and config.get("variance_type") in VARIANCES:
        options["variance"] = str(config["variance_type"])
    return options
