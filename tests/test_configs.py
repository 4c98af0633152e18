"""Schedulers by every name they have, and diffusers' scheduler_config.json: what is read, what is refused and how."""

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from solving import SD15, difference, ours, read, scheduler, stream, theirs

from ldm.diffusion import PREDICTIONS, NoiseSchedule, Spacing
from ldm.diffusion.continuous import EDMSchedule, FlowSchedule
from ldm.diffusion.grids import GRIDS
from ldm.errors import ModelError, UsageError
from ldm.schedulers import SCHEDULERS, find, from_config, network_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
CLASSES = list(dict.fromkeys(name for row in SCHEDULERS.values() for name in row.classes))
TABLE_FREE = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")

# Names.

A1111 = {  # a label of stable-diffusion-webui -> the row
    "DDPM": "ddpm", "DDIM": "ddim", "PLMS": "plms", "LMS": "lms", "Euler": "euler", "Euler a": "euler_a",
    "Heun": "heun", "DPM2": "dpm2", "DPM2 a": "dpm2_a", "DPM++ 2S a": "dpm++2s_a", "DPM++ SDE": "dpm++sde",
    "DPM++ 2M": "dpm++2m", "DPM++ 2M SDE": "dpm++2m_sde", "DPM++ 2M SDE Heun": "dpm++2m_sde_heun",
    "DPM++ 3M SDE": "dpm++3m_sde", "UniPC": "unipc", "DEIS": "deis", "LCM": "lcm", "TCD": "tcd",
}  # fmt: skip
OTHERS = {
    "pndm": "plms", "euler_ancestral": "euler_a", "kdpm2": "dpm2", "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_a",
    "dpmpp_2s_ancestral": "dpm++2s_a", "dpmpp_sde": "dpm++sde", "dpmpp_2m": "dpm++2m", "dpmpp_2m_sde": "dpm++2m_sde",
    "dpmpp_3m": "dpm++3m", "dpmpp_3m_sde": "dpm++3m_sde", "dpmpp_1s": "dpm++1s", "dpmpp_2s": "dpm++2s",
    "dpmpp_3s": "dpm++3s", "uni_pc": "unipc_bh1", "uni_pc_bh2": "unipc",
    "DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "PNDMScheduler": "plms", "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler", "EDMEulerScheduler": "euler", "FlowMatchEulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a", "HeunDiscreteScheduler": "heun", "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2_a", "DPMSolverSDEScheduler": "dpm++sde",
    "DPMSolverMultistepScheduler": "dpm++2m", "EDMDPMSolverMultistepScheduler": "dpm++2m",
    "DPMSolverSinglestepScheduler": "dpm++2s", "UniPCMultistepScheduler": "unipc", "DEISMultistepScheduler": "deis",
    "LCMScheduler": "lcm", "TCDScheduler": "tcd",
}  # fmt: skip


