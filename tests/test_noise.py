"""Noise: the GPU's numbers on the CPU, Brownian motion over noise levels, and runs that go on where they stood."""

import math
import pickle
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torchsde._brownian.brownian_interval as torchsde_interval
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

from ldm.brownian import Brownian
from ldm.errors import UsageError
from ldm.noise import SOURCES, Noise, generators, slerp
from ldm.philox import Philox, philox4x32

CPU = torch.device("cpu")
SHAPE = (4, 6, 10)
SEEDS = (7, 2**62 + 9, 0, 5)


# -- Philox ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # philox4x32 10 of kat_vectors, Random123 1.14
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_knows_the_published_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> np.ndarray:
        return np.array([[int(word, 16)] for word in text.split()], np.uint64)

    three = np.repeat(words(counter), 3, axis=1)
    assert (np.stack(philox4x32(three, words(key))) == words(expected)).all()
    assert (three == words(counter)).all() and list(scalar(counter, key)) == words(expected)[:, 0].tolist()


def scalar(counter: str, key: str) -> tuple[int, ...]:
    """Philox4x32-10 of one counter in whole numbers: equation by equation from section 3.3 of Salmon et al."""
    (l0, r0, l1, r1), (k0, k1) = (tuple(int(word, 16) for word in text.split()) for text in (counter, key))
    for _ in range(10):
        low, high = l0 * 0xD2511F53, l1 * 0xCD9E8D57
        l0, r0, l1, r1 = high >> 32 ^ r0 ^ k0, high % 2**32, low >> 32 ^ r1 ^ k1, low % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return l0, r0, l1, r1


def test_philox_draws_the_numbers_that_a1111_documents() -> None:
    published = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    drawn = Philox(0).randn((3, 4))
    assert drawn.dtype == torch.float32 and drawn.shape == (3, 4)
    np.testing.assert_allclose(drawn.numpy(), published, rtol=0, atol=1.2e-7)  # half a bit of 2.6 in float32


@pytest.mark.parametrize("seed", [1, 2**32 + 5, 2**63 + 12345])
def test_an_element_hangs_on_seed_draw_and_place_alone(seed: int) -> None:
    source, places = Philox(seed), (0, 1, 8191, 8192, 20_000)
    for draw in range(3):
        drawn = source.randn((3, 8000)).flatten()
        for place in places:
            x, y, *_ = scalar(f"{draw:x} 0 {place:x} 0", f"{seed % 2**32:x} {seed >> 32:x}")
            radius = math.sqrt(-2 * math.log((x + 0.5) / 2**32))
            assert float(drawn[place]) == pytest.approx(radius * math.sin(2 * math.pi * (y + 0.5) / 2**32), abs=3e-7)
    assert torch.equal(Philox(seed).randn((12_000,)), Philox(seed).randn((3, 8000)).flatten()[:12_000])


def test_philox_is_normal_and_its_draws_are_independent() -> None:
    n = 2**18
    source = Philox(3)
    x, y, z = source.randn((n,)).double(), source.randn((n,)).double(), Philox(4).randn((n,)).double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # of a unit normal
        for sample in (x, y, z):
            assert abs(float((sample**power).mean()) - expected) <= 4 * math.sqrt(variance / n)
    for a, b in ((x, y), (x, z), (x[1:], x[:-1]), (x[4096:], x[:-4096])):
        assert abs(float((a * b).mean())) <= 4 / math.sqrt(len(a))


@pytest.mark.cuda
def test_a_gpu_draws_the_same() -> None:
    theirs, ours = torch.Generator("cuda").manual_seed(2**40 + 3), Philox(2**40 + 3)
    for shape in ((4, 64, 64), (3, 5), (4, 64, 64)):  # one thread for each element on any GPU
        gap = (torch.randn(shape, generator=theirs, device="cuda").cpu() - ours.randn(shape)).abs()
        assert gap.max() <= 5e-4 and gap.median() <= 1e-6  # theirs rounds u to float32, and log(u) near 1 shows it


# -- every source ------------------------------------------------------------------------------------------------------

Drawer = Callable[[Sequence[int]], Any]


def sequential(source: str) -> Drawer:
    return lambda seeds: Noise(generators(None, seeds, source), SHAPE, CPU)


def brownian(source: str) -> Drawer:
    return lambda seeds: Brownian(seeds, SHAPE, CPU, 0.03, 14.6, source)


MAKERS = {f"{make.__name__}-{source}": make(source) for make in (sequential, brownian) for source in SOURCES}
EVERY = pytest.mark.parametrize("drawer", MAKERS.values(), ids=MAKERS)
STEPS = ((14.6, 9.0), (9.0, 3.5), (9.0, 1.25), (3.5, 0.03))


