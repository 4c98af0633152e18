"""Convolutions whose weights are frozen, as training passes through them: what only gradients of the weights would need
is neither kept nor done.

torch keeps the input of every convolution for the backward pass, though the gradient of the input does not need it. And
on the CPU it lays out a convolution's weights anew in each call, forward and backward: where maps are small and weights
many, as in the inner levels of a U-Net, that takes longer than the arithmetic, which a plain product does without.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

FEW, MANY = 256, 2**23  # up to so many places in all maps, and from so many weights on, the product is the faster


class _Convolution(torch.autograd.Function):
    """F.conv2d of x [B, I, H, W] by constant weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: nn.Conv2d) -> Tensor:
        ctx.conv, ctx.shape = conv, x.shape
        return nn.Conv2d.forward(conv, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        c, (g,) = ctx.conv, gradients
        return conv2d_input(ctx.shape, c.weight, g, c.stride, c.padding, c.dilation, c.groups), None


class _Product(torch.autograd.Function):
    """The same as a product: the weights as they lie, [O, I kh kw], by the patches of all places, [I kh kw, B L]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: nn.Conv2d) -> Tensor:
        ctx.conv, ctx.shape = conv, x.shape
        patches = F.unfold(x, *_window(conv)).transpose(0, 1).flatten(1)
        weight = conv.weight.flatten(1)
        y = weight @ patches if conv.bias is None else torch.addmm(conv.bias[:, None], weight, patches)
        return y.reshape(-1, len(x), *_sides(conv, x)).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        c, (g,) = ctx.conv, gradients
        patches = c.weight.flatten(1).t() @ g.transpose(0, 1).flatten(1)
        patches = patches.reshape(len(patches), len(g), -1).transpose(0, 1)
        return F.fold(patches, ctx.shape[-2:], *_window(c)), None


def _window(conv: nn.Conv2d) -> Any:
    """What F.unfold and F.fold are told of a convolution."""
    return conv.kernel_size, conv.dilation, conv.padding, conv.stride


def _sides(conv: nn.Conv2d, x: Tensor) -> list[int]:
    """Height and width of what a convolution makes of x."""
    rows = zip(x.shape[-2:], *_window(conv), strict=True)
    return [(side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, dilation, padding, stride in rows]  # fmt: skip


def _forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    apart = torch.is_autocast_enabled(x.device.type)  # then the types are autocast's matter
    if apart or conv.weight.requires_grad or not (x.requires_grad and torch.is_grad_enabled()):
        return nn.Conv2d.forward(conv, x)
    height, width = _sides(conv, x)
    few = len(x) * height * width <= FEW and conv.weight.numel() >= MANY and conv.groups == 1
    way = _Product if few and x.device.type == "cpu" and x.dtype == torch.float32 else _Convolution
    return cast(Tensor, way.apply(x, conv))  # type: ignore[no-untyped-call]


@contextmanager
def sparing(networks: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, convolutions with frozen weights take less memory in training, and less time on the CPU. Results
    and gradients are the same, but for the order of sums.
    """
    found = [part for network in networks for part in network.modules() if isinstance(part, nn.Conv2d)]
    try:
        for conv in found:
            setattr(conv, "forward", partial(_forward, conv))  # noqa: B010  # a method, which mypy lets nobody assign
        yield
    finally:
        for conv in found:
            delattr(conv, "forward")
