"""The stream of batches: nothing left out, nothing mixed, the same for any number of processes; and fair dice."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from ldm.data.order import STREAMS, Batch, Order, dice, interleaved, passes, shuffled
from ldm.errors import UsageError

MEMBERS = ((0, 3, 4, 7, 9), (1,), (2, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16))  # 17 samples in three buckets
PROMISED = [(2, (5, 15, 16)), (2, (8, 14, 2)), (2, (12, 10, 13)), (0, (4, 3, 7)), (2, (11, 6, 10)), (0, (9, 0, 7))]
PROMISED_ORDER = [7, 1, 0, 2, 5, 4, 6, 3]


def stream(order: Order, count: int) -> list[Batch]:
    return [order.batch(number) for number in range(count)]


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 16])
def test_batches_are_full_and_of_one_bucket(batch_size):
    for bucket, samples, prior in stream(Order(MEMBERS, batch_size), 60):
        assert len(samples) == batch_size and set(samples) <= set(MEMBERS[bucket]) and not prior


def test_every_sample_once_an_epoch():
    order = Order(MEMBERS, seed=3)
    assert [order.batches(epochs) for epochs in (0, 1, 2)] == [0, 17, 34]
    rounds = [[order.batch(17 * epoch + i).samples[0] for i in range(17)] for epoch in range(5)]
    assert all(sorted(samples) == list(range(17)) for samples in rounds)
    assert len({tuple(samples) for samples in rounds}) == 5  # each in an order of its own


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7, 16])
def test_samples_of_a_bucket_come_equally_often(batch_size):
    """To within one at any time; exactly after as many epochs as a batch has samples, whatever is left over before."""
    order = Order(MEMBERS, batch_size, seed=1)
    assert order.batches(batch_size) == 17
    counts: Counter[int] = Counter(dict.fromkeys(range(17), 0))
    for number in range(2 * 17):
        bucket, samples, _ = order.batch(number)
        counts.update(samples)
        often = [counts[sample] for sample in MEMBERS[bucket]]
        assert max(often) - min(often) <= 1
        if number + 1 in (17, 34):
            assert set(counts.values()) == {batch_size * (number + 1) // 17}


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_buckets_get_their_share_of_every_epoch(batch_size):
    order = Order(MEMBERS, batch_size)
    for epochs in range(1, 20):
        counts = Counter(batch.bucket for batch in stream(order, order.batches(epochs)))
        for bucket, members in enumerate(MEMBERS):
            assert 0 <= epochs * len(members) / batch_size - counts[bucket] < 1


def test_repeats():
    repeats = tuple(range(1, 18))
    order = Order(MEMBERS, seed=2, repeats=repeats)
    counts = Counter(batch.samples[0] for batch in stream(order, order.batches(1)))
    assert order.batches(1) == sum(repeats) and counts == {i: n for i, n in enumerate(repeats)}


def test_fewer_pictures_than_a_batch():
    order = Order(((0, 1, 2),), 8)
    assert [order.batches(epochs) for epochs in (1, 2, 3, 8)] == [0, 0, 1, 3]
    counts = [Counter(batch.samples) for batch in stream(order, 3)]
    assert sorted(counts[0].values()) == [2, 3, 3]
    assert sum(counts, Counter()) == {0: 8, 1: 8, 2: 8}


def test_turns_are_mixed():
    """The place of the lone sample among the 17 of its epoch is uniform."""
    order = Order(MEMBERS)
    places = [i for epoch in range(400) for i in range(17) if order.batch(17 * epoch + i).bucket == 1]
    assert len(places) == 400
    assert stats.chisquare(np.bincount(places, minlength=17)).pvalue > 1e-3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_stream_is_that_of_one_process(world_size):
    """Twelve passes a step, shared by any number of processes: the same samples in every step, none twice."""
    alone = stream(Order(MEMBERS, 2, seed=5), 60)
    for step in range(5):
        shares = [passes(step, rank, world_size, 12 // world_size) for rank in range(world_size)]
        assert sorted(number for share in shares for number in share) == list(range(12 * step, 12 * step + 12))
        each = [[Order(MEMBERS, 2, seed=5).batch(number) for number in share] for share in shares]
        assert [batch for row in zip(*each, strict=True) for batch in row] == alone[12 * step : 12 * step + 12]


def test_any_batch_can_be_the_first():
    """No state: batches asked for in any order, of orders made anew, are those of the stream."""
    straight = stream(Order(MEMBERS, 3, seed=8), 120)
    mixed = np.random.default_rng(0).permutation(120).tolist()
    assert {number: Order(MEMBERS, 3, seed=8).batch(number) for number in mixed} == dict(enumerate(straight))


def test_the_stream_is_a_promise():
    """A run is resumed by a later release, with a later numpy: these never change."""
    assert [(batch.bucket, batch.samples) for batch in stream(Order(MEMBERS, 3, seed=7), 6)] == PROMISED
    assert shuffled(8, 1, 2, 3, "order").tolist() == PROMISED_ORDER


def test_seeds_differ():
    streams = [[batch.samples for batch in stream(Order(MEMBERS, 2, seed=seed), 17)] for seed in range(20)]
    assert len({tuple(batches) for batches in streams}) == 20


def test_class_pictures_take_turns():
    own, prior = Order(((0, 1, 2),), 2, seed=1), Order(((0, 1), (2, 3, 4, 5)), 2, seed=2)
    batches = [interleaved(own, prior, number) for number in range(24)]
    assert [batch.prior for batch in batches] == [False, True] * 12
    assert [batch for batch in batches if not batch.prior] == stream(own, 12)
    assert [batch._replace(prior=False) for batch in batches if batch.prior] == stream(prior, 12)
    assert [interleaved(own, None, number) for number in range(12)] == stream(own, 12)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Order(()), "no samples"),
        (lambda: Order(((0,), ())), "a bucket without any"),
        (lambda: Order(MEMBERS, 0), "batch size is 0"),
        (lambda: Order(MEMBERS, repeats=(1, 0) + 15 * (1,)), "0 repeats"),
        (lambda: Order(MEMBERS, repeats=(1,) * 16), "16 repeats for 17 samples"),
        (lambda: passes(0, 2, 2), "process 2 of 2"),
        (lambda: dice(0, 2**32, 0), "step 4294967296"),
        (lambda: dice(0, 0, -1), "index -1"),
        (lambda: dice(0, 0, 0, "nose"), "did you mean 'noise'"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(UsageError, match=said):
        call()


# -- dice -------------------------------------------------------------------------------------------------------------


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, section 3.3: ten rounds of Philox4x64, with Python's whole numbers."""
    for _ in range(10):
        (high0, low0), (high1, low1) = (
            divmod(m * word, 2**64) for m, word in ((0xD2E7470EE14C6C93, counter[0]), (0xCA5A826395121157, counter[2]))
        )
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
    return counter


