"""All state of a run is in its call: runs stop, are pickled and go on; they share nothing; their calls are counted."""

import math
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from solving import SD15, UNIT, field, network, never, stream
from torch import Tensor

from ldm.diffusion import PREDICTIONS, Denoiser, Estimate, NoiseSchedule, c_in
from ldm.errors import UsageError
from ldm.schedulers import SCHEDULERS, Option, Scheduler, Step, from_config

pytestmark = pytest.mark.usefixtures("one_thread")
SD = NoiseSchedule.scaled_linear()
ROWS = [pytest.param(row, id=name) for name, row in SCHEDULERS.items()]
LONG = (14.6, 9.0, 5.0, 3.2, 1.7, 0.9, 0.5)  # ends above 0
SHORT = (*LONG, 0.0)
NAN = torch.full_like(UNIT, math.nan)
# what has more state than the rows as they stand
LONGEST: list[tuple[str, dict[str, Option]]] = [
    ("unipc", {"solver_order": 4}), ("lms", {"order": 4}), ("plms", {"skip_prk_steps": False}),
    ("deis", {"solver_order": 3}), ("ddpm", {"variance_type": "learned_range"}),
]  # fmt: skip


def denoise(x: Tensor, sigma: float) -> Estimate:
    output = network(x * c_in(sigma), float(SD.t(sigma)))
    return Estimate(PREDICTIONS["v_prediction"].to_x0(x, sigma, output), output.tanh())


def counted(inner: Denoiser) -> tuple[Denoiser, list[float]]:
    levels: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Estimate:
        levels.append(sigma)
        return inner(x, sigma)

    return denoise, levels


def equal(a: Step, b: Step) -> bool:
    tensors = [(a.x, b.x), (a.x0, b.x0), *((p.x, q.x) for p, q in zip(a.past, b.past, strict=True))]
    tensors += [(p.x0, q.x0) for p, q in zip(a.past, b.past, strict=True)]
    numbers = (a.index, a.sigma, a.calls, [p.sigma for p in a.past]) == (
        b.index, b.sigma, b.calls, [p.sigma for p in b.past]
    )  # fmt: skip
    return numbers and all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize(
    ("row", "options"), [(row, {}) for row in SCHEDULERS.values()] + [(SCHEDULERS[n], o) for n, o in LONGEST]
)
def test_a_run_goes_on_from_any_pickled_step_with_the_same_bits(row: Scheduler, options: dict[str, Option]) -> None:
    solver = row.bound(options, SD)
    steps = list(solver(denoise, UNIT * SHORT[0], SHORT, field, None))
    assert [step.index for step in steps] == list(range(7)) and [step.sigma for step in steps] == list(SHORT[1:])
    begins = [UNIT * SHORT[0], *(step.x for step in steps)]
    for k, step in enumerate(steps):
        assert step.past[0].sigma == SHORT[k] and torch.equal(step.past[0].x0, step.x0)
        assert row.name.startswith("unipc") or torch.equal(step.past[0].x, begins[k])  # it corrects x where it stands
        kept = pickle.loads(pickle.dumps(step))
        again = list(solver(denoise, NAN, SHORT, field, kept))
        assert len(again) == 6 - k and all(map(equal, again, steps[k + 1 :]))


