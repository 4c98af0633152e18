"""Denoiser -> Denoiser: steering a run by the difference between two estimates."""

import torch
from torch import Tensor

from ldm.diffusion.prediction import PREDICTIONS, Denoiser, Estimate
from ldm.errors import UsageError, choose


def guided(denoise: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance: negative + scale * (positive - negative), Ho & Salimans 2022 (arXiv:2207.12598), eq. 6.

    `denoise` takes twice the batch, the negative half before the positive, and answers both in one network call; the
    result takes the batch once. Guiding x0 guides the network's output, of which x0 is a linear function whatever its
    kind. A scale of 1 is the positive estimate alone: do not call this then, but pass the plain denoiser, which needs
    half the work.
    """

    def guide(x: Tensor, sigma: float) -> Estimate:
        negative, positive = denoise(torch.cat([x, x]), sigma).x0.chunk(2)
        return Estimate(torch.lerp(negative, positive, scale))

    return guide


def guided_rescaled(denoise: Denoiser, scale: float, rescale: float, prediction: str) -> Denoiser:
    """`guided`, with the output's contrast brought back towards that of the positive half: Lin et al. 2023, eqs. 15-16.

    rescale: phi, from 0 (plain guidance) to 1; the paper's is 0.7.
    prediction: what the network behind `denoise` predicts, a name of PREDICTIONS.
    UsageError: phi outside 0..1, unknown prediction.

    The paper scales the network's output by a ratio of standard deviations (per image, over channels and pixels). A
    Denoiser says x0 = c_skip * x + c_out * output, so x0 - c_skip * x is the output up to a factor, which the ratio
    forgets: scaling the output by f is x0 -> c_skip * x + f * (x0 - c_skip * x), without ever dividing by c_out.
    """
    c_skip = PREDICTIONS[choose("prediction", prediction, PREDICTIONS)].c_skip
    if not 0 <= rescale <= 1:
        raise UsageError(f"guidance_rescale is {rescale}; it must be from 0 to 1")

    def guide(x: Tensor, sigma: float) -> Estimate:
        negative, positive = denoise(torch.cat([x, x]), sigma).x0.chunk(2)
        skipped = c_skip(sigma) * x
        output = torch.lerp(negative, positive, scale) - skipped
        factor = rescale * (_deviation(positive - skipped) / _deviation(output)) + (1 - rescale)
        return Estimate(skipped + factor * output)

    return guide


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each sample of [B, ...] -> [B, 1, ...]."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
