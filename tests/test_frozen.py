"""Convolutions with frozen weights: torch's results and gradients, and nothing kept for gradients that nobody gets."""

import pytest
import torch
from torch import Tensor, nn

from ldm.training import frozen

SHAPES = {  # of the map, and the convolution
    "plain": ((1, 6, 8, 8), nn.Conv2d(6, 8, 3, padding=1)),
    "strided": ((2, 6, 7, 9), nn.Conv2d(6, 8, 3, stride=2, padding=1)),
    "bare": ((3, 6, 5, 8), nn.Conv2d(6, 8, 3, bias=False)),
    "pointwise": ((2, 6, 4, 4), nn.Conv2d(6, 8, 1)),
    "uneven": ((2, 6, 9, 8), nn.Conv2d(6, 8, (3, 2), (1, 2), (2, 1), dilation=(2, 1))),
    "grouped": ((2, 6, 4, 4), nn.Conv2d(6, 8, 3, groups=2)),
}


def passed(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """What a convolution makes of x, the gradient of x, and how many numbers are kept between the two."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        y = conv(x)
    (gradient,) = torch.autograd.grad(y.tanh().sum(), x)
    return y.detach(), gradient, sum(kept)


@pytest.mark.parametrize("many", [0, frozen.MANY], ids=["product", "convolution"])
@pytest.mark.parametrize("name", SHAPES)
def test_results_and_gradients_are_torchs(name, many, monkeypatch):
    monkeypatch.setattr(frozen, "MANY", many)
    shape, conv = SHAPES[name]
    conv.requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    expected, slope, kept = passed(conv, x)
    assert kept >= x.numel() + conv.weight.numel()
    with frozen.sparing([nn.Sequential(conv)]):
        y, gradient, kept = passed(conv, x)
    assert kept == 0
    assert y.is_contiguous() and y.shape == expected.shape
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (gradient - slope).abs().max() <= 1e-6 * slope.abs().max()
    assert "forward" not in vars(conv)


@pytest.mark.parametrize(("places", "products"), [(frozen.FEW, 2), (frozen.FEW + 1, 0)])
def test_only_small_maps_are_products(places, products, monkeypatch):
    """Forward and backward, of two maps."""
    monkeypatch.setattr(frozen, "MANY", 0)
    seen = []
    for name in ("unfold", "fold"):
        act = getattr(frozen.F, name)
        monkeypatch.setattr(frozen.F, name, lambda *given, act=act: seen.append(1) or act(*given))
    conv = nn.Conv2d(2, 2, 1).requires_grad_(False)
    with frozen.sparing([conv]):
        conv(torch.randn(1, 2, 1, places, requires_grad=True)).sum().backward()
    assert len(seen) == products


def test_weights_that_are_trained_get_their_gradients():
    conv = nn.Conv2d(6, 8, 3)
    x = torch.randn(1, 6, 4, 4, requires_grad=True)
    with frozen.sparing([conv]):
        conv(x).sum().backward()
    assert conv.weight.grad.abs().max() > 0 and x.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    conv = nn.Conv2d(6, 8, 3).to(dtype).requires_grad_(False)
    x = torch.randn(1, 6, 4, 4, dtype=dtype, requires_grad=True)
    expected = passed(conv, x)[:2]
    with frozen.sparing([conv]):
        for ours, theirs in zip(passed(conv, x)[:2], expected, strict=True):
            assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_autocast_keeps_its_types():
    conv = nn.Conv2d(6, 8, 3).requires_grad_(False)
    with frozen.sparing([conv]), torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(1, 6, 4, 4, requires_grad=True)).dtype == torch.bfloat16