@pytest.mark.parametrize("row", ROWS)
def test_interleaved_runs_share_nothing_and_write_to_no_tensor(row: Scheduler) -> None:
    solver = row.bound({}, SD)

    def begin(seed: int) -> Iterator[Step]:
        return solver(denoise, UNIT * (1 + seed) * LONG[0], LONG, stream(seed=seed), None)

    alone = [list(begin(0)), list(begin(1))]
    snapshots = [[pickle.loads(pickle.dumps(step)) for step in steps] for steps in alone]
    for first, second, a, b in zip(begin(0), begin(1), *alone, strict=True):
        assert equal(first, a) and equal(second, b)
    for steps, kept in zip(alone, snapshots, strict=True):
        assert all(map(equal, steps, kept))
    assert not equal(alone[0][-1], alone[1][-1])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_calls_are_counted_and_known_beforehand(row: Scheduler, n: int) -> None:
    for to_zero in (True, False):
        sigmas = (*LONG[:n], 0.0) if to_zero else (*LONG[:n], 0.3)
        counter, levels = counted(denoise)
        done = 0
        for step in row.bound({}, SD)(counter, UNIT * LONG[0], sigmas, field, None):
            assert step.calls == len(levels) > done
            done = step.calls
        assert done == row.network_calls(n, to_zero)
        assert set(sigmas[:n]) <= set(levels) and min(levels) > 0


@pytest.mark.parametrize("row", ROWS)
def test_steps_within_a_budget_are_the_most(row: Scheduler) -> None:
    for nfe in range(1, 41):
        n = row.steps_within(nfe)
        assert n == 1 or row.network_calls(n) <= nfe
        assert row.network_calls(n + 1) > nfe
    with pytest.raises(UsageError, match="nfe is 0; it must be at least 1"):
        row.steps_within(0)


@pytest.mark.parametrize("row", ROWS)
def test_every_solver_keeps_its_dtype(row: Scheduler) -> None:
    def noise(dtype: torch.dtype) -> Callable[[float, float], Tensor]:
        return lambda sigma, sigma_next: field(sigma, sigma_next).to(dtype)

    ends = []
    for dtype in (torch.float64, torch.float32):
        x = (UNIT * LONG[0]).to(dtype)
        steps = list(row.bound({}, SD)(denoise, x, SHORT, noise(dtype), None))
        assert all(step.x.dtype == step.x0.dtype == dtype for step in steps)
        ends.append(steps[-1].x)
    torch.testing.assert_close(ends[0].float(), ends[1], rtol=0, atol=1e-5)


