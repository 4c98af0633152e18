"""Which samples make which batch, and whose dice they throw: functions of numbers, so that no state need be kept.

The stream of batches does not depend on how many processes there are, nor on how often a run was interrupted: batch m
is computed from m. Step k of `world_size` processes that each accumulate over `accumulation` passes takes the next
world_size * accumulation batches (`passes`); as long as that product is the same, so is every step.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UsageError, choose

STREAMS = {"turns": 0, "order": 1, "caption": 2, "crop": 3, "noise": 4}
"""What dice are thrown for. Each has its own: where latents come from a cache and no crop is drawn, the noise stays."""

WORD = 2**32


def dice(seed: int, step: int, index: int, stream: str = "noise") -> np.random.Generator:
    """The dice of one sample: `step` is the number of its batch in the stream, `index` its place there.

    Philox with (seed, step, index) as its key and the stream in its counter (Salmon et al. 2011): keys that differ
    anywhere give independent numbers, and none is in use twice. seed: modulo 2^64. step, index: below 2^32, or
    UsageError.
    """
    if not (0 <= step < WORD and 0 <= index < WORD):
        raise UsageError(f"dice of step {step}, index {index}; both must be from 0 to {WORD - 1}")
    key = seed % 2**64 | (step * WORD + index) << 64
    return np.random.Generator(np.random.Philox(key=key, counter=STREAMS[choose("stream", stream, STREAMS)] << 192))


def shuffled(n: int, seed: int, step: int, index: int, stream: str) -> NDArray[np.intp]:
    """A permutation of 0 ... n - 1. From raw words, for numpy may change what its own shuffling draws."""
    return np.argsort(dice(seed, step, index, stream).bit_generator.random_raw(n), kind="stable")


@lru_cache(maxsize=128)  # batches are mostly asked for one after the other: each epoch is worked out once
def _epoch(n: int, seed: int, epoch: int, bucket: int) -> NDArray[np.intp]:
    return shuffled(n, seed, epoch, bucket, "order")


@lru_cache(maxsize=8)
def _turns(counts: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """The bucket of each batch of an epoch, in random order."""
    new = [(epoch + 1) * count // batch_size - epoch * count // batch_size for count in counts]
    row = np.repeat(np.arange(len(counts)), new)
    return row[shuffled(len(row), seed, epoch, 0, "turns")]


class Batch(NamedTuple):
    """Samples of one bucket. prior: they are class pictures, which keep what the model knows."""

    bucket: int
    samples: tuple[int, ...]
    prior: bool = False


@dataclass(frozen=True)
class Order:
    """The endless stream of batches of a data set; all are full, and none mixes buckets.

    members: the samples of each bucket (as Buckets has them). batch_size: of one pass through the network. repeats: how
    often each sample comes in an epoch; (): once each.

    Every bucket's epochs follow each other without a gap, each in an order of its own. What an epoch leaves over, less
    than a batch, is filled up with the bucket's next one. (kohya ends with a smaller batch, in which one sample counts
    for several.) So after any number of batches the samples of a bucket have come equally often, to within one; and
    after any number of epochs a bucket has had its share of them, to within a batch.
    """

    members: tuple[tuple[int, ...], ...]
    batch_size: int = 1
    seed: int = 0
    repeats: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"the batch size is {self.batch_size}; it must be at least 1")
        if min(self.repeats, default=1) < 1:
            raise UsageError(f"a sample with {min(self.repeats)} repeats; each must have at least 1")
        if not self.members or not all(self.members):
            raise UsageError("no samples, or a bucket without any; give at least one")
        if self.repeats and len(self.repeats) <= (last := max(map(max, self.members))):
            raise UsageError(f"{len(self.repeats)} repeats for {last + 1} samples; give one for each")

    @cached_property
    def queues(self) -> tuple[NDArray[np.intp], ...]:
        """The samples of each bucket, with their repeats."""
        rows = [np.array(samples, dtype=np.intp) for samples in self.members]
        return tuple(np.repeat(row, [self.repeats[i] for i in row]) if self.repeats else row for row in rows)

    def batches(self, epochs: int) -> int:
        """How many batches this many epochs have: those that can be filled."""
        return sum(epochs * len(queue) // self.batch_size for queue in self.queues)

    def batch(self, number: int) -> Batch:
        """Batch `number`, counted from 0 over all epochs."""
        total = sum(map(len, self.queues))
        late = (number + 1 + len(self.queues)) * self.batch_size // total + 2  # by then there are more batches
        epoch = bisect_right(range(late), number, key=self.batches) - 1
        place = number - self.batches(epoch)
        turns = _turns(tuple(map(len, self.queues)), self.batch_size, self.seed, epoch)
        bucket = int(turns[place])
        queue = self.queues[bucket]
        before = epoch * len(queue) // self.batch_size + int(np.count_nonzero(turns[:place] == bucket))
        spots = (divmod(before * self.batch_size + i, len(queue)) for i in range(self.batch_size))
        samples = (queue[_epoch(len(queue), self.seed, round, bucket)[spot]] for round, spot in spots)
        return Batch(bucket, tuple(map(int, samples)))


def interleaved(own: Order, prior: Order | None, number: int) -> Batch:
    """Batch `number` of a stream in which batches of the subject's pictures and of class pictures take turns, the
    subject's first (prior preservation, Ruiz et al. 2022, sec. 3.2). They have buckets of their own; an even number of
    passes makes each step half and half. prior None: the subject's alone.
    """
    if prior is None:
        return own.batch(number)
    half, is_prior = divmod(number, 2)
    return prior.batch(half)._replace(prior=True) if is_prior else own.batch(half)


def passes(step: int, rank: int = 0, world_size: int = 1, accumulation: int = 1) -> range:
    """The numbers of the batches that process `rank` of `world_size` puts through in step `step`.

    UsageError for a rank that is not below world_size.
    """
    if not 0 <= rank < world_size:
        raise UsageError(f"process {rank} of {world_size}; they are counted from 0")
    together = world_size * accumulation
    return range(step * together + rank, (step + 1) * together, world_size)
