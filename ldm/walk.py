"""One run down the noise levels: from noise, or where another run stopped, to latents; and the bridge between solvers,
which know noise levels, and networks, which know timesteps.

B images, C latent channels, H W latent height and width.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ldm.adapters.weights import Cast, Setting, Weights, at
from ldm.brownian import Brownian
from ldm.conditioning import Script
from ldm.diffusion.guidance import guided, guided_by_image, guided_rescaled, interval
from ldm.diffusion.prediction import Denoiser, Estimate
from ldm.diffusion.spacing import Levels, respaced
from ldm.diffusion.strength import stronger, stronger_as_diffusers
from ldm.editing import Ground, guided_by_picture
from ldm.errors import UsageError
from ldm.models.seamless import seamless
from ldm.models.unet import Prepared, UNet
from ldm.noise import Generator, Noise, checked_latents, generators, slerp
from ldm.noise_files import GivenNoise
from ldm.refusals import refuse_infinite
from ldm.request import Request
from ldm.schedulers import Sampling, Step, from_config
from ldm.schedulers.inversion import invert
from ldm.schedulers.laps import Lap, laps, total, walked
from ldm.text.encoder import Conditioning

Rows = list[int] | slice
ANOTHER_PATH = 0x9E3779B97F4A7C15  # added to a seed for each lap; no two pictures of a request are so far apart


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
    ground: the picture that it edits.
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
    ground: Ground | None = None

    @property
    def _like(self) -> Tensor:
        """Of the network's device and type; the state of a run is float32 in any case."""
        return self.unet.conv_in.weight

    @cached_property
    def _whole(self) -> Levels:
        """The levels of the run that this one may be a part of; the script counts its steps."""
        order = self.order
        assert order.num_inference_steps
        levels = self.sampling.levels(order.num_inference_steps)
        if order.strength is None or order.profile == "diffusers":
            return levels
        return stronger(levels, order.strength, self.sampling.schedule)

    @cached_property
    def levels(self) -> Levels:
        """The levels that this run visits."""
        order, trained = self.order, self.sampling.schedule.num_train_timesteps
        part = self._whole.part(order.denoising_start, order.denoising_end, trained)
        if order.strength is None or order.profile != "diffusers":
            return part
        return stronger_as_diffusers(part, order.strength)

    @cached_property
    def laps(self) -> tuple[Lap, ...]:
        """How the levels are walked."""
        return laps(len(self.levels.timesteps), self.order.resample, self.order.resample_jump)

    @cached_property
    def inside(self) -> tuple[bool, ...]:
        """Of each step, through all laps, whether it is in the interval of guidance. Of a part of a run the steps
        of the whole are counted, in the profile "diffusers" its own.
        """
        order, whole, own = self.order, self._whole.timesteps, self.levels.timesteps
        skipped, count = (0, len(own)) if order.profile == "diffusers" else (whole.index(own[0]), len(whole))
        steps = interval(order.guidance_start, order.guidance_stop, count)
        return tuple(skipped + step in steps for lap in self.laps for step in range(lap.begin, lap.end))

    def steps(self, latents: Tensor | None, resume: Step | None) -> Iterator[Step]:
        """The steps, from `latents` [B, C, H, W] (default noise), or those after `resume`.

        A part of a run is walked as such: what a solver does by the number of steps, it does by that of the whole.
        NumericalError: x is not finite after one of them.
        """
        whole, levels, noise = self._whole, self.levels, Noise(self.draws, self.shape, self._like.device)
        skipped, ground = whole.timesteps.index(levels.timesteps[0]), self.ground
        placed = ground.placed(noise, lambda: self._unit(latents, noise)) if ground else None
        if resume:
            x = resume.x.to(self._like.device)
        elif ground and placed and not self.order.denoising_start:
            x = ground.begin(placed, levels)
        else:
            x = (placed.unit if placed else self._unit(latents, noise)) * levels.start
        if self.order.eta_noise_seed_delta:
            seeds = [draw.initial_seed() + self.order.eta_noise_seed_delta for draw in self.draws]
            noise = Noise(generators(None, seeds, self._source), self.shape, self._like.device)
        if resume:
            noise.restore(resume.state)
        said = {inside: self._guided(inside, whole, placed and placed.beside) for inside in set(self.inside)}
        made = resume.index + 1 if resume else 0  # steps; all calls until the next is yielded are of that one
        denoise = self.sampling.denoiser(lambda x, sigma: said[self.inside[made]](x, sigma), whole)
        if ground and placed:
            denoise = ground.keeping(denoise, placed, levels)
        finite = []
        solver, path = self.sampling.solver(self.order.eta), self._path if self.sampling.noise == "brownian" else None
        for step in walked(solver, denoise, x, whole.sigmas, noise, self.laps, skipped, resume, path):
            made = step.index + 1
            finite.append(torch.isfinite(step.x).all())
            if self._like.device.type == "cpu":  # elsewhere reading it would wait for the device
                refuse_infinite(finite, self.sampling.scheduler.name, self._like.dtype)
            step = replace(step, scale=self.sampling.scale(step.sigma), state=noise.state())
            yield ground.ended(step, placed) if ground and placed and step.index + 1 == total(self.laps) else step
        refuse_infinite(finite, self.sampling.scheduler.name, self._like.dtype)

    def inverted(self, latents: Tensor | None, resume: Step | None) -> Iterator[Step]:
        """The steps of DDIM inversion from the picture up the levels, or those after `resume`; `latents` of the last is
        the unit noise that `steps` makes the picture of. Nothing goes before it: `latents` is not read.
        """
        assert self.ground is not None
        levels = self.levels
        known = self.ground.image.mean.expand(len(self.draws), -1, -1, -1)
        for step in invert(self.bridge(self._whole), known, levels.sigmas, resume=resume):
            if step.index == len(levels.timesteps) - 1:
                step = replace(step, x=self.ground.noise_at(step.x, levels))
            yield step

    def _path(self, lap: int) -> Brownian:
        """The noise of a lap, where it belongs to the levels."""
        positive = [sigma for sigma in self.levels.sigmas if sigma > 0]
        seeds = [(draw.initial_seed() + lap * ANOTHER_PATH) % 2**63 for draw in self.draws]
        return Brownian(seeds, self.shape, self._like.device, positive[-1], positive[0], self._source)

    @property
    def _source(self) -> str:
        return self.order.noise_source or "cpu"

    def _unit(self, latents: Tensor | None, noise: Noise) -> Tensor:
        """What the run begins with, at unit variance."""
        images = len(self.draws)
        if self.order.denoising_start and latents is None:
            raise UsageError("denoising_start wants the latents of the model that ended there; give latents")
        if latents is None and isinstance(self.order.noise, GivenNoise):
            latents = self.order.noise.latents.expand(images, -1, -1, -1)
        if latents is not None:
            start = checked_latents(latents, (images, *self.shape)).to(noise.device, noise.dtype)
        else:
            start = noise()
        varied = self.order.variation_seed
        if isinstance(varied, tuple) and not self.order.denoising_start:
            other = Noise(generators(None, varied, self._source), self.shape, torch.device("cpu"))()
            start = slerp(start.cpu(), other, self.order.variation_strength).to(noise.device)
        return start

    def _guided(self, inside: bool, levels: Levels, beside: Tensor | None) -> Denoiser:
        """The network with its guidance, inside the interval of it or outside, where its scale is 1. There the prompt
        is asked alone, but for parts joined by AND and guidance by a picture, which at a scale of 1 are still told from
        the negative prompt.
        """
        script, sizes, images, picture = self.script, self.sizes, len(self.draws), guided_by_picture(self.order)
        weights = None if set(script.weights) == {(1.0,) * images} else script.weights
        scale, rescale = self.order.guidance_scale if inside else 1.0, self.order.guidance_rescale
        assert scale is not None
        if script.guiding and not (inside or weights or picture):
            alone = replace(self, script=script.positive(images), sizes=None if sizes is None else sizes[images:])
            return alone.bridge(levels, beside)
        denoise = self.bridge(levels, beside)
        if not script.guiding:
            return denoise
        if picture:
            return guided_by_image(denoise, scale, self.order.image_guidance_scale or 0.0, weights)
        if rescale:
            return guided_rescaled(denoise, scale, rescale, self.sampling.kind, weights)
        return guided(denoise, scale, weights)

    def bridge(self, levels: Levels, beside: Tensor | None = None) -> Denoiser:
        """The network as a function of the noise level, told what the script says at that step.

        beside: the further channels of its input, [1 or B, C', H, W]; where the negative block is said twice, the first
        of them is told zeros in their place, no picture.
        On the CPU each image is a network call of its own (with the other parts of its guidance), so that its pixels do
        not depend on the images drawn beside it; on CUDA all go at once.
        """
        kind, images, told = self.sampling.kind, len(self.draws), levels.told
        falling = [-sigma for sigma in levels.sigmas]
        groups: dict[tuple[int, int], list[int]] = {}  # rows of one length, and on the CPU of one image
        for row, length in enumerate(self.script.tokens):
            groups.setdefault((length, 0 if self._like.device.type == "cuda" else row % images), []).append(row)
        learned = self.unet.config.out_channels == 2 * self.shape[0]
        if beside is not None:
            blocks = [beside.expand(images, -1, -1, -1)] * (len(self.script.tokens) // images)
            blocks[0] = blocks[0] * (not guided_by_picture(self.order))
            beside = torch.cat(blocks).to(self._like)
        axes = self.order.seamless or ""

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
            seen = scaled if beside is None else torch.cat([scaled, beside], 1)
            t = told[sigma] if sigma in told else self.sampling.t(sigma)
            times = torch.full((len(x),), t, device=x.device)
            outputs = scaled.new_empty(len(x), (1 + learned) * x.shape[1], *x.shape[2:])
            acts = self.script.acts  # a run of A1111's DDIM has more steps than were asked for: the last act lasts
            act = next((text for until, text in acts if step < until), acts[-1][1])
            adapters = at(self.cast, step, len(levels.timesteps))
            with self.weights.using(adapters), seamless(axes):
                for rows, said in prepared(act, adapters):
                    outputs[rows] = self.unet(seen[rows], times[rows], said)
            output, *variance = outputs.float().split(x.shape[1], dim=1)
            return Estimate(kind.to_x0(x, sigma, output), *variance)

        return denoise
