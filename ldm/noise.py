"""Where a run begins: one generator for each image, the noise it draws, and noise between two noises."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.errors import UsageError


class Noise:
    """Unit noise [B, C, H, W] float32, from one CPU generator per image: image i gets the same numbers in any batch,
    order and on any device.
    """

    dtype = torch.float32

    def __init__(
        self, generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self.generators, self.shape, self.device = generators, shape, device

    def __call__(self) -> Tensor:
        """The next numbers of every image's sequence."""
        drawn = torch.stack([torch.randn(self.shape, generator=g, device=g.device).cpu() for g in self.generators])
        return drawn.to(self.device, non_blocking=True)


def generators(
    given: torch.Generator | Sequence[torch.Generator] | None, seeds: Sequence[int]
) -> list[torch.Generator]:
    """One generator per image. UsageError when a list of them has another length."""
    if given is None:
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    if isinstance(given, torch.Generator):
        return [given] * len(seeds)
    if len(given) != len(seeds):
        raise UsageError(f"{len(given)} generators for {len(seeds)} pictures; give one, or one for each")
    return list(given)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Noise [B, C, H, W] on the arc from a (share 0) to b (share 1), which keeps its length; the ends are exact.

    Image by image, in float64: the images beside it and the device change no bit of any.
    """
    return torch.stack([_on_arc(one, other, share) for one, other in zip(a, b, strict=True)])


def _on_arc(a: Tensor, b: Tensor, share: float) -> Tensor:
    p, q = a.double(), b.double()
    angle = math.acos(max(-1.0, min(1.0, float((p * q).sum() / (p.norm() * q.norm())))))
    whole = math.sin(angle)
    if whole < 1e-6:  # the same noise twice: no arc
        return torch.lerp(a, b, share)
    return math.sin((1 - share) * angle) / whole * a + math.sin(share * angle) / whole * b


def checked_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The latents, if they have this shape and are finite. UsageError otherwise."""
    if tuple(latents.shape) != shape:
        raise UsageError(f"latents of shape {list(latents.shape)}; this request takes {list(shape)}")
    if not torch.isfinite(latents).all():
        raise UsageError("the latents given are not all finite; give unit noise")
    return latents