# two extrapolate to 0 too; TCD never runs to it
@pytest.mark.parametrize("row", [row for name, row in SCHEDULERS.items() if name not in ("lms", "plms", "tcd")])
def test_a_run_to_0_ends_on_what_the_network_says(row: Scheduler) -> None:
    (*_, last) = row.bound({}, SD)(denoise, UNIT * LONG[0], SHORT, field, None)
    torch.testing.assert_close(last.x, last.x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_a_step_of_no_length_leaves_x_where_it_is(row: Scheduler) -> None:
    """As the last of EDM's schedulers, whose lowest level is there twice."""
    sigmas = (*LONG, LONG[-1])
    options: dict[str, Option] = {"solver_type": "heun"} if "algorithm_type" in row.options else {}
    (*_, before, last) = row.bound(options, SD)(denoise, UNIT * LONG[0], sigmas, field, None)
    x = last.past[0].x if row.name.startswith("unipc") else before.x  # where UniPC corrected it to
    if row.name in ("lcm", "tcd", "dpm++1s", "dpm++2s", "dpm++3s"):  # these begin anew, or go on from an earlier step
        assert last.x.isfinite().all()
    else:
        torch.testing.assert_close(last.x, x, rtol=0, atol=2e-5)


def test_latents_are_in_the_networks_frame() -> None:
    assert torch.equal(Step(0, 1.0, UNIT, UNIT, 1, scale=0.25).latents, UNIT / 4)
    assert torch.equal(Step(0, 1.0, UNIT, UNIT, 1).latents, UNIT)


@pytest.mark.parametrize("row", ROWS)
def test_noise_is_drawn_by_those_that_say_so_and_level_by_level(row: Scheduler) -> None:
    asked: list[tuple[float, float]] = []

    def noise(sigma: float, sigma_next: float) -> Tensor:
        asked.append((sigma, sigma_next))
        return field(sigma, sigma_next)

    drawn = noise if row.noise else never
    list(row.bound({"eta": 0.5} if "eta" in row.options else {}, SD)(denoise, UNIT * LONG[0], SHORT, drawn, None))
    if row.name == "dpm++sde":
        middles = [math.sqrt(a * b) for a, b in pairwise(LONG)]
        assert asked == [pair for a, b, m in zip(LONG, LONG[1:], middles, strict=False) for pair in ((a, m), (a, b))]
    elif row.noise and not row.name.endswith("s"):  # singlestep draws only for its SDE
        assert asked == list(pairwise(LONG))
    else:
        assert asked == []


@pytest.mark.parametrize("name", [name for name, row in SCHEDULERS.items() if "eta" in row.options])
def test_no_noise_is_drawn_at_eta_0(name: str) -> None:
    list(SCHEDULERS[name].bound({"eta": 0.0}, SD)(denoise, UNIT * LONG[0], SHORT, never, None))


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("name", [name for name, row in SCHEDULERS.items() if "eta" in row.options])
def test_eta_out_of_range_is_refused_before_the_first_step(name: str, bad: float) -> None:
    with pytest.raises(UsageError, match="from 0"):
        SCHEDULERS[name].bound({"eta": bad}, SD)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ddpm", {"variance_type": "fixed_smal"}, "did you mean 'fixed_small'"),
        ("dpm++2m", {"solver_order": 4}, "solver_order is 4; DPM-Solver has orders 1, 2 and 3"),
        ("dpm++2m", {"solver_type": "mid"}, "unknown solver_type 'mid'"),
        ("dpm++2m", {"algorithm_type": "dpmsolver+++"}, r"did you mean 'dpmsolver\+\+'"),
        ("dpm++2s", {"solver_order": 0}, "solver_order is 0"),
        ("unipc", {"solver_order": 5}, "solver_order is 5; UniPC has orders 1 to 4"),
        ("unipc", {"solver_type": "bh3"}, "unknown solver_type 'bh3'"),
        ("euler", {"eta": 1.0}, "'eta' is not an option of the scheduler euler; it takes no options"),
        ("ddim", {"order": 1}, "'order' is not an option of the scheduler ddim; it takes eta"),
    ],
)
def test_options_that_do_not_exist_are_refused(name: str, options: dict[str, Option], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SCHEDULERS[name].bound(options, SD)


def test_equalities_between_solvers() -> None:
    def end(name: str, **options: Option) -> Tensor:
        (*_, last) = SCHEDULERS[name].bound(options, SD)(denoise, UNIT * LONG[0], SHORT, stream(), None)
        return last.x

    assert torch.equal(end("ddim"), end("euler"))
    assert torch.equal(end("ddim", eta=1.0), end("euler_a"))
    assert torch.equal(end("euler_a", eta=0.0), end("euler"))
    same = [("ddpm", "euler_a"), ("dpm++1", "ddim"), ("dpm++1s", "dpm++1"), ("dpm++1_sde", "ddpm")]
    for one, other in same:
        torch.testing.assert_close(end(one), end(other), rtol=0, atol=1e-5)
    torch.testing.assert_close(end("tcd", eta=0.0), end("ddim"), rtol=0, atol=1e-6)
    torch.testing.assert_close(end("lms", order=1), end("euler"), rtol=0, atol=1e-5)
    torch.testing.assert_close(end("deis", solver_order=1), end("euler"), rtol=0, atol=1e-5)
    torch.testing.assert_close(end("ddpm", variance_type="fixed_small_log"), end("ddpm"), rtol=0, atol=0)
    assert not torch.allclose(end("ddpm", variance_type="fixed_large"), end("ddpm"), atol=1e-2)


def test_a_scheduler_of_a_config_has_eta_where_it_has_one() -> None:
    sampling = from_config(SD15 | {"_class_name": "EulerDiscreteScheduler"})
    with pytest.raises(UsageError, match=r"eta is 0.5, but euler has none; use one of ddim, euler_a, .*tcd"):
        sampling.solver(0.5)
