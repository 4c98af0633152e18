"""The noise that networks are trained on. Its random numbers come from outside, so that they can be those of a sample
and not of a run.
"""

from torch import Tensor


def training_noise(normal: Tensor, shift: Tensor, offset: float) -> Tensor:
    """Offset noise: Guttenberg 2023, "Diffusion with offset noise"; as `--noise_offset` of diffusers and kohya has it.

    normal: standard normal [..., C, h, w]; shift: standard normal [..., C], which moves each channel as a whole. ->
    normal + offset * shift, of variance 1 + offset^2 and, between two places of one channel, covariance offset^2. So
    the network learns to change the mean of a picture, of which plain noise leaves almost everything to be seen.
    """
    return normal + offset * shift[..., None, None]


def perturbed(noise: Tensor, extra: Tensor, strength: float) -> Tensor:
    """The noise that the network sees under input perturbation: Ning et al. 2023 (arXiv:2301.11706).

    noise: that of the target; extra: standard normal; both of one shape. -> noise + strength * extra, not scaled back;
    `--input_perturbation` of diffusers, ip_noise_gamma of kohya. So training meets inputs as far off as those that
    sampling makes.
    """
    return noise + strength * extra
