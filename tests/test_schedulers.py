"""Recorded results: those of diffusers' own tests (sum, mean and corner of one tensor), and whole tensors of
k-diffusion on the levels of stable-diffusion-webui.
"""

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from solving import SD15, SMALL, denoiser, field, network, read, scheduler, theirs
from torch import Tensor

from ldm.diffusion import Estimate, Levels
from ldm.schedulers import Noise, Sampling, Step, from_config

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.algorithm_types:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde, of a level in the 7th decimal
]

COUNT = torch.arange(768)
BEGIN = (COUNT.reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2).contiguous().double()
ADDED = (COUNT.flip(-1).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2).contiguous().double()
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
V, KARRAS, TRAILING = {"prediction_type": "v_prediction"}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}
ZERO_SNR = {"rescale_betas_zero_snr": True, **V}
DARK = {"beta_start": 0.01}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LOW = {"final_sigmas_type": "sigma_min"}
# what each upstream test starts from; DDIM clips there, which in these runs cuts nothing (here it is refused)
UPSTREAM: dict[str, dict[str, Any]] = {
    "DDPM": {}, "DDIM": {"clip_sample": False}, "PNDM": {}, "DEISMultistep": {}, "LCM": SD, "TCD": SD,
    "UniPCMultistep": LOW, "DPMSolverMultistep": LOW | {"lower_order_final": False}, "DPMSolverSinglestep": LOW,
    "FlowMatchEulerDiscrete": {}, "EDMEuler": {},
}  # fmt: skip
# those whose test goes on from what the network saw, x scaled to unit variance
RESCALED = ("Euler", "Heun", "KDPM2", "LMS", "DPMSolverSDE")
STEPS = {"DDPM": 1000}

