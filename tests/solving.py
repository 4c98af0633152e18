"""What the tests of solvers share: small networks, noise, and one run of a scheduler here and in diffusers."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from torch import Tensor

from ldm.diffusion import Denoiser, Estimate, Levels, NoiseSchedule
from ldm.schedulers import Noise, Sampling, Step, from_config

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SD21 = SD15 | {"prediction_type": "v_prediction"}
ZERO_SNR = SD21 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SAMPLE = SD15 | {"prediction_type": "sample"}

KERNEL = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.25
UNIT = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
SMALL = UNIT[:1, :, :2]
# those whose samples are x0 + sigma * noise in diffusers too
VE = ("Euler", "LMS", "Heun", "KDPM2", "DPMSolverSDE", "EDM")
Network = Callable[[Tensor, float], Tensor]


def network(x: Tensor, t: float) -> Tensor:
    """A small fixed network of x at unit variance and its time: convolution, tanh and a skip varying with time."""
    mixed = torch.nn.functional.conv2d(x, KERNEL.to(x.dtype), padding=1)
    return torch.tanh(mixed + math.cos(t / 200)) + 0.9 * x * (0.5 + 0.5 * math.sin(t / 160))


def stream(like: Tensor = UNIT, seed: int = 7) -> Noise:
    """A sequence of unit noise, whatever the levels."""
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def field(sigma: float, sigma_next: float, unit: Tensor = UNIT) -> Tensor:
    """Noise that is a smooth function of its interval, so that both ends must be right but not to the last bit."""
    return math.cos(math.log(sigma)) * unit.flip(-1) + math.sin(2 * math.log(sigma_next)) * unit.flip(-2)


def never(sigma: float, sigma_next: float) -> Tensor:
    raise AssertionError("a deterministic run drew noise")


class Run(NamedTuple):
    """x after each network call of theirs (after each step of ours), x0 where a step says it, and the times told."""

    xs: list[Tensor]
    x0s: list[Tensor | None]
    times: list[float]


@cache
def midpoint_scheduler(name: str, *table: tuple[str, Any]) -> Any:
    """diffusers' KDPM2 schedulers take half a second to make, whatever else is in their config."""
    return getattr(diffusers, name)(**dict(table))


def scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """diffusers' scheduler with what of the config it knows."""
    cls = getattr(diffusers, name)
    known = {key: value for key, value in config.items() if key in inspect.signature(cls.__init__).parameters}
    if not name.startswith("KDPM2"):
        return cls(**known)
    table = (item for item in known.items() if item[0].startswith("beta_") or item[0] == "num_train_timesteps")
    made = copy.deepcopy(midpoint_scheduler(name, *sorted(table)))
    made.register_to_config(**known)
    return made


def theirs(
    oracle: Any,
    n: int,
    step: Mapping[str, Any] = {},
    net: Network = network,
    start: Mapping[str, Any] | None = None,
    noise: Callable[[Any, Any], Tensor] = field,
    begin: int = 0,
) -> Run:
    """The loop that diffusers' pipelines have. start: what set_timesteps gets instead of n. noise: of DPMSolverSDE.
    begin: so many steps are skipped, as for an image; x is then UNIT in the network's frame.
    """
    takes = inspect.signature(oracle.step).parameters
    oracle.set_timesteps(**(start or {"num_inference_steps": n}))
    if hasattr(oracle, "set_begin_index"):
        skipped = begin * getattr(oracle, "order", 1)
        oracle.set_begin_index(skipped)  # timesteps can repeat, and it would begin at the second
    if hasattr(oracle, "noise_sampler"):
        oracle.noise_sampler = noise
    if isinstance(oracle, diffusers.DEISMultistepScheduler):
        oracle.sigmas = oracle.sigmas.double()  # its coefficients cancel, and lose 1e-5 in float32
    drawn = {"generator": torch.Generator().manual_seed(7)} if "generator" in takes else {}
    ddim = isinstance(oracle, diffusers.DDIMScheduler)
    x, run = UNIT * getattr(oracle, "init_noise_sigma", 1.0), Run([], [], [])
    if begin and type(oracle).__name__.startswith(VE):
        x = UNIT * math.hypot(1, oracle.sigmas[skipped])
    for i, t in list(enumerate(oracle.timesteps))[begin * getattr(oracle, "order", 1) :]:
        if ddim:
            # it goes down T // n times, which need not be where it calls the network next; T // (T / gap) = gap
            after = oracle.timesteps[i + 1] if i + 1 < len(oracle.timesteps) else -1
            oracle.num_inference_steps = Fraction(oracle.config.num_train_timesteps, int(t - after))
        scaled = oracle.scale_model_input(x, t) if hasattr(oracle, "scale_model_input") else x
        said = oracle.step(net(scaled, float(t)), t, x, **drawn, **step)
        x = said.prev_sample
        run.xs.append(x)
        run.x0s.append(said.get("pred_original_sample"))
        run.times.append(float(t))
    return run


