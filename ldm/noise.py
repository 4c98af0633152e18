"""Where a run begins: one generator for each image, the noise it draws, and noise between two noises."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.errors import UsageError, choose
from ldm.philox import Philox

Generator = torch.Generator | Philox

SOURCES: dict[str, Callable[[int], Generator]] = {
    "cpu": lambda seed: torch.Generator().manual_seed(seed),  # the Mersenne twister of torch: diffusers' numbers
    "gpu": Philox,  # an NVIDIA GPU's, computed on the CPU: A1111's "GPU" (its default) and "NV"
}
"""Where the numbers of a seed come from: name -> (seed -> generator). Neither hangs on the device the model runs on."""


def unit(generator: Generator, shape: Sequence[int]) -> Tensor:
    """The generator's next unit normal numbers, of this shape: float32, on the CPU."""
    if isinstance(generator, Philox):
        return generator.randn(shape)
    return torch.randn(shape, generator=generator, device=generator.device).cpu()


class Noise:
    """Unit noise [B, C, H, W] float32, from one generator per image: image i gets the same numbers in any batch, order
    and on any device.
    """

    dtype = torch.float32

    def __init__(self, generators: Sequence[Generator], shape: tuple[int, int, int], device: torch.device) -> None:
        self.generators, self.shape, self.device = generators, shape, device

    def __call__(self, sigma: float = math.inf, sigma_next: float = 0.0) -> Tensor:
        """The next numbers of every image's sequence, whatever the two noise levels are."""
        drawn = torch.stack([unit(generator, self.shape) for generator in self.generators])
        return drawn.to(self.device, non_blocking=True)

    def state(self) -> tuple[bytes, ...]:
        """Where every generator stands: at most 5 KB for each, once for a generator that several images share."""
        return tuple(generator.get_state().numpy().tobytes() for generator in self._each())

    def restore(self, state: tuple[bytes, ...]) -> None:
        """Go on where `state` was taken, from generators of the same kinds, shared in the same way.

        ValueError: another number of them. RuntimeError or ValueError: of another kind.
        """
        for generator, held in zip(self._each(), state, strict=True):
            generator.set_state(torch.frombuffer(bytearray(held), dtype=torch.uint8))

    def _each(self) -> list[Generator]:
        return list(dict.fromkeys(self.generators))


def generators(
    given: Generator | Sequence[Generator] | None, seeds: Sequence[int], source: str = "cpu"
) -> list[Generator]:
    """One generator per image: the given ones, or else of each seed, from one of SOURCES.

    UsageError: a list of another length; an unknown source.
    """
    if given is None:
        begin = SOURCES[choose("noise source", source, SOURCES)]
        return [begin(seed) for seed in seeds]
    if isinstance(given, Generator):
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