# class, changes, steps skipped (the run then begins from BEGIN with noise ADDED), sum |x|, mean |x|, x[0, -1, -1, -1]
RECORDED: list[tuple[str, dict[str, Any], int, float, float, float]] = [
    ("DDPM", {}, 0, 258.9606244, 0.337188313, 0.08782667667),
    ("DDPM", V, 0, 202.0295686, 0.2630593342, 0.03658917919),
    ("DDPM", {}, 998, 387.9465858, 0.5051387836, 0.9819408059),
    ("DDPM", {"variance_type": "fixed_small_log"}, 0, 258.9606183, 0.337188305, 0.08782683313),
    ("DDPM", {"variance_type": "fixed_large"}, 0, 261.2066427, 0.340112816, 0.08827165514),
    ("DDPM", {"prediction_type": "sample"}, 0, 0, 0, 0),
    ("DDPM", {"beta_schedule": "squaredcos_cap_v2"}, 0, 252.3719139, 0.3286092629, 0.1493066251),
    ("DDPM", {"clip_sample": False}, 0, 263.3463169, 0.3428988502, 0.08782667667),
    ("DDPM", ZERO_SNR, 0, 202.0730221, 0.2631159142, 0.03595884889),
    ("DDIM", {}, 0, 172.0067139, 0.2239670754, 0.446182251),
    ("DDIM", V, 0, 52.53020165, 0.06839870006, 0.1362623721),
    ("DDIM", DARK, 0, 149.8294513, 0.1950904313, 0.3886548579),
    ("DDIM", DARK | {"set_alpha_to_one": False}, 0, 149.0784203, 0.1941125264, 0.3867067099),
    ("DDIM", {}, 8, 354.541829, 0.4616430065, 0.6860896349),
    # at eta 1 (234.8298462) it clips, which is refused here
    ("DDIM", TRAILING, 0, 170.0350082, 0.2213997502, 0.4410675764),
    ("DDIM", SD | {"set_alpha_to_one": False, "steps_offset": 1}, 0, 183.258221, 0.2386174752, 0.4753683507),
    ("DDIM", ZERO_SNR | TRAILING, 0, 50.55740976, 0.06582996062, 0.1311449409),
    ("EulerDiscrete", {}, 0, 10.08068236, 0.0131258885, 0.02614908665),
    ("EulerDiscrete", V, 0, 2.41815e-10, 3.14863e-13, 6.27263e-13),
    ("EulerDiscrete", KARRAS, 0, 124.5225963, 0.1621387973, -0.3230094016),
    ("EulerDiscrete", {}, 8, 57062.92612, 74.30068505, 147.7944641),
    ("EulerDiscrete", {"use_exponential_sigmas": True}, 0, 962.9996739, 1.253905825, -2.498002768),
    ("EulerDiscrete", {"use_beta_sigmas": True}, 0, 0.2997145934, 0.000390253, -0.000777454),
    ("EulerDiscrete", {"timestep_spacing": "leading"}, 0, 0.7279530052, 0.000947855, -0.001888296567),
    ("EulerDiscrete", TRAILING, 0, 1.400496065, 0.001823562585, 0.003632860025),
    ("EulerAncestralDiscrete", {}, 0, 152.3192774, 0.1983323924, -0.006373192184),
    ("EulerAncestralDiscrete", V, 0, 108.4438838, 0.1412029736, 0.07953311503),
    ("EulerAncestralDiscrete", {}, 8, 56163.05241, 73.12897449, 145.450592),
    ("HeunDiscrete", {}, 0, 0.1233307439, 0.000160587, 0.000319918),
    ("HeunDiscrete", V, 0, 4.92387e-07, 6.41129e-10, 1.27724e-09),
    ("HeunDiscrete", KARRAS, 0, 0.000152598, 1.98696e-07, 3.95838e-07),
    ("HeunDiscrete", {}, 8, 75074.89559, 97.75377031, 194.4459534),
    ("KDPM2Discrete", {}, 0, 20.41248696, 0.02657875906, 0.05294961482),
    ("KDPM2Discrete", V, 0, 6.10256e-05, 7.94604e-08, 1.58299e-07),
    ("KDPM2Discrete", {}, 8, 70408.41094, 91.67761842, 182.3596649),
    ("KDPM2AncestralDiscrete", {}, 0, 13979.94533, 18.20305382, 29.83771896),
    ("KDPM2AncestralDiscrete", V, 0, 331.8133377, 0.4320486169, 0.9336040616),
    ("KDPM2AncestralDiscrete", {}, 8, 93087.34379, 121.2074789, 241.0854797),
    ("LMSDiscrete", {}, 0, 1006.388099, 1.310401171, -2.610551357),
    ("LMSDiscrete", V, 0, 0.001741533711, 2.26762e-06, -4.51751e-06),
    ("LMSDiscrete", KARRAS, 0, 3812.992885, 4.964834486, -9.89083004),
    # begun at step 8 (27663.68942) it weighs one slope as the newest of four
    ("DPMSolverSDE", {}, 0, 162.523826, 0.2116195651, 0.1081433222),
    ("DPMSolverSDE", V, 0, 119.8487554, 0.156053067, 0.08777694404),
    ("DPMSolverSDE", KARRAS, 0, 170.3135099, 0.2217623827, -0.1383059919),
    ("DPMSolverMultistep", {}, 0, 253.5513958, 0.3301450466, 0.6577075124),
    ("DPMSolverMultistep", {}, 5, 318.4110982, 0.4145977841, 0.1884143353),
    ("DPMSolverMultistep", {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}, 0,
     872.7270082, 1.136363292, 1.006908059),
    ("DPMSolverMultistep", V, 0, 172.8739736, 0.2250963197, 0.4484317899),
    ("DPMSolverMultistep", V | KARRAS, 0, 160.6642017, 0.2091981793, 0.4167598784),
    ("DPMSolverMultistep", V | {"use_lu_lambdas": True}, 0, 119.3648154, 0.1554229368, 0.3096300066),
    ("DPMSolverMultistep", {"solver_order": 3}, 0, 176.9652072, 0.2304234469, 0.4590440392),
    ("DPMSolverMultistep", {"solver_order": 1}, 0, 172.2641632, 0.2243022958, 0.4468500018),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, 0, 525.9482164, 0.6848284068, -0.4120519161),
    ("DPMSolverMultistep", {"algorithm_type": "dpmsolver"}, 0, 223.5860922, 0.2911277242, 0.5799779892),
    ("DPMSolverMultistep", SD | KARRAS | {"final_sigmas_type": "zero", "lower_order_final": True}, 0,
     212.5729973, 0.2767877569, 0.5514101386),
    ("DPMSolverSinglestep", {}, 0, 214.3611801, 0.27911612, 0.5560488701),
    ("DPMSolverSinglestep", {}, 5, 269.2187, 0.3505, math.nan),
    ("DPMSolverSinglestep", KARRAS, 0, 172.6808938, 0.2248449138, 0.4479309618),
    ("DPMSolverSinglestep", V, 0, 111.5981768, 0.145310126, 0.2894835174),
    ("DPMSolverSinglestep", V | KARRAS, 0, 49.84770222, 0.06490586227, 0.1293040067),
    ("UniPCMultistep", {}, 0, 189.2318378, 0.2463956221, 0.4908639491),
    ("UniPCMultistep", KARRAS, 0, 224.6267141, 0.2924827007, 0.5826774836),
    ("UniPCMultistep", V, 0, 77.87248345, 0.1013964628, 0.2019997537),
    ("UniPCMultistep", V | KARRAS, 0, 150.6873001, 0.196207422, 0.3908799589),
    ("UniPCMultistep", {}, 8, 315.5757014, 0.4109058612, 0.4762865007),
    ("DEISMultistep", {}, 0, 183.6764635, 0.2391620619, 0.4764532745),
    ("DEISMultistep", V, 0, 69.94373073, 0.09107256606, 0.1814326942),
    ("PNDM", {}, 0, 198.1318934, 0.2579842362, 0.5139506459),
    ("PNDM", V, 0, 67.39861765, 0.08775861673, 0.1748308241),
    ("PNDM", DARK | {"set_alpha_to_one": True}, 0, 230.034443, 0.2995240143, 0.5966999531),
    ("PNDM", DARK | {"set_alpha_to_one": False}, 0, 186.9421103, 0.2434142062, 0.4849187136),
    ("PNDM", {"skip_prk_steps": True}, 0, 197.7156024, 0.2574421906, 0.512870729),
    ("LCM", {"steps": 1}, 0, 18.70967891, 0.02436156108, 0.04853248969),
    ("LCM", {}, 0, 197.7616378, 0.2575021326, -0.06679973006),
    ("TCD", {"steps": 1, "eta": 0.0}, 0, 29.8715, 0.0389, math.nan),
    ("TCD", {"eta": 0.0}, 0, 181.2040, 0.2359, math.nan),
    ("EDMEuler", {}, 0, 34.1855, 0.0445, math.nan),
    # with dynamic shifting (128.6977888) not: it is of networks that are not built here, and its field is refused
    ("FlowMatchEulerDiscrete", {"shift": 1.0}, 0, 133.3620453, 0.1736484965, 0.3459385633),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, 0, 129.3494568, 0.1684237719, 0.335529983),
    ("FlowMatchEulerDiscrete", KARRAS, 0, 119.9727016, 0.1562144551, 0.3112068772),
    ("FlowMatchEulerDiscrete", {"use_exponential_sigmas": True}, 0, 107.4648058, 0.1399281326, 0.2787616253),
    ("FlowMatchEulerDiscrete", {"use_beta_sigmas": True}, 0, 132.2887645, 0.1722509955, 0.3431545198),
]  # fmt: skip


