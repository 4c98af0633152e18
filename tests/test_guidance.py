"""Denoiser -> Denoiser: guidance and what keeps x0 in its range, against diffusers in one process."""

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldm.diffusion import PREDICTIONS, Denoiser, Estimate, NoiseSchedule, c_in, guided, guided_rescaled
from ldm.diffusion.guidance import bounded, clipped, thresholded
from ldm.diffusion.prediction import FLOW
from ldm.errors import UsageError

SD = NoiseSchedule.scaled_linear()


def draws(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def halves(prediction: str, outputs: Tensor) -> Denoiser:
    """A denoiser of a doubled batch whose network says `outputs`: the negative half, then the positive."""

    def denoise(x: Tensor, sigma: float) -> Estimate:
        assert len(x) == len(outputs) and torch.equal(*x.chunk(2))
        return Estimate(PREDICTIONS[prediction].to_x0(x, sigma, outputs))

    return denoise


@pytest.mark.parametrize(
    ("prediction", "sigma"),
    [(prediction, sigma) for prediction in ("epsilon", "v_prediction") for sigma in (0.03, 1.0, 14.6)]
    + [("v_prediction", 4096.0), ("v_prediction", 1e8)],
)
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance_equals_diffusers_on_the_output(prediction: str, sigma: float, rescale: float) -> None:
    x0, noise, negative, positive = draws(4, 3, 4, 8, 8)
    positive = 1.7 * positive + 0.3  # of another deviation and mean
    x = x0 + sigma * noise
    output = negative + 7.5 * (positive - negative)
    expected = PREDICTIONS[prediction].to_x0(x, sigma, rescale_noise_cfg(output, positive, rescale))
    denoise = halves(prediction, torch.cat([negative, positive]))
    ours = guided_rescaled(denoise, 7.5, rescale, PREDICTIONS[prediction])(x, sigma).x0
    assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    if rescale == 0:
        plain = guided(denoise, 7.5)(x, sigma).x0
        assert float((plain - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_guidance_of_one_is_the_positive_estimate() -> None:
    x, negative, positive = draws(3, 2, 4, 8, 8)
    denoise = halves("sample", torch.cat([negative, positive]))
    assert torch.equal(guided(denoise, 1.0)(x, 3.0).x0, positive)
    assert torch.equal(guided(denoise, 0.0)(x, 3.0).x0, negative)
    with pytest.raises(UsageError, match="from 0 to 1"):
        guided_rescaled(denoise, 7.5, 1.5, PREDICTIONS["sample"])


def test_the_variance_is_that_of_the_positive_half() -> None:
    x, x0, variance = draws(3, 4, 4, 8, 8)
    whole = Estimate(x0, variance)
    for steered in (guided(lambda x, sigma: whole, 3.0), guided_rescaled(lambda x, sigma: whole, 3.0, 0.5, FLOW)):
        assert torch.equal(steered(x[:2], 1.0).variance, variance[2:])
    assert guided(lambda x, sigma: Estimate(x0), 3.0)(x[:2], 1.0).variance is None


@pytest.mark.parametrize("rescale", [None, 0.0, 0.6])
def test_several_parts_are_each_weighed_against_the_negative(rescale: float | None) -> None:
    """Liu et al. 2022, equation 11: negative + scale * sum_k w_k (part_k - negative), with weights of each image."""
    x, negative, first, second, third = draws(5, 2, 4, 8, 8)
    outputs, weights = torch.cat([negative, first, second, third]), [[1.0, 0.5], [-0.4, 2.0], [0.0, 0.3]]
    kind = PREDICTIONS["v_prediction"]

    def denoise(inputs: Tensor, sigma: float) -> Estimate:
        assert torch.equal(inputs, torch.cat([x] * 4))
        return Estimate(kind.to_x0(inputs, sigma, outputs), torch.cat([negative, first, second, third]))

    sums = torch.stack([
        sum(w[i] * (part[i] - negative[i]) for w, part in zip(weights, (first, second, third), strict=True))
        for i in range(2)
    ])  # fmt: skip
    output = negative + 5.0 * sums
    if rescale is None:
        said = guided(denoise, 5.0, weights)(x, 2.0)
    else:
        output = rescale_noise_cfg(output, negative + sums, rescale)
        said = guided_rescaled(denoise, 5.0, rescale, kind, weights)(x, 2.0)
    torch.testing.assert_close(said.x0, kind.to_x0(x, 2.0, output), rtol=0, atol=2e-5)
    assert torch.equal(said.variance, first)


def test_x0_is_kept_in_its_range() -> None:
    x, x0 = draws(2, 3, 4, 8, 8)
    x0 = x0 * torch.tensor([0.3, 2.0, 9.0]).view(3, 1, 1, 1)
    variance = torch.ones(())
    said = clipped(lambda x, sigma: Estimate(x0, variance), 0.8)(x, 1.0)
    assert torch.equal(said.x0, x0.clamp(-0.8, 0.8)) and said.variance is variance
    for ratio, most in [(0.9, 4.0), (0.995, 1.0), (0.5, 100.0), (0.87, 0.5)]:
        oracle = diffusers.DDPMScheduler(dynamic_thresholding_ratio=ratio, sample_max_value=most)
        said = thresholded(lambda x, sigma: Estimate(x0, variance), ratio, most)(x, 1.0)
        torch.testing.assert_close(said.x0, oracle._threshold_sample(x0), rtol=0, atol=1e-6)
        assert said.variance is variance


def test_the_boundary_of_a_consistency_model() -> None:
    oracle = diffusers.LCMScheduler(timestep_scaling=3.0)
    x, x0, variance = draws(3, 2, 4, 8, 8)
    for t in (0, 1, 19, 999):
        skip, out = oracle.get_scalings_for_boundary_condition_discrete(torch.tensor(t))
        sigma = float(SD.sigmas[t])
        said = bounded(lambda x, sigma: Estimate(x0, variance), {sigma: float(t)}, 3.0)(x, sigma)
        torch.testing.assert_close(said.x0, skip * x * c_in(sigma) + out * x0, rtol=0, atol=1e-6)
        assert said.variance is variance
    assert torch.equal(bounded(lambda x, sigma: Estimate(x0), {1e-9: 0.0}, 10.0)(x, 1e-9).x0, x)