def test_every_name_finds_its_scheduler() -> None:
    for name, row in (A1111 | OTHERS | {row: row for row in SCHEDULERS}).items():
        for written in (name, name.upper(), f" {name.lower()} "):
            assert find(written) == (SCHEDULERS[row], ""), written
    assert {row.label for row in SCHEDULERS.values()} - {""} == set(A1111)
    assert {alias for row in SCHEDULERS.values() for alias in row.aliases} <= set(OTHERS)
    assert all(hasattr(diffusers, name) and name in OTHERS for name in CLASSES)
    names = [
        name.lower() for row in SCHEDULERS.values() for name in {row.name, row.label.lower(), *row.aliases} if name
    ]
    assert len(names) == len(set(names)), "a name means one scheduler"


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_may_follow_a_name(grid: str) -> None:
    label = GRIDS[grid].label
    for name in ("euler", "Euler a", "DPM++ 2M SDE", "dpmpp_3m_sde", "EulerDiscreteScheduler", "DPM2 a"):
        row = find(name)[0]
        assert find(f"{name}_{grid}") == find(f"{name} {grid.upper()}") == (row, grid)
        if label and label != "DDIM":
            assert find(f"{name} {label}") == find(f"{name.upper()} {label.lower()}") == (row, grid)
    assert find("DPM++ 2M SDE Karras") == (SCHEDULERS["dpm++2m_sde"], "karras")
    assert find("dpm++ 2m sgm uniform") == (SCHEDULERS["dpm++2m"], "sgm_uniform")
    assert from_config(SD15 | {"_class_name": "PNDMScheduler"}, "DPM++ 2M Karras").spacing.sigma_grid == "karras"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("dpm+2m", r"unknown scheduler 'dpm\+2m'; did you mean 'dpm\+\+2m'"),
        ("eular_a", "did you mean 'euler_a'"), ("unpic", "did you mean 'unipc'"), ("qqq", "known: ddpm, ddim"),
        ("euler_karas", "unknown scheduler 'euler_karas'"), ("eulerkarras", "unknown scheduler 'eulerkarras'"),
        ("karras", "unknown scheduler 'karras'"), ("", "unknown scheduler ''"),
        ("euler-karras", "unknown scheduler 'euler-karras'"), ("euler_", "unknown scheduler 'euler_'"),
    ],
)  # fmt: skip
def test_misspelt_names_are_offered_the_nearest(typed: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find(typed)


SWITCHES = {row.field for row in GRIDS.values()} - {""}
UNREAD = {  # fields that a class of diffusers has and never reads, or on no way through a run
    "lcm": {"set_alpha_to_one"}, "tcd": {"set_alpha_to_one", "clip_sample", "thresholding"},
}  # fmt: skip


def takes_of(classes: Sequence[str]) -> set[str]:
    """The fields of classes of diffusers."""
    return {name for cls in classes for name in inspect.signature(getattr(diffusers, cls).__init__).parameters}


def test_every_row_says_what_it_is() -> None:
    for name, row in SCHEDULERS.items():
        assert row.name == name and row.description and row.description == row.description.strip(" .")
        assert set(row.fixed) | set(row.defaults) <= set(row.options)
        takes = list(inspect.signature(row.solver).parameters)[row.timed :]
        assert set(row.options) <= set(takes), "an option is an argument of the solver"
        assert row.a1111_grid in GRIDS and row.noise in ("", "fresh", "brownian")
        reads = {"grids"} if SWITCHES & takes_of(row.classes[:1]) else set()
        reads |= {"final_sigmas_type", "set_alpha_to_one", "clip_sample", "thresholding"} & takes_of(row.classes[:1])
        assert not row.classes or set(row.reads) == reads - UNREAD.get(name, set())
        fields = {"clip_sample": False} if name in ("ddpm", "ddim") else {}
        for cls in row.classes:
            if cls not in TABLE_FREE and cls != "DPMSolverSinglestepScheduler":  # which has one spacing alone
                own = from_config({"_class_name": cls, **fields}).spacing.timestep_spacing
                assert own == inspect.signature(getattr(diffusers, cls).__init__).parameters["timestep_spacing"].default


# Configs.


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_reads_its_own_defaults(name: str) -> None:
    """What diffusers' signature says, read whether it is written out or left out."""
    clips = {"clip_sample": False} if name == "DDIMScheduler" else {}
    oracle = scheduler(name, clips)
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    written = {key: p.default for key, p in parameters.items() if key != "self"} | clips
    sampling, whole = from_config({"_class_name": name, **clips}), from_config({"_class_name": name, **written})
    assert sampling.spacing == whole.spacing and sampling.scheduler is whole.scheduler
    assert sampling.prediction == whole.prediction and sampling.kind.c_out(3.0) == whole.kind.c_out(3.0)
    assert (sampling.clip, sampling.threshold, sampling.boundary) == (whole.clip, whole.threshold, whole.boundary)
    ends = [ours(found, 7, stream())[1][-1].x for found in (sampling, whole)]
    assert torch.equal(*ends)
    if name in TABLE_FREE:
        assert sampling.schedule == whole.schedule
        assert sampling.schedule == (EDMSchedule() if name.startswith("EDM") else FlowSchedule())
        return
    betas = {key: parameters[key].default for key in ("beta_start", "beta_end", "beta_schedule")}
    np.testing.assert_array_equal(sampling.schedule.betas, NoiseSchedule.from_config(betas).betas)
    np.testing.assert_array_equal(whole.schedule.betas, sampling.schedule.betas)
    np.testing.assert_allclose(sampling.schedule.betas, oracle.betas.numpy(), rtol=1e-5)
    if name != "DPMSolverSinglestepScheduler":  # which has one spacing alone
        assert sampling.spacing.timestep_spacing == parameters["timestep_spacing"].default


STABLE_DIFFUSION = json.loads(  # the scheduler_config.json of SD 1.x as published
    """{"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012, "beta_start": 0.00085,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
    "steps_offset": 1, "trained_betas": null, "clip_sample": false}"""
)


@pytest.mark.parametrize("cls", [name for name in CLASSES if name not in TABLE_FREE])
def test_the_config_of_stable_diffusion_with_any_scheduler_visits_what_diffusers_visits(cls: str) -> None:
    oracle = getattr(diffusers, cls).from_config(diffusers.PNDMScheduler.from_config(STABLE_DIFFUSION).config)
    oracle.set_timesteps(20)
    sampling = from_config(STABLE_DIFFUSION, cls)
    assert sampling.scheduler.classes[0] == cls and sampling.prediction == "epsilon" and not sampling.note
    np.testing.assert_array_equal(sampling.schedule.betas, NoiseSchedule.scaled_linear().betas)
    times = oracle.timesteps.tolist()
    middles = cls in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler")
    np.testing.assert_allclose(
        sampling.levels(20).timesteps, times[::2] if middles else [*dict.fromkeys(times)], atol=1e-3
    )


def test_what_is_kept_when_another_scheduler_is_chosen() -> None:
    assert from_config(STABLE_DIFFUSION, "ddim").spacing == Spacing("leading", 1, final_sigmas_type="sigma_min")
    assert from_config(STABLE_DIFFUSION, "dpm++2m").spacing == Spacing("linspace", 1)
    assert from_config(STABLE_DIFFUSION, "deis").spacing == Spacing("linspace", 1, final_sigmas_type="sigma_min")
    assert from_config(STABLE_DIFFUSION, "lcm").spacing == Spacing("leading", 1)
    assert from_config(STABLE_DIFFUSION).options == {"skip_prk_steps": True, "prediction": "epsilon"}
    asked = STABLE_DIFFUSION | {"use_karras_sigmas": True, "timestep_spacing": "trailing"}
    kept = {
        "dpm++2m": "karras",
        "lms": "karras",
        "dpm2": "karras",
        "unipc": "karras",
        "ddim": "",
        "euler_a": "",
        "lcm": "",
    }
    for name, grid in kept.items():
        spacing = from_config(asked, name).spacing
        assert (spacing.sigma_grid, spacing.timestep_spacing) == (grid, "trailing")
        assert from_config(asked, name, schedule_type="Automatic").spacing.sigma_grid == grid
    assert from_config(asked, "euler", schedule_type="leading").spacing == Spacing("leading", 1)
    assert from_config(asked, "euler karras", schedule_type="SGM Uniform").spacing.sigma_grid == "sgm_uniform"
    low = asked | {"final_sigmas_type": "sigma_min"}
    assert [from_config(low, name).spacing.final_sigmas_type for name in ("euler", "dpm++2s", "heun", "ddim")] == [
        "sigma_min", "sigma_min", "zero", "sigma_min",
    ]  # fmt: skip
    assert from_config(STABLE_DIFFUSION, timesteps=(900.0, 5.0)).levels(7).timesteps == (900, 5)
    assert from_config(STABLE_DIFFUSION, "euler", sigmas=(9.0, 2.0)).levels(7).sigmas == (9, 2, 0)
    assert from_config(STABLE_DIFFUSION, "euler", schedule_type="ays", xl=True).spacing.xl


@pytest.mark.parametrize(
    ("fields", "row", "options"),
    [
        ({}, "dpm++2m", {}),
        ({"solver_order": 3}, "dpm++3m", {}),
        ({"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, "dpm++3m_sde", {}),
        ({"algorithm_type": "sde-dpmsolver++"}, "dpm++2m_sde", {}),
        ({"algorithm_type": "deis"}, "dpm++2m", {}),  # of DEIS's own config
        ({"solver_type": "bh2", "lower_order_final": False}, "dpm++2m", {"solver_type": "midpoint"}),
        ({"solver_order": 1}, "dpm++1", {}),
        ({"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, "dpm++1_sde", {}),
        ({"algorithm_type": "dpmsolver", "solver_order": 1}, "dpm_solver", {"solver_order": 1}),
        ({"algorithm_type": "sde-dpmsolver"}, "dpm_solver_sde", {"solver_order": 2}),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "unipc_bh1", {}),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "midpoint"}, "unipc", {}),
        (
            {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0, 1]},
            "unipc",
            {"disable_corrector": (0, 1)},
        ),
        ({"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3}, "dpm++3s", {"lower_order_final": False}),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "euler", {}),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "lcm", {}),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
            "ddpm",
            {"variance_type": "learned_range"},
        ),
    ],
)
def test_the_row_and_options_of_a_config(fields: dict[str, Any], row: str, options: dict[str, Any]) -> None:
    sampling = from_config({"_class_name": "DPMSolverMultistepScheduler", **fields})
    assert sampling.scheduler.name == row
    assert {key: sampling.options[key] for key in options} == options
    sampling.solver()


def test_what_cuts_x0() -> None:
    base = {"clip_sample": True, "clip_sample_range": 0.5, "thresholding": True, "sample_max_value": 2.0}
    cutting = {
        "ddpm": (0.5, (0.995, 2.0)), "lcm": (0.5, (0.995, 2.0)), "heun": (0.5, None), "tcd": (None, None),
        "euler": (None, None), "plms": (None, None), "dpm++2m": (None, (0.995, 2.0)), "deis": (None, (0.995, 2.0)),
    }  # fmt: skip
    for name, expected in cutting.items():
        for sampling in (
            from_config({"_class_name": SCHEDULERS[name].classes[0], **base}),
            from_config({"_class_name": "DDIMScheduler", **base}, name),
        ):
            assert (sampling.clip, sampling.threshold) == expected, name
    unipc = {"_class_name": "UniPCMultistepScheduler", **base, "dynamic_thresholding_ratio": 0.8}
    assert from_config(unipc).threshold == (0.8, 2.0)
    assert from_config(unipc | {"predict_x0": False}).threshold is None
    assert from_config({"_class_name": "DDPMScheduler"}).clip == 1.0
    assert from_config(STABLE_DIFFUSION, "lcm").boundary == 10.0 and from_config(STABLE_DIFFUSION).boundary is None


@pytest.mark.parametrize("said", [{}, {"clip_sample": True, "thresholding": True}])
def test_what_a_class_has_no_field_for_it_does_not_do(said: dict[str, Any]) -> None:
    """PNDM with the config of a DDIM that cuts x0, be it by default."""
    config, how = SD15 | {"set_alpha_to_one": False, "steps_offset": 1} | said, {"skip_prk_steps": True}
    oracle = diffusers.PNDMScheduler.from_config(diffusers.DDIMScheduler(**config).config, **how)
    sampling = from_config({"_class_name": "DDIMScheduler", **config, **how}, "plms")
    sampling = replace(sampling, schedule=read(oracle).schedule)  # in float32
    assert difference("PNDMScheduler", sampling, ours(sampling, 20, stream())[1], theirs(oracle, 20)) < 1e-5


REFUSED = [
    (
        {"_class_name": "SASolverScheduler"},
        "_class_name 'SASolverScheduler', whose noise schedule is not known; known: ",
    ),
    ({"_class_name": "IPNDMScheduler"}, "'IPNDMScheduler'"),
    ({}, "_class_name ''"),
    ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample = True, which with DDIM is not built"),
    ({"_class_name": "DDIMScheduler"}, "clip_sample = True"),  # its default
    (
        {"_class_name": "DDIMScheduler", "clip_sample": False, "thresholding": True},
        "thresholding = True, which with DDIM",
    ),
    ({"beta_sart": 0.1}, "a field 'beta_sart', which no scheduler known here has; remove it"),
    ({"beta_start": "0.1"}, "beta_start = '0.1'; it must be a number"),
    ({"num_train_timesteps": True}, "num_train_timesteps = True; it must be a number"),
    ({"steps_offset": [1]}, r"steps_offset = \[1\]; it must be a number"),
    ({"timestep_spacing": "tailing"}, "timestep_spacing = 'tailing', which is not built; it must be 'leading' or"),
    ({"use_karras_sigmas": 1.5}, "use_karras_sigmas = 1.5"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas = True, which is not built; it must be False"),
    ({"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
    ({"invert_sigmas": True}, "invert_sigmas = True"),
    ({"interpolation_type": "log_linear"}, "interpolation_type = 'log_linear'"),
    ({"timestep_type": "continuous"}, "timestep_type = 'continuous'"),
    ({"lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1"),
    ({"sigma_max": 700.0}, "sigma_max = 700.0, which is not built; it must be None"),
    ({"sigma_min": 0.1}, "sigma_min = 0.1"),
    (
        {"prediction_type": "flow_prediction"},
        "prediction_type = 'flow_prediction', which is not built; it must be 'eps",
    ),
    ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "prediction_type = 'sample'"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with prediction_type 'epsilon', which draws no image"),
    (
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        "asks for the grids karras, beta at once; it must be one of",
    ),
    ({"solver_order": 4, "_class_name": "DPMSolverMultistepScheduler"}, "solver_order = 4, which is not built"),
    ({"variance_type": "learnt", "_class_name": "DDPMScheduler"}, "variance_type = 'learnt'"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_what_would_be_computed_differently_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    config = fields if not fields else {"_class_name": "EulerDiscreteScheduler", **fields}
    with pytest.raises(ModelError, match=said) as refusal:
        from_config(config)
    assert len(str(refusal.value).splitlines()) == 1 and str(refusal.value).startswith("the scheduler config")


def test_wishes_that_cannot_be_met_are_refused() -> None:
    for wish, said in [
        ({"scheduler": "lcm", "schedule_type": "karras"}, "lcm visits the times that its model was distilled at"),
        ({"scheduler": "LCM Karras"}, "not the grid karras; leave the schedule type out, or choose another scheduler"),
        ({"schedule_type": "karas"}, "did you mean 'karras'"),
        ({"scheduler": "eulr"}, "did you mean 'euler'"),
        ({"timesteps": (5.0,), "sigmas": (1.0,)}, "timesteps and sigmas were both given"),
        ({"scheduler": "ddim"}, None),
    ]:
        if said is None:
            from_config(STABLE_DIFFUSION, **wish)
            continue
        with pytest.raises(UsageError, match=said):
            from_config(STABLE_DIFFUSION, **wish)
    with pytest.raises(UsageError, match="did you mean 'scaled_linear'"):
        from_config({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_liner"})


def test_the_network_can_be_read_whatever_the_solver() -> None:
    zero = {**SD15, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "clip_sample": True}
    schedule, prediction = network_of({"_class_name": "DDIMScheduler", **zero})
    assert prediction == "v_prediction" and schedule.zero_terminal_snr
    narrow, plain = network_of({"_class_name": "LCMScheduler", "beta_schedule": None, "prediction_type": None})
    assert plain == "epsilon"
    np.testing.assert_array_equal(narrow.betas, NoiseSchedule.scaled_linear().betas)
    with pytest.raises(ModelError, match="EDMEulerScheduler: a network without a table of noise levels"):
        network_of({"_class_name": "EDMEulerScheduler"})
    with pytest.raises(ModelError, match="not known"):
        network_of(zero)
    assert {
        from_config({"_class_name": "EulerDiscreteScheduler", "prediction_type": p}).kind for p in PREDICTIONS
    } == set(PREDICTIONS.values())


def test_how_a_run_speaks_to_the_network_and_to_what_comes_after() -> None:
    table = from_config(STABLE_DIFFUSION)
    assert table.t(2.0) == NoiseSchedule.scaled_linear().t(2.0) and type(table.t(2.0)) is float
    assert (table.scale(0.0), table.scale(2.0)) == (1.0, pytest.approx(5**-0.5))
    flow = from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert (flow.t(3.0), flow.scale(0.0), flow.scale(3.0)) == (750.0, 1.0, 0.25)
    edm = from_config({"_class_name": "EDMEulerScheduler"})  # its samples are not scaled
    assert (edm.t(3.0), edm.scale(0.0), edm.scale(3.0)) == (pytest.approx(math.log(3) / 4), 1.0, 1.0)


# As stable-diffusion-webui runs them. Its levels and results are in test_schedulers.py and test_spacing.py.

AUTOMATIC = {  # label -> its grid there, whether one more level is laid out and the last but one left out
    "Euler": ("uniform", False), "Euler a": ("uniform", False), "LMS": ("uniform", False), "Heun": ("uniform", False),
    "DPM2": ("karras", True), "DPM2 a": ("karras", True), "DPM++ 2S a": ("karras", False),
    "DPM++ 2M": ("karras", False), "DPM++ SDE": ("karras", False), "DPM++ 2M SDE": ("exponential", False),
    "DPM++ 2M SDE Heun": ("exponential", False), "DPM++ 3M SDE": ("exponential", True),
}  # fmt: skip


@pytest.mark.parametrize("label", AUTOMATIC)
def test_the_profile_of_stable_diffusion_webui(label: str) -> None:
    grid, discards = AUTOMATIC[label]
    for wish in ({}, {"schedule_type": "Automatic"}, {"schedule_type": "leading"}):
        sampling = from_config(STABLE_DIFFUSION, label, a1111=True, **wish)
        assert (sampling.spacing.sigma_grid, sampling.discards) == (grid, discards) and not sampling.note
        assert sampling.noise == ("brownian" if "SDE" in label else "fresh" if label.endswith(" a") else "")
        assert len(sampling.levels(6).timesteps) == 6 and sampling.levels(6).sigmas[-1] == 0
        assert sampling.options.get("lower_order_final", False) is False
    other = from_config(STABLE_DIFFUSION, f"{label} Exponential", a1111=True)
    assert (other.spacing.sigma_grid, other.discards) == ("exponential", discards)
    kl = from_config(STABLE_DIFFUSION, label, schedule_type="KL Optimal", a1111=True).levels(6)
    assert len(kl.timesteps) == 6 and kl.sigmas[-1] == pytest.approx(float(NoiseSchedule.scaled_linear().sigmas[0]))
    plain = from_config(STABLE_DIFFUSION, label)
    assert not plain.discards and not plain.family


def test_what_that_profile_leaves_as_it_is() -> None:
    for name in ("unipc", "deis", "lcm", "tcd", "ddpm", "dpm++3m", "dpm_solver"):
        sampling = from_config(STABLE_DIFFUSION, name, a1111=True)
        assert "stable-diffusion-webui's own" in sampling.note and sampling.note.endswith("it runs as in diffusers")
        assert sampling.levels(5) == from_config(STABLE_DIFFUSION, name).levels(5)
    listed = from_config(STABLE_DIFFUSION, "euler", a1111=True, sigmas=(5.0, 1.0))
    assert listed == from_config(STABLE_DIFFUSION, "euler", sigmas=(5.0, 1.0)) or listed.spacing.sigmas == (5.0, 1.0)
    edm = from_config({"_class_name": "EDMEulerScheduler"}, a1111=True)
    assert edm.spacing.sigma_grid == "" and not edm.family
    of_v = STABLE_DIFFUSION | {"prediction_type": "v_prediction"}
    assert from_config(of_v).options["prediction"] == "v_prediction"
    plms = from_config(of_v, "PLMS", a1111=True)  # it extrapolates the noise, of whatever network
    assert plms.options == {"skip_prk_steps": True, "prediction": "epsilon"} and plms.family == "compvis"
    assert math.isfinite(plms.levels(9).sigmas[0])


def test_no_slopes_from_infinity() -> None:
    """Of a flow-matching model the first level is infinite; what steps by x0 there is exact, by slopes noise."""
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    for name in ("heun", "lms", "plms", "dpm2_a", "deis", "dpm_solver"):
        with pytest.raises(UsageError, match=f"{name} goes along slopes .* use one of ddpm, ddim, euler, euler_a"):
            from_config(flow, name)
    assert [from_config(flow, name).scheduler.name for name in ("unipc", "dpm++2m")] == ["unipc", "dpm++2m"]


def test_the_first_published_configs_are_read() -> None:
    """Fields that diffusers wrote in 2022 and dropped since."""
    old = {"tensor_format": "pt", "timestep_values": None, "predict_epsilon": True, "clip_sample": False}
    assert from_config({"_class_name": "DDIMScheduler", **old}).prediction == "epsilon"
    with pytest.raises(ModelError, match="predict_epsilon = False"):
        from_config({"_class_name": "DDPMScheduler", "predict_epsilon": False})