def dummy_network(x: Tensor, t: float) -> Tensor:
    return x * t / (t + 1)


def drawn(x: Tensor) -> Noise:
    generator = torch.Generator().manual_seed(0)
    return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator).double()


def along_the_path(oracle: Any) -> Noise:
    """The Brownian path of diffusers' class with seed 0, at the very points in float32 that it asks for."""
    oracle.set_timesteps(10)
    low, high = oracle.sigmas[oracle.sigmas > 0].min().item(), oracle.sigmas.max().item()
    tree, points = BrownianTreeNoiseSampler(BEGIN.float(), low, high, 0), []
    theirs(oracle, 10, noise=lambda a, b: points.append((a, b)) or field(float(a), float(b)))
    return lambda sigma, sigma_next: tree(*points.pop(0)).double()


def plainly(sampling: Sampling, run: Levels, begin: int, x: Tensor, noise: Noise, eta: float | None) -> Tensor:
    """x at level `begin` in the network's frame -> the result there."""
    c_in, sigmas = sampling.kind.c_in, run.sigmas[begin:]
    denoise, x = denoiser(sampling, run, dummy_network), x / c_in(sigmas[0])
    step = Step(begin - 1, sigmas[0], x, x, 0) if begin else None
    (*_, last) = sampling.solver(eta)(denoise, x, run.sigmas, noise, step)
    return last.x * c_in(last.sigma)


