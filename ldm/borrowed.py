"""A scheduler object of diffusers as one of ours: its own loop behind the contract of a Solver. Needs no diffusers."""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.components import Json
from ldm.diffusion.prediction import PREDICTIONS, Denoiser
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.spacing import Levels, Spacing, respaced
from ldm.errors import UsageError
from ldm.noise import Noise
from ldm.request import Request
from ldm.schedulers import Sampling, Scheduler, Solver, Step, from_config

RAW = replace(PREDICTIONS["sample"], c_in=lambda sigma: 1.0)
"""The network as diffusers calls it: what it is given is its input, and what it says is its output."""


@dataclass(frozen=True)
class Borrowed:
    """How requests are sampled by a scheduler of diffusers. config: scheduler_config.json of the model."""

    scheduler: Any
    config: Json

    def __call__(self, order: Request) -> Sampling | None:
        """None for a request that names another scheduler. UsageError: it asks for what only the schedulers here have,
        or the scheduler predicts another thing than the network.
        """
        name = type(self.scheduler).__name__
        if order.scheduler not in (None, name):
            return None
        for field in ("nfe", "schedule_type", "image"):
            if value := getattr(order, field):
                said = "a picture is edited" if field == "image" else f"{field} is {value}"
                raise UsageError(f"{said}, and {name} of diffusers lays its own steps out; leave it out")
        base, kind = from_config(self.config), self.scheduler.config.get("prediction_type")
        if kind in PREDICTIONS and base.prediction in PREDICTIONS and kind != base.prediction:
            raise UsageError(
                f"{name} has prediction_type {kind!r} and the network predicts {base.prediction!r}; make it with "
                f"{name}.from_config(pipeline.components.scheduler_config)"
            )
        times = order.timesteps
        if order.timestep_respacing:
            times = respaced(base.schedule.num_train_timesteps, order.timestep_respacing)
        takes = inspect.signature(self.scheduler.step).parameters
        row = Scheduler(name, f"{name} of diffusers", _rule, "euler", (name,), options=("eta",) * ("eta" in takes))
        return Loop(
            row, base.schedule, base.prediction, RAW, Spacing(timesteps=times, sigmas=order.sigmas), {}, noise="fresh",
            note=_differing(self.scheduler, base), own=self.scheduler, base=base, n=order.num_inference_steps or 1,
        )  # fmt: skip


def _rule() -> Any:
    raise NotImplementedError("this scheduler's rule is in diffusers; see Loop.solver")