@EVERY
def test_an_image_draws_the_same_alone_and_among_others(drawer: Drawer) -> None:
    together, turned = drawer(SEEDS), drawer(SEEDS[::-1])
    alone = [drawer((seed,)) for seed in SEEDS]
    for step in STEPS:
        drawn = together(*step)
        assert drawn.shape == (4, *SHAPE) and drawn.dtype == torch.float32
        assert torch.equal(drawn, turned(*step).flip(0))
        assert torch.equal(drawn, torch.cat([one(*step) for one in alone]))
        assert len(set(drawn[:, 0, 0, 0].tolist())) == 4


@EVERY
def test_a_pickled_run_goes_on_with_the_same_bits(drawer: Drawer) -> None:
    begun = drawer(SEEDS)
    for step in STEPS[:2]:
        begun(*step)
    held = pickle.dumps(begun.state())
    assert len(held) <= 4 * 5200
    expected = [begun(*step) for step in STEPS[2:]]
    later = drawer(SEEDS)
    later(*STEPS[0])
    for noise in (later, begun):  # in another process, and back in this one
        noise.restore(pickle.loads(held))
        assert all(torch.equal(noise(*step), drawn) for step, drawn in zip(STEPS[2:], expected, strict=True))


@pytest.mark.parametrize("source", SOURCES)
def test_a_shared_generator_is_held_once(source: str) -> None:
    shared, own = generators(None, (1, 2), source)
    noise = Noise([*generators(shared, (0, 0)), own], SHAPE, CPU)
    noise()
    state = noise.state()
    expected = noise(), noise()
    assert len(state) == 2 and not torch.equal(expected[0][0], expected[0][1])
    noise.restore(state)
    assert all(torch.equal(noise(), drawn) for drawn in expected)
    with pytest.raises(ValueError):
        Noise([own], SHAPE, CPU).restore(state)
    with pytest.raises((ValueError, RuntimeError)):
        Noise(generators(None, (1, 2), next(name for name in SOURCES if name != source)), SHAPE, CPU).restore(state)


def test_sources_are_torch_and_philox() -> None:
    drawn = {source: Noise(generators(None, SEEDS, source), SHAPE, CPU) for source in SOURCES}
    for _ in range(2):
        given = {source: noise(5.0, 2.0) for source, noise in drawn.items()}
    for seed, mersenne, gpu in zip(SEEDS, given["cpu"], given["gpu"], strict=True):
        torch_, philox = torch.Generator().manual_seed(seed), Philox(seed)
        assert torch.equal(mersenne, [torch.randn(SHAPE, generator=torch_) for _ in range(2)][1])
        assert torch.equal(gpu, [philox.randn(SHAPE) for _ in range(2)][1])
    for make in (lambda: generators(None, SEEDS, "gpus"), lambda: Brownian(SEEDS, SHAPE, CPU, 0, 1, "gpus")):
        with pytest.raises(UsageError, match="unknown noise source 'gpus'; did you mean 'gpu'"):
            make()


@pytest.mark.parametrize("source", SOURCES)
def test_a_variation_is_unit_noise_that_turned_towards_the_other(source: str) -> None:
    """Independent noises stand at right angles, up to 1 / sqrt(n): 4 standard errors."""
    a, b = (Noise(generators(None, seeds, source), (4, 64, 64), CPU)() for seeds in ((1, 2), (3, 4)))
    for one, other, mixed in zip(a, b, slerp(a, b, 0.3), strict=True):
        n, turn = mixed.numel(), 0.3 * math.pi / 2
        assert abs(float(mixed.std()) - 1) <= 4 / math.sqrt(2 * n)
        for noise, share in ((one, math.cos(turn)), (other, math.sin(turn))):
            assert abs(float((mixed * noise).mean()) - share) <= 4 * math.sqrt((1 + share**2) / n)


# -- Brownian motion ---------------------------------------------------------------------------------------------------

RANGES = [(0.0291675, 14.614642), (0.002, 80.0), (0.1, 700.5), (0.0, 1.0)]


def intervals(low: float, high: float, count: int) -> list[tuple[float, float]]:
    """Intervals that overlap, in both directions and no order; the ends and the middle of the whole among them."""
    rng = random.Random(count)
    points = [low, high, (low + high) / 2, low + 2e-6, *(rng.uniform(low, high) for _ in range(12))]
    return [(low, high), (high, low), *((a, b) for a, b in (rng.sample(points, 2) for _ in range(count)))]


@pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # theirs, where an end lies outside the rounded ends
@pytest.mark.parametrize(("low", "high", "source"), [*((*ends, "cpu") for ends in RANGES), (*RANGES[0], "gpu")])
def test_brownian_has_the_bits_of_torchsde(
    monkeypatch: pytest.MonkeyPatch, low: float, high: float, source: str
) -> None:
    if source == "gpu":  # what A1111 does to torchsde with its "NV"
        monkeypatch.setattr(
            torchsde_interval, "_randn", lambda size, dtype, device, seed: Philox(int(seed)).randn(size)
        )
    ours = Brownian(SEEDS, SHAPE, CPU, low, high, source)
    theirs = BrownianTreeNoiseSampler(torch.zeros(4, *SHAPE), low, high, SEEDS)
    for step in intervals(low, high, 20 if source == "cpu" else 8):
        assert torch.equal(ours(*step), theirs(*step)), step


def test_one_seed_of_diffusers_is_one_image() -> None:
    theirs = BrownianTreeNoiseSampler(torch.zeros(1, *SHAPE), 0.03, 14.6, 11)
    assert torch.equal(Brownian([11], SHAPE, CPU, 0.03, 14.6)(9.5, 2.25), theirs(9.5, 2.25))


def test_a_level_just_outside_counts_as_the_end() -> None:
    low, high = 0.0291675, 14.614642
    ours = Brownian([1], SHAPE, CPU, low, high)
    theirs = BrownianTreeNoiseSampler(torch.zeros(1, *SHAPE), low, high, [1])
    for step in ((5.0, low * (1 - 1e-4)), (high * (1 + 1e-6), 5.0), (high + 2e-4, high + 1e-4)):
        with pytest.warns(UserWarning, match="Should have t"):
            expected = theirs(*step)
        assert torch.equal(ours(*step), expected)
    for step in ((math.inf, 0.0), (5.0, 0.0), (20.0, 5.0), (5.0, math.nan)):
        with pytest.raises(ValueError, match="the path goes from"):
            ours(*step)


def test_no_step_has_no_noise() -> None:
    path = Brownian([1, 2], SHAPE, CPU, 0.03, 14.6)
    for step in ((5.0, 5.0), (5.0, 5.0000004), (14.6, 14.6)):
        assert torch.equal(path(*step), torch.zeros(2, *SHAPE))
    assert torch.equal(Brownian([1], SHAPE, CPU, 2.0, 2.0)(2.0, 2.0), torch.zeros(1, *SHAPE))  # a run of one step


@pytest.mark.parametrize("source", SOURCES)
def test_an_interval_has_the_same_bits_in_any_order(source: str) -> None:
    steps = intervals(0.03, 14.6, 8)
    path = Brownian([3], SHAPE, CPU, 0.03, 14.6, source)
    expected = [path(*step) for step in steps]
    assert len(path._lefts) <= 2 * 25  # what two points need, however many steps were asked for
    for index in [*reversed(range(len(steps))), 0, 5, 5]:
        assert torch.equal(path(*steps[index]), expected[index])
        assert torch.equal(Brownian([3], SHAPE, CPU, 0.03, 14.6, source)(*steps[index]), expected[index])
        assert torch.equal(path(*steps[index][::-1]), -expected[index])


def test_parts_of_a_step_add_up_to_it() -> None:
    path, levels = Brownian(SEEDS, SHAPE, CPU, 0.03, 14.6), (14.6, 11.0, 4.7, 4.69, 0.5, 0.03)
    rises = [path(a, b) * math.sqrt(a - b) for a, b in pairwise(levels)]
    for i in range(len(levels)):
        for j in range(i + 1, len(levels)):
            whole = path(levels[i], levels[j]) * math.sqrt(levels[i] - levels[j])
            torch.testing.assert_close(sum(rises[i:j]), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_brownian_motion_is_one(source: str) -> None:
    """Cov(W(b) - W(a), W(d) - W(c)) is the length that the two intervals share: over all pairs, 4 standard errors."""
    path = Brownian(range(8), (4, 32, 32), CPU, 0.03, 14.6, source)
    steps = [(14.6, 11.0), (11.0, 4.7), (12.0, 6.0), (6.0, 5.999), (4.7, 0.03), (14.6, 0.03), (1.0, 0.1)]
    drawn = torch.stack([path(*step).flatten() for step in steps]).double()
    n = drawn.shape[1]
    assert (drawn.mean(1).abs() <= 4 / math.sqrt(n)).all()
    for i, (a, b) in enumerate(steps):
        for j, (c, d) in enumerate(steps):
            shared = max(0.0, min(a, c) - max(b, d)) / math.sqrt((a - b) * (c - d))
            error = math.sqrt((1 + shared**2) / n)  # of the mean product of two unit normals with this correlation
            assert abs(float((drawn[i] * drawn[j]).mean()) - shared) <= 4 * error, (steps[i], steps[j])
