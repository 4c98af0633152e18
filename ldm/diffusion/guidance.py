"""Denoiser -> Denoiser: steering a run by the difference between two estimates, and keeping x0 in its range."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.diffusion.prediction import Denoiser, Estimate, Prediction, c_in
from ldm.errors import UsageError

Weights = Sequence[Sequence[float]]
"""Of each of K positive parts, the weight in each image of the batch."""


def guided(denoise: Denoiser, scale: float, weights: Weights | None = None) -> Denoiser:
    """Classifier-free guidance: negative + scale * (positive - negative), Ho & Salimans 2022 (arXiv:2207.12598), eq. 6.

    `denoise` takes twice the batch, the negative half before the positive, and answers both in one network call; the
    result takes the batch once. Guiding x0 guides the network's output, of which x0 is a linear function whatever its
    kind. A scale of 1 is the positive estimate alone: do not call this then, but pass the plain denoiser, which needs
    half the work. The variance, where there is one, is the positive half's.

    weights: of K positive parts instead of one (Liu et al. 2022, arXiv:2206.01714, eq. 11): negative + scale * sum_k
    weights_k * (positive_k - negative); `denoise` then takes 1 + K times the batch.
    """

    def guide(x: Tensor, sigma: float) -> Estimate:
        (negative, positive), variance = _parts(denoise, x, sigma, weights)
        return Estimate(torch.lerp(negative, positive, scale), variance)

    return guide


def interval(start: float, stop: float, steps: int) -> range:
    """Which of `steps` steps are guided where guidance begins and ends at these shares of them, 0..1: those that
    `start` and `stop` of diffusers' guiders take. It may be none.

    Guidance in a limited interval: Kynkaanniemi et al. 2024 (arXiv:2404.07724); outside of it the scale is 1. The paper
    says it by noise levels; by steps, all network calls of a step are guided alike.
    """
    return range(int(start * steps), int(stop * steps))


def guided_by_image(denoise: Denoiser, scale: float, image_scale: float, weights: Weights | None = None) -> Denoiser:
    """Guidance by a text and by a picture that the network sees: Brooks et al. 2023 (arXiv:2211.09800), eq. 3,

        bare + image_scale * (negative - bare) + scale * (positive - negative).

    `denoise` takes, in one call, three times the batch: bare (no picture, negative text), negative (the picture,
    negative text), positive (picture and text); the result takes the batch once. weights: as of `guided`, of K positive
    parts; then 2 + K times. An image_scale of 1 is `guided` without the bare rows.
    """

    def guide(x: Tensor, sigma: float) -> Estimate:
        (bare, negative, positive), variance = _parts(denoise, x, sigma, weights, bare=1)
        return Estimate(torch.lerp(bare, negative, image_scale) + scale * (positive - negative), variance)

    return guide


def _parts(
    denoise: Denoiser, x: Tensor, sigma: float, weights: Weights | None, bare: int = 0
) -> tuple[list[Tensor], Tensor | None]:
    """The estimates of `bare` leading parts, the negative one, the positive one (of parts, weighted), and the first
    positive part's variance.
    """
    parts = bare + 1 + (1 if weights is None else len(weights))
    said = denoise(torch.cat([x] * parts), sigma)
    *leading, negative = said.x0.chunk(parts)[: bare + 1]
    positives = said.x0.chunk(parts)[bare + 1 :]
    variance = None if said.variance is None else said.variance.chunk(parts)[bare + 1]
    if weights is None:
        return [*leading, negative, *positives], variance
    positive = negative
    for part, row in zip(positives, weights, strict=True):
        factors = torch.tensor(row, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 1))
        positive = positive + factors * (part - negative)
    return [*leading, negative, positive], variance


def guided_rescaled(
    denoise: Denoiser, scale: float, rescale: float, kind: Prediction, weights: Weights | None = None
) -> Denoiser:
    """`guided`, with the output's contrast brought back towards that of the positive half: Lin et al. 2023, eqs. 15-16.

    rescale: phi, from 0 (plain guidance) to 1; the paper's is 0.7.
    kind: what the network behind `denoise` predicts. UsageError: phi outside 0..1.

    The paper scales the network's output by a ratio of standard deviations (per image, over channels and pixels). A
    Denoiser says x0 = c_skip * x + c_out * output, so x0 - c_skip * x is the output up to a factor, which the ratio
    forgets: scaling the output by f is x0 -> c_skip * x + f * (x0 - c_skip * x), without ever dividing by c_out.
    """
    if not 0 <= rescale <= 1:
        raise UsageError(f"guidance_rescale is {rescale}; it must be from 0 to 1")

    def guide(x: Tensor, sigma: float) -> Estimate:
        (negative, positive), variance = _parts(denoise, x, sigma, weights)
        skipped = kind.c_skip(sigma) * x
        output = torch.lerp(negative, positive, scale) - skipped
        factor = rescale * (_deviation(positive - skipped) / _deviation(output)) + (1 - rescale)
        return Estimate(skipped + factor * output, variance)

    return guide


def held(denoise: Denoiser, known: Tensor, freedom: Callable[[float], Tensor]) -> Denoiser:
    """x0 -> known + freedom * (x0 - known): inpainting with any model, whatever the solver.

    known: the clean picture [1 or B, C, H, W]. freedom: level -> how far each place may leave it there, 0..1, exact at
    both ends; [1 or B, 1, H, W] (see ldm.diffusion.strength.freed). Where it is 0 a solver that begins at known +
    sigma * noise keeps x - known a noise of its level and ends at `known`; so the network sees there, at each level,
    the known picture under noise, as if it had been put in place of x: RePaint's eq. 8a (Lugmayr et al. 2022,
    arXiv:2201.09865), but with the solver's own noise instead of a fresh one. PLMS, which extrapolates what the network
    says, does so only of one that predicts noise; with others it ends near `known`.
    """

    def hold(x: Tensor, sigma: float) -> Estimate:
        said = denoise(x, sigma)
        return said._replace(x0=torch.lerp(known, said.x0, freedom(sigma)))

    return hold


def clipped(denoise: Denoiser, most: float) -> Denoiser:
    """x0 cut to -most..most: Ho et al. 2020, in their code."""
    return _changed(denoise, lambda x0: x0.clamp(-most, most))


def thresholded(denoise: Denoiser, ratio: float, most: float) -> Denoiser:
    """Dynamic thresholding: x0 cut to -s..s and divided by s, s the quantile `ratio` of its sizes, in 1..most.

    Saharia et al. 2022 (arXiv:2205.11487), section 2.3; per image. As in diffusers s is `most` where that is below 1.
    """

    def cut(x0: Tensor) -> Tensor:
        s = x0.abs().flatten(1).quantile(ratio, dim=1).clamp(1, most).view(-1, *[1] * (x0.ndim - 1))
        return torch.clamp(x0, -s, s) / s

    return _changed(denoise, cut)


def bounded(denoise: Denoiser, times: Mapping[float, float], scaling: float) -> Denoiser:
    """A consistency model's boundary condition: x0 -> c_skip x + c_out x0, which at time 0 is x itself.

    Luo et al. 2023 (arXiv:2310.04378), eq. 9, with s = scaling * time, c_skip = d^2 / (s^2 + d^2) and c_out =
    s / sqrt(s^2 + d^2), d = 0.5; x is in the network's frame. times: level -> time.
    """

    def bound(x: Tensor, sigma: float) -> Estimate:
        said, s = denoise(x, sigma), scaling * times[sigma]
        whole = s**2 + 0.25
        return said._replace(x0=s / whole**0.5 * said.x0 + 0.25 / whole * c_in(sigma) * x)

    return bound


def _changed(denoise: Denoiser, change: Callable[[Tensor], Tensor]) -> Denoiser:
    def changed(x: Tensor, sigma: float) -> Estimate:
        said = denoise(x, sigma)
        return said._replace(x0=change(said.x0))

    return changed


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each sample of [B, ...] -> [B, 1, ...]."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