def denoiser(sampling: Sampling, run: Levels, net: Network = network) -> Denoiser:
    """The bridge from a network of timesteps to a Denoiser; two-headed if the network is."""
    told, kind = dict(zip(run.sigmas, run.timesteps, strict=False)), sampling.kind

    def denoise(x: Tensor, sigma: float) -> Estimate:
        t = told[sigma] if sigma in told else sampling.t(sigma)
        output, *variance = net(x * kind.c_in(sigma), t).split(x.shape[1], 1)
        return Estimate(kind.to_x0(x, sigma, output), *variance)

    return sampling.denoiser(denoise, run)


def ours(
    sampling: Sampling, n: int, noise: Noise, eta: float | None = None, net: Network = network
) -> tuple[Levels, list[Step]]:
    run = sampling.levels(n)
    return run, list(sampling.solver(eta)(denoiser(sampling, run, net), UNIT * run.start, run.sigmas, noise, None))


def difference(name: str, sampling: Sampling, steps: list[Step], run: Run) -> float:
    """The largest difference of any x or x0, in the network's frame, relative to the largest value of the run."""
    ve = name.startswith(VE)
    factors = [sampling.kind.c_in(step.sigma) for step in steps]
    expected = [run.xs[step.calls - 1] * (c if ve else 1.0) for step, c in zip(steps, factors, strict=True)]
    largest = max(1.0, *(float(x.abs().max()) for x in expected))
    worst = [float((s.x * c - x).abs().max()) / largest for s, c, x in zip(steps, factors, expected, strict=True)]
    begins = [0, *(step.calls for step in steps)]
    for step, call in zip(steps, begins, strict=False):
        if (x0 := run.x0s[call]) is not None:
            worst.append(float((step.x0 - x0).abs().max()) / max(largest, float(x0.abs().max())))
    assert len(steps) > 0 and all(map(math.isfinite, worst)), worst
    return max(worst)


def read(oracle: Any, **changes: Any) -> Sampling:
    """Our reading of a diffusers scheduler, with its own float32 table of noise levels: some 1e-6 from ours, and in the
    timesteps of levels in between 1e-3, which is more than the solvers are tested to.
    """
    sampling = from_config({"_class_name": type(oracle).__name__, **oracle.config}, **changes)
    if not isinstance(sampling.schedule, NoiseSchedule):
        return sampling
    table = oracle.alphas_cumprod.double().numpy()
    return replace(sampling, schedule=NoiseSchedule.trained(1 - table / np.concatenate([[1.0], table[:-1]])))


def compared(
    oracle: Any, n: int, step: Mapping[str, Any] = {}, net: Network = network, own: Network = network
) -> float:
    """One run of a diffusers scheduler there (with `net`) and here (with `own`): the largest difference of any step,
    in units of what is allowed: 1e-5, and no less than float32 has of samples at the highest level.
    """
    name, sampling, run = type(oracle).__name__, read(oracle), theirs(oracle, n, step, net)
    noise = field if isinstance(oracle, diffusers.DPMSolverSDEScheduler) else stream()
    levels, steps = ours(sampling, n, noise, step.get("eta"), own)
    assert [s.index for s in steps] == list(range(n))
    assert [s.sigma for s in steps] == list(levels.sigmas[1:])
    assert steps[-1].calls == len(oracle.timesteps)
    allowed = max(1e-5, levels.sigmas[0] * 2**-23) if name.startswith(VE) else 1e-5
    return difference(name, sampling, steps, run) / allowed