def rescaled(sampling: Sampling, run: Levels, begin: int, x: Tensor, noise: Noise) -> Tensor:
    """Upstream's loop for those of k-diffusion, which goes on from the network's scaled input instead of from x."""
    kind, told, sigmas = sampling.kind, dict(zip(run.sigmas, run.timesteps, strict=False)), run.sigmas[begin:]
    calls = 0

    def denoise(x: Tensor, sigma: float) -> Estimate:
        nonlocal calls
        calls += 1
        scaled = x if calls == 1 else x * kind.c_in(sigma)
        t = told[sigma] if sigma in told else sampling.t(sigma)
        x0 = kind.to_x0(scaled, sigma, dummy_network(scaled, t))
        return Estimate(x0 if sampling.scheduler.name == "dpm++sde" else x - scaled + x0)  # it goes by x0, not slopes

    step, solver, x = None, sampling.solver(), x * kind.c_in(sigmas[0])
    for sigma in sigmas[1:]:
        calls = 0
        (step,) = islice(solver(denoise, x, sigmas, noise, step), 1)
        step = replace(step, x=step.x * kind.c_in(sigma))
    return step.x / kind.c_in(sigmas[-1])


@pytest.mark.parametrize(("name", "changes", "begin", "total", "mean", "corner"), RECORDED)
def test_recorded_results_of_diffusers(
    name: str, changes: dict[str, Any], begin: int, total: float, mean: float, corner: float
) -> None:
    start = UPSTREAM.get(name, {"num_train_timesteps": 1100})
    config = LINEAR | start | {k: v for k, v in changes.items() if k not in ("steps", "eta")}
    oracle = scheduler(f"{name}Scheduler", config)
    sampling = read(oracle)
    run, ve = sampling.levels(changes.get("steps", STEPS.get(name, 10))), name.startswith(RESCALED)
    noise = along_the_path(oracle) if name == "DPMSolverSDE" else drawn(BEGIN)
    level = run.sigmas[begin]
    if ve:
        x = rescaled(sampling, run, begin, BEGIN * run.start + (ADDED * level if begin else 0), noise)
    else:
        c_in = sampling.kind.c_in
        x = c_in(level) * (BEGIN + level * ADDED) if begin else BEGIN
        x = x * run.start * c_in(level) if name == "EDMEuler" else x
        x = plainly(sampling, run, begin, x, noise, changes.get("eta"))
        x = x / c_in(0.0)
    found = [float(x.abs().sum()), float(x.abs().mean())]
    if total < 1e-3:  # what is left of float32
        assert found[0] < 1e-3
    else:
        # DDPM computes 1 - alpha_t / alpha_(t-1), of some 1e-4, in float32; where no corner is known all is rounded
        near = 2e-3 if math.isnan(corner) else {"DDPM": 4e-4, "PNDM": 5e-5}.get(name, 2e-5)
        np.testing.assert_allclose(found, [total, mean], rtol=near)
        assert math.isnan(corner) or float(x[0, -1, -1, -1]) == pytest.approx(corner, rel=near, abs=1e-9)


# k-diffusion 0.1.1 (bench/k_diffusion.py writes them): levels and the end of a run in float64.

GOLDEN = json.loads((Path(__file__).parent / "data/k_diffusion.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['label']}-{row['grid']}-{row['n']}")
def test_runs_of_k_diffusion_on_the_levels_of_stable_diffusion_webui(row: dict[str, Any]) -> None:
    config, n = SD15 | {"_class_name": "PNDMScheduler"}, row["n"]
    names = [f"{row['label']} {row['grid']}", *[row["label"]] * row["automatic"]]
    for name in names:
        sampling = from_config(config, name, a1111=True)
        run = sampling.levels(n)
        np.testing.assert_allclose(run.sigmas, row["sigmas"], rtol=2e-6)
        assert run.start == run.sigmas[0] and len(run.timesteps) == n
        ends = []
        for sigmas in (run.sigmas, tuple(row["sigmas"])):
            denoise = denoiser(sampling, run._replace(sigmas=()), network)  # they tell it the time of every level

            def noise(sigma: float, sigma_next: float) -> Tensor:
                return field(sigma, sigma_next, SMALL).double()

            (*_, last) = sampling.solver()(denoise, SMALL.double() * sigmas[0], sigmas, noise, None)
            ends.append(last.x.flatten())
        expected = torch.tensor(row["x"], dtype=torch.float64)
        largest = float(expected.abs().max())
        assert float((ends[0] - expected).abs().max()) < 1e-5 * largest
        assert float((ends[1] - expected).abs().max()) < 1e-7 * largest
