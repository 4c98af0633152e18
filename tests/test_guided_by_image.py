"""Guidance by a text and a picture: equation 3 of Brooks et al. 2023, on the network's output."""

import pytest
import torch
from torch import Tensor

from ldm.diffusion import PREDICTIONS, Denoiser, Estimate, guided
from ldm.diffusion.guidance import guided_by_image


def draws(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, 4, 8, 8, generator=generator) for _ in range(count)]


def saying(prediction: str, outputs: list[Tensor]) -> Denoiser:
    """A denoiser whose network says these outputs, block by block, of rows that all hold the same x."""
    calls = []

    def denoise(x: Tensor, sigma: float) -> Estimate:
        calls.append(sigma)
        assert len(calls) == 1, "one network call is enough"
        blocks = x.chunk(len(outputs))
        assert all(torch.equal(block, blocks[0]) for block in blocks)
        said = torch.cat(outputs)
        return Estimate(PREDICTIONS[prediction].to_x0(x, sigma, said), said.tanh())

    return denoise


@pytest.mark.parametrize(
    ("prediction", "sigma"), [("epsilon", 0.03), ("epsilon", 14.6), ("v_prediction", 1.0), ("v_prediction", 1e8)]
)
def test_it_is_the_equation_on_the_output(prediction: str, sigma: float) -> None:
    x0, noise, bare, negative, positive = draws(5)
    x = x0 + sigma * noise
    said = guided_by_image(saying(prediction, [bare, negative, positive]), 7.5, 1.5)(x, sigma)
    output = bare + 1.5 * (negative - bare) + 7.5 * (positive - negative)  # e(z) .. e(z, c_I) .. e(z, c_I, c_T)
    expected = PREDICTIONS[prediction].to_x0(x, sigma, output)
    assert float((said.x0 - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert said.variance is not None and torch.equal(said.variance, positive.tanh())


def test_a_picture_scale_of_one_is_guidance_by_the_text_alone() -> None:
    x, bare, negative, positive = draws(4)
    ours = guided_by_image(saying("sample", [bare, negative, positive]), 3.0, 1.0)(x, 2.0).x0
    torch.testing.assert_close(ours, guided(saying("sample", [negative, positive]), 3.0)(x, 2.0).x0)
    without = guided_by_image(saying("sample", [bare, negative, positive]), 0.0, 0.0)(x, 2.0).x0
    assert torch.equal(without, bare)


def test_positive_parts_are_weighted_image_by_image() -> None:
    x, bare, negative, first, second = draws(5)
    weights = ((1.0, 0.5, 0.0), (0.0, -1.0, 2.0))
    ours = guided_by_image(saying("sample", [bare, negative, first, second]), 4.0, 1.2, weights)(x, 2.0)
    for i in range(3):
        text = sum(w[i] * (part[i] - negative[i]) for w, part in zip(weights, (first, second), strict=True))
        expected = bare[i] + 1.2 * (negative[i] - bare[i]) + 4.0 * text
        torch.testing.assert_close(ours.x0[i], expected, rtol=1e-5, atol=1e-5)
    assert ours.variance is not None and torch.equal(ours.variance, first.tanh())
