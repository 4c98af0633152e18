"""Noise that belongs to an interval of noise levels: the increments of a Brownian motion of each image's own."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.errors import choose
from ldm.noise import SOURCES, unit

PLACES = 6  # decimals to which noise levels are told apart
SLACK = 1e-3  # how far a level may lie outside, as exp(log(sigma)) in float32 does


class Brownian:
    """Unit noise [B, C, H, W] float32 of a step: (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|).

    W is one Brownian motion per image over the noise levels from low to high, made of nothing but the image's seed, its
    shape and these two ends: steps that overlap share their noise, and a step asked for again, in any order, has the
    same bits. With source "cpu" it is the path of k-diffusion's BrownianTreeNoiseSampler (torchsde's BrownianTree) on a
    CPU with one seed per image; with "gpu" it is A1111's. As there, levels count as float32 rounded to 6 decimals, so
    another last digit of a level is another point of the path.

    How: W(high) - W(low) is sqrt(high - low) * noise; and given the rise of W over an interval, the rise over its left
    half is normal (Levy's bridge): rise * a / (a + b) + sqrt(a * b / (a + b)) * noise, for halves of lengths a and b.
    Halving goes on until a step is made of whole intervals. The noise of interval n of row d of this binary tree is
    drawn from the seed that numpy's SeedSequence(the image's seed) gives its descendant (n, d).
    """

    dtype = torch.float32

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device,
        low: float,
        high: float,
        source: str = "cpu",
    ) -> None:
        """low, high: the lowest level above 0 and the highest one of the run. UsageError: source is not in SOURCES."""
        self.seeds, self.shape, self.device = seeds, shape, device
        self._begin = SOURCES[choose("noise source", source, SOURCES)]
        self.low, self.high = _point(low), _point(high)
        self._whole = self._noise(()) * math.sqrt(float(np.float32(high)) - float(np.float32(low)))
        self._lefts: dict[tuple[int, int], Tensor] = {}  # of the last call: the next asks for half of them again

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """The noise of the step from sigma to sigma_next; 0 where they are one point. ValueError: not in low..high."""
        start, end = sorted((_point(sigma), _point(sigma_next)))
        if not self.low - SLACK <= start <= end <= self.high + SLACK:
            raise ValueError(f"no noise from {sigma} to {sigma_next}: the path goes from {self.low} to {self.high}")
        start, end = max(start, self.low), min(end, self.high)
        rise = torch.zeros(len(self.seeds), *self.shape)
        if start < end:
            for piece in self._pieces(start, end):
                rise += piece
            length = torch.tensor(sigma_next, dtype=self.dtype) - torch.tensor(sigma, dtype=self.dtype)
            rise /= length.abs().sqrt() * length.sign()
        return rise.to(self.device, non_blocking=True)

    def state(self) -> tuple[()]:
        """Nothing: every interval's noise is a function of the arguments of the constructor."""
        return ()

    def restore(self, state: tuple[()]) -> None:
        """Nothing to restore."""

    def _pieces(self, start: float, end: float) -> Iterator[Tensor]:
        """The rises of W over the largest intervals of the tree that make up start..end, from left to right."""
        lefts = {}
        todo = [(self.low, self.high, self._whole, 0, 0)]
        while todo:
            first, last, rise, number, row = todo.pop()
            if start <= first and last <= end:
                yield rise
                continue
            middle = round((first + last) / 2, PLACES)
            left = self._lefts.get((number, row))
            if left is None:
                a, b, scale = middle - first, last - middle, 1 / (last - first)  # in this order: torchsde's bits
                left = rise * a * scale + math.sqrt(a * b * scale) * self._noise((number, row))
            lefts[number, row] = left
            if middle < end:
                todo.append((middle, last, rise - left, 2 * number + 1, row + 1))
            if start < middle:
                todo.append((first, middle, left, 2 * number, row + 1))
        self._lefts = lefts

    def _noise(self, descendant: tuple[int, ...]) -> Tensor:
        """Unit noise [B, C, H, W] of one interval of the tree."""
        given = (np.random.SeedSequence(seed, spawn_key=descendant, pool_size=24) for seed in self.seeds)
        return torch.stack([unit(self._begin(int(words.generate_state(1)[0])), self.shape) for words in given])


def _point(sigma: float) -> float:
    return round(float(np.float32(sigma)), PLACES)