def test_dice_are_philox():
    """The known answers of the authors' Random123 (kat_vectors, philox4x64 10), then ours: numpy counts from 1."""
    answer = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64([0] * 4, [0] * 2) == answer
    for stream, number in STREAMS.items():
        for seed, step, index in ((0, 0, 0), (7, 3, 1), (2**63 + 5, 2**32 - 1, 2**32 - 1)):
            words = dice(seed, step, index, stream).bit_generator.random_raw(8).tolist()
            key = [seed, step * 2**32 + index]
            assert words == [w for count in (1, 2) for w in philox4x64([count, 0, 0, number], key)]


def test_dice_are_uniform():
    faces = np.array([dice(seed, step, i).random(4) for seed in range(4) for step in range(50) for i in range(10)])
    for column in faces.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.bincount((faces.ravel() * 16).astype(int), minlength=16)).pvalue > 1e-3


@pytest.mark.parametrize(
    "neighbour",
    [
        lambda seed, step, index: dice(seed + 1, step, index),
        lambda seed, step, index: dice(seed, step + 1, index),
        lambda seed, step, index: dice(seed, step, index + 1),
        lambda seed, step, index: dice(seed, index, step),
        lambda seed, step, index: dice(seed, step, index, "crop"),
    ],
    ids=["seed", "step", "index", "swapped", "stream"],
)
def test_dice_are_independent(neighbour):
    """First throws of neighbours fall into an 8 x 8 table as independent ones do; normal noise is uncorrelated."""
    at = [(seed, step, 100 + i) for seed in (0, 10) for step in range(0, 80, 2) for i in range(0, 40, 2)]
    pairs = np.array([(dice(*place).random(), neighbour(*place).random()) for place in at])
    counts = np.bincount((pairs * 8).astype(int) @ (8, 1), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-3
    one, other = (make(1, 2, 103).standard_normal(20_000) for make in (dice, neighbour))
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(20_000)


def test_every_order_is_as_likely():
    counts = Counter(tuple(shuffled(4, 0, epoch, 0, "order").tolist()) for epoch in range(2400))
    assert set(counts) == set(permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