def _differing(scheduler: Any, base: Sampling) -> str:
    """A note, where the scheduler's table of noise levels is not that of the network."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor) or not isinstance(base.schedule, NoiseSchedule):
        return ""
    known = torch.from_numpy(base.schedule.alphas_cumprod.copy())
    if table.shape == known.shape and torch.allclose(table.double().cpu(), known, rtol=1e-3, atol=1e-6):
        return ""
    return f"the noise levels of {type(scheduler).__name__} are not those the model was trained on"


@dataclass(frozen=True)
class Loop(Sampling):
    """A run of n steps by a scheduler of diffusers, as a Sampling.

    The network is called N times; call k belongs to step k n // N, which is how diffusers counts the steps of Heun
    (N = 2 n - 1) and PNDM (N = n + 1). Levels are not noise levels but how many steps are left: n .. 0, and n - k n / N
    at call k. own: the scheduler, never written to. base: how the model is sampled without it.
    """

    own: Any = None
    base: Any = None
    n: int = 1

    def levels(self, n: int) -> Levels:
        """The steps left of a run of n, with the time at which each begins. UsageError: the scheduler refuses."""
        run = self if n == self.n else replace(self, n=n)
        starts = tuple(run.times[run.first_call(step)] for step in range(run.steps))
        scale = float(getattr(run.laid_out, "init_noise_sigma", 1.0))
        return Levels(tuple(float(left) for left in range(run.steps, -1, -1)), starts, scale)

    def solver(self, eta: float | None = None) -> Solver:
        """The scheduler's own loop. eta: 0 where nothing is said and it has one, as in diffusers' pipelines.

        UsageError: it has none.
        """
        if eta is not None and "eta" not in self.scheduler.options:
            raise UsageError(f"eta is {eta}, but {self.scheduler.name} of diffusers has none; leave it out")

        def walk(
            denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Any, resume: Step | None = None
        ) -> Iterator[Step]:
            if resume and resume.calls:
                raise UsageError(f"a run by {self.scheduler.name} of diffusers cannot be taken up again; begin anew")
            return self._walk(denoise, x, sigmas[resume.index + 1 if resume else 0 :], noise, eta or 0.0)

        return walk

    def t(self, sigma: float) -> float:
        """What the network is told at a call."""
        return self.times[self._call(sigma)]

    def scale(self, sigma: float) -> float:
        """The factor from the scheduler's frame to the network's, where so many steps are left."""
        k = self._call(sigma)
        if k == len(self.times):
            return 1.0
        scheduler = copy.copy(self.laid_out)
        _begin_at(scheduler, k)
        return float(_scaled(scheduler, torch.ones(1), scheduler.timesteps[k]))

    @cached_property
    def laid_out(self) -> Any:
        """The scheduler with its timesteps set, on the CPU; never stepped."""
        return self._copy(torch.device("cpu"))

    @cached_property
    def times(self) -> tuple[float, ...]:
        """What the network is told at each call."""
        return tuple(float(t) for t in self.laid_out.timesteps)

    @property
    def steps(self) -> int:
        """How many steps there are: n, unless the scheduler makes fewer calls."""
        return min(self.n, len(self.times))

    def first_call(self, step: int) -> int:
        """The number of the call with which a step begins."""
        return -(-step * len(self.times) // self.steps)

    def _call(self, left: float) -> int:
        return round((self.steps - left) * len(self.times) / self.steps)

    def _copy(self, device: torch.device) -> Any:
        """A scheduler of its own for one picture, as diffusers' pipelines lay it out."""
        made, times = copy.deepcopy(self.own), self.spacing.timesteps
        try:
            if times:
                made.set_timesteps(timesteps=[int(t) if t == int(t) else t for t in times], device=device)
            elif self.spacing.sigmas:
                made.set_timesteps(sigmas=list(self.spacing.sigmas), device=device)
            else:
                made.set_timesteps(self.n, device=device)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UsageError(f"{self.scheduler.name} of diffusers lays no such run out: {error!s:.300}") from error
        return made

    def _walk(self, denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float) -> Iterator[Step]:
        """x [B, C, H, W]: start * noise at the beginning of a whole run, else hypot(1, sigmas[0]) * latents."""
        runs = [self._copy(x.device) for _ in x]
        extras = [self._extras(run, generator, eta) for run, generator in zip(runs, noise.generators, strict=True)]
        begin = self._call(sigmas[0])
        if begin:
            x = x / math.hypot(1, sigmas[0]) / self.scale(sigmas[0])  # from the network's frame: see Levels.part
        for run in runs:
            _begin_at(run, begin)
        for k in range(begin, self._call(sigmas[-1])):
            t, images = runs[0].timesteps[k], x.split(1)
            seen = torch.cat([_scaled(run, image, t) for run, image in zip(runs, images, strict=True)])
            said = denoise(seen, self.steps - k * self.steps / len(self.times))
            outputs = (said.x0 if said.variance is None else torch.cat([said.x0, said.variance], 1)).split(1)
            stepped = [
                run.step(output, t, image, **extra)
                for run, output, image, extra in zip(runs, outputs, images, extras, strict=True)
            ]
            x = torch.cat([one[0] for one in stepped]).to(x.dtype)
            left = self.steps - 1 - k * self.steps // len(self.times)  # after the step that this call belongs to
            if k + 1 == self.first_call(self.steps - left):
                index, x0 = self.steps - left - 1, self._estimate(stepped, seen, k, said.x0)
                yield Step(index, float(left), x, x0, k + 1 - begin)

    def _extras(self, run: Any, generator: Any, eta: float) -> Json:
        """What `step` is given beside the network's output: what of it this scheduler takes, as diffusers asks."""
        if getattr(run, "noise_sampler_seed", 0) is None:
            run.noise_sampler_seed = generator.initial_seed()
        takes = inspect.signature(run.step).parameters
        if "generator" in takes and not isinstance(generator, torch.Generator):
            raise UsageError(
                f"{self.scheduler.name} of diffusers draws its noise from torch's generators; take noise_source cpu"
            )
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in takes}

    def _estimate(self, stepped: Sequence[Any], seen: Tensor, k: int, output: Tensor) -> Tensor:
        """The clean image as the scheduler says it, or where it does not, as the network does."""
        if isinstance(getattr(stepped[0], "pred_original_sample", None), Tensor):
            return torch.cat([one.pred_original_sample for one in stepped])
        sigma, kind = float(self.base.schedule.sigma(self.times[k])), self.base.kind
        return kind.to_x0(seen / kind.c_in(sigma), sigma, output) if math.isfinite(sigma) else seen


def _begin_at(scheduler: Any, k: int) -> None:
    """Says that call k is the next, where it is not the first: times that occur twice do not say it themselves."""
    if k and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(k)


def _scaled(scheduler: Any, x: Tensor, t: Any) -> Tensor:
    """The network's input; schedulers of flow matching do not scale it, and have no such method."""
    scaled: Tensor = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    return scaled
