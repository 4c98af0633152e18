"""One run down the noise levels: from noise, or where another run stopped, to latents; and the bridge between solvers,
which know noise levels, and networks, which know timesteps.

B images, C latent channels, H W latent height and width.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ldm.adapters.weights import Cast, Setting, Weights, at
from ldm.brownian import Brownian
from ldm.conditioning import Script
from ldm.diffusion.guidance import guided, guided_rescaled
from ldm.diffusion.prediction import Denoiser, Estimate
from ldm.diffusion.spacing import Levels, respaced
from ldm.errors import UsageError
from ldm.models.unet import Prepared, UNet
from ldm.noise import Generator, Noise, checked_latents, generators, slerp
from ldm.refusals import refuse_infinite
from ldm.request import Request
from ldm.schedulers import Sampling, Step, from_config
from ldm.text.encoder import Conditioning

Rows = list[int] | slice


def sampling_of(config: Mapping[str, Any], order: Request, scheduler: str | None, xl: bool) -> Sampling:
    """How a request is sampled with a model of this scheduler_config.json. Errors as of `from_config`."""
    times = order.timesteps
    if order.timestep_respacing:
        times = respaced(int(config.get("num_train_timesteps", 1000)), order.timestep_respacing)
    return from_config(
        config, scheduler, schedule_type=order.schedule_type, a1111=order.profile == "a1111", timesteps=times,
        sigmas=order.sigmas, xl=xl,
    )  # fmt: skip


def steps_of(sampling: Sampling, order: Request, usual: int) -> int:
    """How many steps a request takes: those it says, in one of the ways to say it, or `usual`.

    UsageError: it says two numbers.
    """
    listed = len(sampling.spacing.timesteps or sampling.spacing.sigmas)
    within = sampling.scheduler.steps_within(order.nfe) if order.nfe else listed
    if within and order.num_inference_steps not in (None, within):
        raise UsageError(f"{order.num_inference_steps} steps were asked for, and a run of {within}; say one of them")
    return within or order.num_inference_steps or usual


@dataclass(frozen=True)
class Run:
    """One run: who draws what, on which network.

    order: a resolved request. shape: [C, H, W] of its latents. script, sizes: what the network is told. draws: where
    each image's noise comes from. weights, cast: the owner of the network's weights, and the adapters it is to add.
    """

    unet: UNet
    sampling: Sampling
    order: Request
    shape: tuple[int, int, int]
    script: Script
    sizes: Tensor | None
    draws: Sequence[Generator]
    weights: Weights
    cast: Cast = ()

    @property
    def _like(self) -> Tensor:
        """Of the network's device and type; the state of a run is float32 in any case."""
        return self.unet.conv_in.weight

    @cached_property
    def _whole(self) -> Levels:
        """The levels of the run that this one may be a part of; the script counts its steps."""
        assert self.order.num_inference_steps
        return self.sampling.levels(self.order.num_inference_steps)

    @cached_property
    def levels(self) -> Levels:
        """The levels that this run visits."""
        total = self.sampling.schedule.num_train_timesteps
        return self._whole.part(self.order.denoising_start, self.order.denoising_end, total)

    def steps(self, latents: Tensor | None, resume: Step | None) -> Iterator[Step]:
        """The steps, from `latents` [B, C, H, W] (default noise), or those after `resume`.

        A part of a run is walked as such: what a solver does by the number of steps, it does by that of the whole.
        NumericalError: x is not finite after one of them.
        """
        whole, levels, noise = self._whole, self.levels, Noise(self.draws, self.shape, self._like.device)
        skipped = whole.timesteps.index(levels.timesteps[0])
        x = resume.x.to(self._like.device) if resume else self._begin(latents, noise) * levels.start
        if self.order.eta_noise_seed_delta:
            seeds = [draw.initial_seed() + self.order.eta_noise_seed_delta for draw in self.draws]
            noise = Noise(generators(None, seeds, self._source), self.shape, self._like.device)
        if resume:
            noise.restore(resume.state)
        fresh: Noise | Brownian = noise
        if self.sampling.noise == "brownian":
            positive = [sigma for sigma in levels.sigmas if sigma > 0]
            seeds = [draw.initial_seed() for draw in self.draws]
            fresh = Brownian(seeds, self.shape, self._like.device, positive[-1], positive[0], self._source)
        denoise = self.sampling.denoiser(self._guided(self.bridge(whole)), whole)
        last = replace(resume, index=skipped + resume.index) if resume else None
        if skipped and not last:
            last = Step(skipped - 1, levels.sigmas[0], x, x, 0)
        left = len(levels.timesteps) - (resume.index + 1 if resume else 0)
        finite = []
        for step in islice(self.sampling.solver(self.order.eta)(denoise, x, whole.sigmas, fresh, last), left):
            finite.append(torch.isfinite(step.x).all())
            if self._like.device.type == "cpu":  # elsewhere reading it would wait for the device
                refuse_infinite(finite, self.sampling.scheduler.name, self._like.dtype)
            scale, index = self.sampling.scale(step.sigma), step.index - skipped
            yield replace(step, index=index, scale=scale, state=noise.state())
        refuse_infinite(finite, self.sampling.scheduler.name, self._like.dtype)

    @property
    def _source(self) -> str:
        return self.order.noise_source or "cpu"

    def _begin(self, latents: Tensor | None, noise: Noise) -> Tensor:
        """Where the run begins, at unit variance."""
        images = len(self.draws)
        if self.order.denoising_start and latents is None:
            raise UsageError("denoising_start wants the latents of the model that ended there; give latents")
        if latents is not None:
            start = checked_latents(latents, (images, *self.shape)).to(noise.device, noise.dtype)
        else:
            start = noise()
        varied = self.order.variation_seed
        if isinstance(varied, tuple) and not self.order.denoising_start:
            other = Noise(generators(None, varied, self._source), self.shape, torch.device("cpu"))()
            start = slerp(start.cpu(), other, self.order.variation_strength).to(noise.device)
        return start

    def _guided(self, denoise: Denoiser) -> Denoiser:
        scale, rescale = self.order.guidance_scale, self.order.guidance_rescale
        assert scale is not None
        if not self.script.guiding:
            return denoise
        weights = None if set(self.script.weights) == {(1.0,) * len(self.draws)} else self.script.weights
        if rescale:
            return guided_rescaled(denoise, scale, rescale, self.sampling.kind, weights)
        return guided(denoise, scale, weights)

    def bridge(self, levels: Levels) -> Denoiser:
        """The network as a function of the noise level, told what the script says at that step.

        On the CPU each image is a network call of its own (with the other parts of its guidance), so that its pixels do
        not depend on the images drawn beside it; on CUDA all go at once.
        """
        kind, images, told = self.sampling.kind, len(self.draws), levels.told
        falling = [-sigma for sigma in levels.sigmas]
        groups: dict[tuple[int, int], list[int]] = {}  # rows of one length, and on the CPU of one image
        for row, length in enumerate(self.script.tokens):
            groups.setdefault((length, 0 if self._like.device.type == "cuda" else row % images), []).append(row)
        learned = self.unet.config.out_channels == 2 * self.shape[0]

        @lru_cache(maxsize=4)  # [a|b] goes back and forth; keys and values are those of the weights in use
        def prepared(text: Conditioning, adapters: Setting) -> list[tuple[Rows, Prepared]]:
            said = text.to(self._like.device, self._like.dtype)
            extras = [None if extra is None else extra.to(self._like.device) for extra in (said.pooled, self.sizes)]
            found: list[tuple[Rows, Prepared]] = []
            for (length, _), own in groups.items():
                rows: Rows = own if len(groups) > 1 else slice(None)
                those = (None if extra is None else extra[rows] for extra in extras)
                found.append((rows, self.unet.prepare(said.context[rows, :length], *those)))
            return found

        def denoise(x: Tensor, sigma: float) -> Estimate:
            step = max(0, bisect_left(falling, -sigma) - (sigma not in told))
            scaled = (x * kind.c_in(sigma)).to(self._like.dtype)
            t = told[sigma] if sigma in told else self.sampling.t(sigma)
            times = torch.full((len(x),), t, device=x.device)
            outputs = scaled.new_empty(len(x), (1 + learned) * x.shape[1], *x.shape[2:])
            acts = self.script.acts  # a run of A1111's DDIM has more steps than were asked for: the last act lasts
            act = next((text for until, text in acts if step < until), acts[-1][1])
            adapters = at(self.cast, step, len(levels.timesteps))
            with self.weights.using(adapters):
                for rows, said in prepared(act, adapters):
                    outputs[rows] = self.unet(scaled[rows], times[rows], said)
            output, *variance = outputs.float().split(x.shape[1], dim=1)
            return Estimate(kind.to_x0(x, sigma, output), *variance)

        return denoise
