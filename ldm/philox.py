"""The noise of an NVIDIA GPU, computed on the CPU: Philox4x32-10 and Box-Muller as CUDA's cuRAND does them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]  # each holds 32 bits

WORD = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)  # the golden ratio and sqrt(3) - 1, as 32-bit fractions
BLOCK = 8192  # elements at a time: what they need stays in the cache, which halves the time of large draws


def philox4x32(counter: Words, key: Words) -> tuple[Words, Words, Words, Words]:
    """Four random words [N] for four counter words [4, N] and two key words [2, 1], all < 2^32.

    Ten rounds of Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, section 3.3).
    """
    even, odd, product = counter[::2].copy(), counter[1::2].copy(), np.empty_like(counter[::2])
    for _ in range(10):
        np.multiply(even, MULTIPLIERS, out=product)  # 64 bits: the high words mix, the low words are handed on
        np.right_shift(product[::-1], SHIFT, out=even)
        even ^= odd
        even ^= key
        np.bitwise_and(product[::-1], WORD, out=odd)
        key = (key + WEYL) & WORD
    return even[0], odd[0], even[1], odd[1]


class Philox:
    """Draws what `torch.randn(shape, device="cuda")` draws after `torch.manual_seed(seed)`: A1111's noise source "GPU",
    by the mathematics of its emulation "NV", on any machine.

    The key is the 64-bit seed, the counter (draws so far, 0, element, 0), and an element takes two of its four words.
    Float64 until the end, where a GPU computes in float32 and "NV" with a float32 2 pi: they agree to some 1e-6.
    A GPU departs altogether where it has no thread for every element, beyond (multiprocessors * threads on each) of
    them: 43,008 on an RTX 3060, 196,608 on an RTX 4090. There it goes round again with what each counter has left,
    while "NV", like this, goes on with new counters.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.draws = seed % 2**64, 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """The next unit normal numbers, of this shape: float32, on the CPU."""
        elements = np.arange(math.prod(shape), dtype=np.uint64)
        parts = [self._normal(part) for part in np.split(elements, range(BLOCK, elements.size, BLOCK))]
        self.draws += 1
        return torch.from_numpy(np.concatenate(parts).reshape(shape))

    def _normal(self, elements: Words) -> NDArray[np.float32]:
        """The numbers of these elements in this draw."""
        counter = np.zeros((4, elements.size), np.uint64)
        counter[0], counter[2] = self.draws, elements
        x, y, _, _ = philox4x32(counter, np.array([[self.seed & 0xFFFFFFFF], [self.seed >> 32]], np.uint64))
        radius = np.sqrt(-2 * np.log((x + 0.5) / 2**32))  # Box and Muller (1958); half a word keeps it off log(0)
        normal: NDArray[np.float64] = radius * np.sin((y + 0.5) * (2 * math.pi / 2**32))
        return normal.astype(np.float32)

    def initial_seed(self) -> int:
        """The seed."""
        return self.seed

    def get_state(self) -> Tensor:
        """The seed and the number of draws, as 16 bytes: uint8 [16]."""
        return torch.from_numpy(np.array([self.seed, self.draws], np.uint64).view(np.uint8))

    def set_state(self, state: Tensor) -> None:
        """Go on where `get_state` was taken."""
        self.seed, self.draws = (int(word) for word in state.numpy().view(np.uint64))
