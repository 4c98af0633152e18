"""Every step of every solver against diffusers, in one process: full tensors, to 1e-5 of the run's largest value (most
are within 1e-6). What diffusers has otherwise is named, and shown by another test.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from solving import (
    KERNEL,
    SAMPLE,
    SD15,
    SD21,
    UNIT,
    ZERO_SNR,
    compared,
    denoiser,
    difference,
    network,
    ours,
    read,
    scheduler,
    stream,
    theirs,
)  # fmt: skip
from torch import Tensor

from ldm.brownian import Brownian
from ldm.errors import ModelError
from ldm.schedulers import Step, from_config

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types:FutureWarning"),  # noise prediction; here it stays
]
Case = tuple[str, dict[str, Any], dict[str, Any]]  # diffusers' class, changes of its config, arguments of its step
MODELS = {"SD15": SD15, "SD21": SD21, "SAMPLE": SAMPLE, "ZERO_SNR": ZERO_SNR}
EPSILON_OR_V = ("LMSDiscrete", "EulerAncestral", "KDPM2", "DPMSolverSDE", "PNDM", "EDM", "FlowMatch")
OF_ZERO_SNR = ("DDIM", "DDPM", "EulerDiscrete", "EulerAncestral", "DPMSolverMultistep", "UniPC", "LCM", "TCD")
GRIDS = [{f"use_{grid}_sigmas": True} for grid in ("karras", "exponential", "beta")]
LU = {"use_lu_lambdas": True}
SPACINGS = [{"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")]
LOW = {"final_sigmas_type": "sigma_min"}
CUT = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}


def of_ddim_and_ddpm() -> Iterator[Case]:
    for spacing, eta in product(SPACINGS, (0.0, 0.5, 1.0)):
        yield "DDIMScheduler", {"clip_sample": False, **spacing}, {"eta": eta}
    yield "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, {"eta": 0.5}
    for spacing, variance in product(SPACINGS, ("fixed_small", "fixed_large", "fixed_small_log")):
        # there the last step of fixed_large adds noise, unless it is from timestep 0
        if "large" in variance and spacing["timestep_spacing"] == "trailing":
            continue
        yield "DDPMScheduler", {"clip_sample": False, "variance_type": variance, "steps_offset": 0, **spacing}, {}
    yield "DDPMScheduler", {"clip_sample_range": 0.7}, {}
    yield "DDPMScheduler", CUT, {}


def of_k_diffusion() -> Iterator[Case]:
    for change in ({}, *GRIDS, *SPACINGS):
        for name in ("EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"):
            if change != GRIDS[2] or "KDPM2" not in name:  # as of Euler, and slow there
                yield f"{name}Scheduler", change, {}
    yield from (("EulerAncestralDiscreteScheduler", spacing, {}) for spacing in (*SPACINGS, {}))
    yield "EulerDiscreteScheduler", LOW, {}
    yield "HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 0.8}, {}
    yield "LMSDiscreteScheduler", {}, {}
    yield "LMSDiscreteScheduler", GRIDS[0], {}


def of_dpm_solver() -> Iterator[Case]:
    for algorithm, order, kind in product(
        ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"), (1, 2, 3), ("midpoint", "heun")
    ):
        how = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind}
        finals: tuple[dict[str, Any], ...] = ({}, LOW) if "++" in algorithm else (LOW,)  # theirs refuses 0 of noise
        for final in finals:
            # theirs takes 1/2 from phi_3 with the wrong sign, and has no sde-dpmsolver of order 3: instead of it there
            # are k-diffusion's 3M SDE (test_schedulers.py) and the order of convergence (test_solver_laws.py)
            if order < 3 or "sde" not in algorithm:
                yield "DPMSolverMultistepScheduler", how | final, {}
            if algorithm != "sde-dpmsolver" and (order, kind, algorithm) != (3, "heun", "sde-dpmsolver++"):
                yield "DPMSolverSinglestepScheduler", how | final, {}
    for order, final in product((2, 3), (True, False)):
        yield "DPMSolverSinglestepScheduler", {"solver_order": order, "lower_order_final": final, **LOW}, {}
    for order in (2, 3):
        yield "DPMSolverMultistepScheduler", {"solver_order": order, "lower_order_final": False, **LOW}, {}
        yield "DPMSolverMultistepScheduler", {"solver_order": order, "euler_at_final": True, **LOW}, {}
        yield "DPMSolverMultistepScheduler", {"solver_order": order, "lower_order_final": False}, {}


def of_exponential_integrators() -> Iterator[Case]:
    for order, kind, of_data, final in product((1, 2, 3, 4), ("bh1", "bh2"), (True, False), ({}, LOW)):
        if final == LOW or (of_data and kind == "bh2"):  # the others are not a number there at sigma 0: see below
            how = {"solver_order": order, "solver_type": kind, "predict_x0": of_data}
            yield "UniPCMultistepScheduler", how | final, {}
    yield "UniPCMultistepScheduler", {"lower_order_final": False, "solver_order": 3, **LOW}, {}
    yield "UniPCMultistepScheduler", {"disable_corrector": [0, 2]}, {}
    yield "UniPCMultistepScheduler", {"predict_x0": False, **CUT, **LOW}, {}  # there the noise is not cut
    for order, final in product((1, 2, 3), (True, False)):
        yield "DEISMultistepScheduler", {"solver_order": order, "lower_order_final": final}, {}
    for name in ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "DPMSolverSinglestep"):
        spacings = [] if name == "DPMSolverSinglestep" else SPACINGS
        yield from ((f"{name}Scheduler", change, {}) for change in (*GRIDS, LU, CUT, *spacings))


def of_other_networks() -> Iterator[Case]:
    yield "LCMScheduler", {}, {}
    yield "LCMScheduler", {"clip_sample": True, "clip_sample_range": 0.6, "timestep_scaling": 3.0}, {}
    yield "LCMScheduler", CUT | {"original_inference_steps": 100}, {}
    yield from (("TCDScheduler", {"original_inference_steps": 40}, {"eta": eta}) for eta in (0.0, 0.3, 1.0))
    yield "TCDScheduler", CUT | {"clip_sample": True}, {"eta": 0.3}  # TCD cuts nothing
    for grid, prediction in (("karras", "v_prediction"), ("exponential", "epsilon")):
        edm = {"sigma_schedule": grid, "prediction_type": prediction}
        yield "EDMEulerScheduler", edm, {}
        yield from (("EDMDPMSolverMultistepScheduler", {**edm, "solver_order": order}, {}) for order in (1, 2, 3))
        yield (
            "EDMDPMSolverMultistepScheduler",
            {**edm, "algorithm_type": "sde-dpmsolver++", "sigma_data": 0.7, **LOW},
            {},
        )
        yield "EDMDPMSolverMultistepScheduler", {**edm, "solver_type": "heun", "rho": 5.0, "sigma_max": 20.0}, {}
    yield "EDMDPMSolverMultistepScheduler", CUT, {}
    yield "FlowMatchEulerDiscreteScheduler", {}, {}
    for change in (*GRIDS, {"shift_terminal": 0.1}, {"stochastic_sampling": True}, {}):
        yield "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, **change}, {}


ALL = [
    *of_ddim_and_ddpm(), *of_k_diffusion(), *of_dpm_solver(), *of_exponential_integrators(), *of_other_networks(),
]  # fmt: skip


def models(name: str, config: dict[str, Any], step: dict[str, Any]) -> list[str]:
    """The networks that a class can run, in this way."""
    if name.startswith(("EDM", "FlowMatch")):
        return ["SD15"]  # they read none of it
    # x0 is lost in 4096 times the noise in float32; and see DDIM below
    of_noise = config.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver") or not config.get("predict_x0", True)
    zero = name.startswith(OF_ZERO_SNR) and not of_noise and (name, step.get("eta")) != ("DDIMScheduler", 1)
    return ["SD15", "SD21", *["SAMPLE"] * (not name.startswith(EPSILON_OR_V)), *["ZERO_SNR"] * zero]


def lengths(name: str, config: dict[str, Any]) -> tuple[int, ...]:
    """Below and above 15 steps; where steps come in turns, of every remainder."""
    if "Singlestep" in name:
        return (4, 21, 20)
    return (
        (9, 20, 30) if "use_beta_sigmas" in config else (4, 20, 30)
    )  # of 4 the last is of 100 times the level's length


def runs(everything: bool) -> Iterator[Any]:
    """Each case with each network and length, or with one network and two lengths in turns."""
    for k, (name, config, step) in enumerate(ALL):
        known, takes = models(name, config, step), lengths(name, config)
        for model in known if everything else [known[k % len(known)]]:
            few = (4, 9) if "LMS" in name else takes if "Singlestep" in name else (takes[0], takes[1 + k % 2])
            words = [name.removesuffix("Scheduler"), *config.values(), *step.values(), model]
            yield pytest.param(
                name, MODELS[model] | config, step, takes if everything else few, id="-".join(map(str, words))
            )


def assert_equal(name: str, config: dict[str, Any], step: dict[str, Any], chosen: tuple[int, ...]) -> None:
    oracle = scheduler(name, config)
    for n in chosen:
        low = isinstance(oracle, diffusers.DPMSolverSinglestepScheduler) and not config.get("lower_order_final", False)
        if low and config.get("final_sigmas_type") == "sigma_min" and n % config.get("solver_order", 2):
            continue  # it then changes its own config
        assert compared(oracle, n, step) <= 1, n


@pytest.mark.parametrize(("name", "config", "step", "chosen"), list(runs(everything=False)))
def test_every_step_equals_diffusers(
    name: str, config: dict[str, Any], step: dict[str, Any], chosen: tuple[int, ...]
) -> None:
    assert_equal(name, config, step, chosen)


@pytest.mark.parametrize(
    ("name", "order"),
    [("DPMSolverMultistepScheduler", 2), ("DPMSolverMultistepScheduler", 3), ("DEISMultistepScheduler", 3)],
)
def test_the_order_falls_at_the_end_of_less_than_15_steps(name: str, order: int) -> None:
    oracle = scheduler(name, SD21 | LOW | {"solver_order": order})
    for n in (1, 2, 3, 14, 15):
        assert compared(oracle, n) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "step", "chosen"), list(runs(everything=True)))
def test_every_step_equals_diffusers_with_every_network(
    name: str, config: dict[str, Any], step: dict[str, Any], chosen: tuple[int, ...]
) -> None:
    assert_equal(name, config, step, chosen)


# What diffusers has otherwise, or where its class has to be told something.


def two_headed(x: Tensor, t: float) -> Tensor:
    """A network that also says something of the variance, in -1..1."""
    raw = torch.tanh(torch.nn.functional.conv2d(x, KERNEL.flip(0), padding=1) + math.sin(t / 90))
    return torch.cat([network(x, t), raw], 1)


@pytest.mark.parametrize("config", [SD15, SD21, ZERO_SNR | {"timestep_spacing": "leading", "steps_offset": 0}])
def test_learned_variances_equal_diffusers(config: dict[str, Any]) -> None:
    # the last step of theirs adds noise, unless it is from timestep 0
    config = config | {"clip_sample": False, "steps_offset": 0}
    ranged = scheduler("DDPMScheduler", config | {"variance_type": "learned_range"})
    assert max(compared(ranged, n, net=two_headed, own=two_headed) for n in (4, 30)) <= 1

    # it takes what the network says for the variance itself; in the paper it is the logarithm
    def variance(x: Tensor, t: float) -> Tensor:
        said, raw = two_headed(x, t).chunk(2, 1)
        return torch.cat([said, (3 * raw - 1).exp()], 1)

    def logarithm(x: Tensor, t: float) -> Tensor:
        said, raw = two_headed(x, t).chunk(2, 1)
        return torch.cat([said, 3 * raw - 1], 1)

    learned = scheduler("DDPMScheduler", config | {"variance_type": "learned"})
    assert max(compared(learned, n, net=variance, own=logarithm) for n in (4, 30)) <= 1


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_variance_that_was_not_learned_is_named(variance: str) -> None:
    sampling = from_config({"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": variance})
    with pytest.raises(ModelError, match="this network learned none; use fixed_small"):
        ours(sampling, 4, stream())


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_the_last_step_of_ddpm_draws_no_noise(variance: str) -> None:
    net = two_headed if "learned" in variance else network
    config = SD15 | {"clip_sample": False, "variance_type": variance, "timestep_spacing": "trailing"}
    oracle = scheduler("DDPMScheduler", config)
    run, sampling = theirs(oracle, 20, net=net), read(oracle)
    _, steps = ours(sampling, 20, stream(), net=net)
    assert difference("DDPM", sampling, steps[:-1], run) <= 1e-5
    assert torch.equal(steps[-1].x, steps[-1].x0) and not torch.allclose(run.xs[-1], steps[-1].x, atol=0.01)


def test_runge_kutta_of_pndm_asks_at_the_level_where_x_is() -> None:
    """With odd T // n theirs has its first middle at t - (T // n) // 2, but tells the network one timestep less, and
    has its second middle there.
    """
    for model in (SD15, SD21):
        oracle = scheduler("PNDMScheduler", model)
        assert compared(oracle, 30) > 10

        def one_more(oracle: Any = oracle, **given: Any) -> None:
            type(oracle).set_timesteps(oracle, **given)
            oracle.timesteps[[1, 5, 9]] += 1

        oracle.set_timesteps = one_more
        assert compared(oracle, 30, net=lambda x, t: network(x, t + (t in (941, 908, 875)))) <= 1
        oracle = scheduler("PNDMScheduler", model)
        for n in (4, 20, 50):
            assert compared(oracle, n) <= 1
        oracle = scheduler("PNDMScheduler", model | {"skip_prk_steps": True})
        for n in (1, 2, 4, 20, 30):
            assert compared(oracle, n) <= 1
        oracle = scheduler("PNDMScheduler", model | {"skip_prk_steps": True, "set_alpha_to_one": True})
        assert compared(oracle, 7) <= 1


@pytest.mark.parametrize("change", [{"solver_type": "bh1"}, {"predict_x0": False}, {"algorithm_type": "sde-dpmsolver"}])
def test_a_step_to_sigma_0_is_finite(change: dict[str, Any]) -> None:
    """bh1 and noise prediction divide by the infinite h of a step to 0, or multiply 0 by it; its limit is x0."""
    if "algorithm_type" in change:  # theirs refuses it, as if it were of noise in the whole run
        sampling = from_config(SD15 | change | {"_class_name": "DPMSolverMultistepScheduler"})
    else:
        oracle = scheduler("UniPCMultistepScheduler", SD15 | change)
        assert theirs(oracle, 20).xs[-1].isnan().all()
        sampling = read(oracle)
    _, steps = ours(sampling, 20, stream())
    assert torch.equal(steps[-1].x, steps[-1].x0) and steps[-1].x.isfinite().all()


def test_ddim_with_eta_1_from_no_signal_is_ddpm() -> None:
    """There diffusers' sqrt(1 - alpha - s^2) is a root of rounding: on some processors not a number, on others 0 or
    1e-4; DDPM's is the exact form.
    """
    model = ZERO_SNR | {"clip_sample": False}
    oracle, twin = scheduler("DDIMScheduler", model), scheduler("DDPMScheduler", model)
    run = theirs(twin, 20)
    _, steps = ours(read(oracle), 20, stream(), eta=1.0)
    assert difference("DDIM", read(oracle), steps, run) <= 1e-5


def test_the_ancestral_forms_at_eta_0_are_the_plain_ones() -> None:
    for name, plain in (("euler_a", "euler"), ("dpm2_a", "dpm2"), ("dpm++2s_a", None), ("dpm++sde", None)):
        _, steps = ours(from_config(SD15 | {"_class_name": "EulerDiscreteScheduler"}, name), 12, stream(), eta=0.0)
        if plain:
            _, expected = ours(from_config(SD15 | {"_class_name": "EulerDiscreteScheduler"}, plain), 12, stream())
            torch.testing.assert_close(steps[-1].x, expected[-1].x, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde, of a level in the 7th decimal
def test_the_noise_of_dpm_solver_sde_lies_on_its_brownian_path() -> None:
    """Level by level as theirs, whose float32 levels are other points of the path than ours in float64."""
    oracle = scheduler("DPMSolverSDEScheduler", SD15)
    oracle.set_timesteps(9)
    low, high = (float(oracle.sigmas[oracle.sigmas > 0].min()), float(oracle.sigmas.max()))
    tree, path, asked = BrownianTreeNoiseSampler(UNIT, low, high, [3, 4]), Brownian([3, 4], UNIT.shape[1:], UNIT.device,
                                                                                    low, high), []  # fmt: skip

    def remembered(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        asked.append((float(sigma), float(sigma_next)))
        return tree(sigma, sigma_next)

    def again(sigma: float, sigma_next: float) -> Tensor:
        theirs_of_it = asked.pop(0)
        assert (sigma, sigma_next) == pytest.approx(theirs_of_it, rel=1e-5)
        return path(*theirs_of_it)

    run, sampling = theirs(oracle, 9, noise=remembered), read(oracle)
    assert len(asked) == 16
    _, steps = ours(sampling, 9, again)
    assert difference("DPMSolverSDE", sampling, steps, run) <= 1e-5 and not asked


TIMES = (901, 850, 400, 120, 33, 2)
LEVELS = (12.5, 7.0, 2.5, 0.9, 0.2, 0.04)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("DDPMScheduler", {"timesteps": TIMES}),
        ("LCMScheduler", {"timesteps": (959, 759, 499, 259)}),
        ("TCDScheduler", {"timesteps": (999, 490, 259, 19)}),  # 0.7 * 490 is 343, but not in binary
        ("DPMSolverMultistepScheduler", {"timesteps": TIMES}),
        ("DPMSolverSinglestepScheduler", {"timesteps": TIMES}),
        ("HeunDiscreteScheduler", {"timesteps": TIMES}),
        ("EulerDiscreteScheduler", {"timesteps": TIMES}),
        ("EulerDiscreteScheduler", {"sigmas": LEVELS}),
        ("FlowMatchEulerDiscreteScheduler", {"timesteps": TIMES}),
    ],
)
def test_levels_of_ones_own_equal_diffusers(name: str, given: dict[str, Any]) -> None:
    oracle = scheduler(name, SD15 | {"clip_sample": False})
    start = {key: list(values) for key, values in given.items()}
    if "sigmas" in start:
        start["sigmas"].append(0.0)
    if name.startswith("FlowMatch"):
        start["sigmas"] = [t / 1000 for t in TIMES]
    run, sampling = theirs(oracle, 0, start=start), read(oracle, **given)
    levels, steps = ours(sampling, len(next(iter(given.values()))), stream())
    assert levels.timesteps == pytest.approx(given.get("timesteps", levels.timesteps), rel=1e-12)
    assert levels.sigmas[:-1] == given.get("sigmas", levels.sigmas[:-1])
    assert difference(name, sampling, steps, run) <= 1e-5


MULTISTEP = [("DPMSolverMultistepScheduler", order) for order in (1, 2, 3)]
MULTISTEP += [("DPMSolverSinglestepScheduler", order) for order in (2, 3)]
MULTISTEP += [("UniPCMultistepScheduler", 3), ("DEISMultistepScheduler", 3), ("HeunDiscreteScheduler", 2)]


@pytest.mark.parametrize(("name", "order"), MULTISTEP)
@pytest.mark.parametrize(("n", "begin"), [(20, 9), (10, 4)])
def test_a_run_begun_in_the_middle_equals_diffusers(name: str, order: int, n: int, begin: int) -> None:
    """As from an image: the solver has no past there, but knows how long the whole run is and where it stands in it."""
    oracle = scheduler(name, SD15 | {"solver_order": order, "lower_order_final": True})
    run, sampling = theirs(oracle, n, begin=begin), read(oracle)
    levels = sampling.levels(n)
    x = UNIT / sampling.kind.c_in(levels.sigmas[begin])
    step = Step(begin - 1, levels.sigmas[begin], x, x, 0)
    steps = list(sampling.solver()(denoiser(sampling, levels), x, levels.sigmas, stream(), step))
    assert len(steps) == n - begin and difference(name, sampling, steps, run) <= 1e-5
