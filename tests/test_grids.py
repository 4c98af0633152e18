"""Grids of noise levels against scipy, diffusers in the same process, numbers of k-diffusion and closed forms."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers import AysSchedules

from ldm.diffusion.grids import AYS, GRIDS, beta_quantile, find_grid, grid
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UsageError

pytestmark = [  # of diffusers
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

SD = NoiseSchedule.scaled_linear()
SIGMAS = SD.sigmas
LOW, HIGH = float(SIGMAS[0]), float(SIGMAS[-1])
THEIR_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def on_sd(name: str, n: int, **more: Any) -> np.ndarray:
    return grid(name, n, LOW, HIGH, SD, **more)


def close(ours: np.ndarray, theirs: Any, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=rtol, atol=0)


# The quantiles of the beta distribution.


def test_quantiles_are_those_of_scipy() -> None:
    q = np.concatenate([np.linspace(0, 1, 2001), 10.0 ** -np.arange(1, 20), 1 - 10.0 ** -np.arange(1, 16)])
    for a in (0.25, 0.6, 0.9):
        np.testing.assert_allclose(beta_quantile(q, a), scipy.stats.beta.ppf(q, a, a), rtol=0, atol=1e-14)
    small = 10.0 ** -np.arange(1, 20)
    close(beta_quantile(small, 0.6), scipy.stats.beta.ppf(small, 0.6, 0.6), 1e-12)


def test_quantiles_have_their_closed_forms() -> None:
    q = np.linspace(0, 1, 101)
    np.testing.assert_allclose(beta_quantile(q, 1.0), q, rtol=0, atol=1e-15)  # the uniform distribution
    np.testing.assert_allclose(beta_quantile(q, 0.5), np.sin(np.pi * q / 2) ** 2, rtol=0, atol=1e-15)  # the arcsine


# diffusers.

SWITCHES = [
    (EulerDiscreteScheduler, "use_karras_sigmas", "_convert_to_karras"),
    (EulerDiscreteScheduler, "use_exponential_sigmas", "_convert_to_exponential"),
    (EulerDiscreteScheduler, "use_beta_sigmas", "_convert_to_beta"),
    (DPMSolverMultistepScheduler, "use_lu_lambdas", "_convert_to_lu"),
]


@pytest.mark.parametrize(("kind", "field", "convert"), SWITCHES)
@pytest.mark.parametrize("n", [1, 2, 5, 20, 73])
def test_diffusers_lays_out_the_same_levels(kind: Any, field: str, convert: str, n: int) -> None:
    (row,) = (row for row in GRIDS.values() if row.field == field)
    scheduler, ends = kind(**THEIR_BETAS, **{field: True}), np.array([HIGH, LOW])
    given = np.log(ends) if row.name == "lu" else ends
    theirs = getattr(scheduler, convert)(given, n)
    close(on_sd(row.name, n), np.exp(theirs) if row.name == "lu" else theirs)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_eulers_range_is_what_its_spacing_visits_and_its_timesteps_are_fractional(name: str, spacing: str) -> None:
    theirs = EulerDiscreteScheduler(**THEIR_BETAS, timestep_spacing=spacing, **{GRIDS[name].field: True})
    plain = EulerDiscreteScheduler(**THEIR_BETAS, timestep_spacing=spacing)
    theirs.set_timesteps(12)
    plain.set_timesteps(12)
    ours = grid(name, 12, float(plain.sigmas[-2]), float(plain.sigmas[0]), SD)
    close(ours, theirs.sigmas[:-1].tolist(), 3e-7)  # theirs are float32
    np.testing.assert_allclose(SD.t(ours), theirs.timesteps.tolist(), rtol=0, atol=1e-3)  # of 1000


@pytest.mark.parametrize(("name", "rounded"), [("karras", True), ("lu", True), ("exponential", False), ("beta", False)])
def test_dpm_solvers_range_is_what_was_trained_and_its_timesteps_are_whole(name: str, rounded: bool) -> None:
    theirs = DPMSolverMultistepScheduler(**THEIR_BETAS, timestep_spacing="leading", **{GRIDS[name].field: True})
    theirs.set_timesteps(12)
    ours = on_sd(name, 12)
    close(ours, theirs.sigmas[:-1].tolist(), 2e-5)  # the ends are float32 products of a thousand terms
    times = SD.t(ours)[1:-1]  # at the very ends a last bit decides what is cut off
    assert theirs.timesteps[1:-1].tolist() == (np.round(times) if rounded else np.floor(times)).tolist()


@pytest.mark.parametrize(("xl", "name"), [(False, "StableDiffusionSigmas"), (True, "StableDiffusionXLSigmas")])
def test_ays_visits_the_published_levels_in_ten_steps(xl: bool, name: str) -> None:
    close(on_sd("ays", 10, xl=xl), AysSchedules[name][:-1])
    close(on_sd("align_your_steps", 11, xl=xl), [*AysSchedules[name][:-1], 0.029])


@pytest.mark.parametrize("n", [2, 5, 10, 20, 25])
def test_ddim_uniform_visits_the_leading_times_with_offset_1_where_n_divides_the_schedule(n: int) -> None:
    theirs = DDIMScheduler(**THEIR_BETAS, timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(n)
    close(on_sd("ddim_uniform", n), SIGMAS[theirs.timesteps.numpy()])


# k-diffusion 0.1.1, run once in float64 on SD's sigmas: get_sigmas_NAME(5, LOW, HIGH) for the first three;
# DiscreteSchedule(sigmas, quantize=False).get_sigmas(5) for uniform; t_to_sigma of linspace(999, 0, 6)[:-1] for
# sgm_uniform, and of linspace(sigma_to_t(10), sigma_to_t(0.1), 5) for the narrowed normal.
K_DIFFUSION = [
    ("karras", (LOW, HIGH), [14.6146412293, 4.7965348271, 1.274100209, 0.2479499027, 0.0291671582]),
    ("exponential", (LOW, HIGH), [14.6146412293, 3.0889768103, 0.6528916848, 0.1379963587, 0.0291671582]),
    ("polyexponential", (LOW, HIGH), [14.6146412293, 3.0889768103, 0.6528916848, 0.1379963587, 0.0291671582]),
    ("uniform", (0.1, 10), [14.6146412293, 4.0860810712, 1.6155802602, 0.6951495191, 0.0291671582]),
    ("normal", (LOW, HIGH), [14.6146412293, 4.0860810712, 1.6155802602, 0.6951495191, 0.0291671582]),
    ("normal", (0.1, 10), [10.0, 3.3710113599, 1.474403906, 0.673049311, 0.1]),
    ("sgm_uniform", (LOW, HIGH), [14.6146412293, 5.0924078743, 2.2797304948, 1.1628645574, 0.5711888739]),
]


@pytest.mark.parametrize(("name", "ends", "levels"), K_DIFFUSION)
def test_numbers_of_k_diffusion(name: str, ends: tuple[float, float], levels: list[float]) -> None:
    close(grid(name, 5, *ends, SD), levels, 2e-7 if "schedule" in GRIDS[name].needs else 1e-8)  # its times are float32


def test_published_karras_levels() -> None:
    published = "14.614641 9.102928 5.478392 3.168603 1.749417 0.914072 0.446918 0.201398 0.081910 0.029167"
    assert [f"{level:.6f}" for level in on_sd("karras", 10)] == published.split()


# Closed forms.


@pytest.mark.parametrize("n", [3, 9, 27, 37, 111])  # divisors of 999: all times are whole
def test_times_evenly_apart(n: int) -> None:
    times = np.linspace(999, 0, n + 1).round().astype(int)
    close(on_sd("sgm_uniform", n), SIGMAS[times[:-1]])
    close(on_sd("normal", n + 1), SIGMAS[times])
    close(on_sd("uniform", n + 1), SIGMAS[times])


@pytest.mark.parametrize("n", [1, 7, 10, 30, 49, 999, 1000])
def test_simple_takes_entries_of_the_table_from_the_top(n: int) -> None:
    assert on_sd("simple", n).tolist() == [SIGMAS[999 - i * 1000 // n] for i in range(n)]


@pytest.mark.parametrize("n", [7, 30, 600, 999])
def test_ddim_uniform_has_n_levels_from_near_the_top_also_where_n_does_not_divide(n: int) -> None:
    levels = on_sd("ddim_uniform", n).tolist()
    assert levels[-1] == SIGMAS[1] and set(levels) <= set(SIGMAS)
    gaps = -np.diff(SD.t(np.array(levels))).round(6)
    assert {*gaps} <= {1000 // n, 1000 // n + 1}, "as even as whole times allow"
    assert 1000 - SD.t(levels[0]) <= 1000 // n + 1


@pytest.mark.parametrize("n", [1, 2, 11, 64])
def test_kl_optimal_is_even_in_arctan_and_its_run_ends_at_the_lowest_level(n: int) -> None:
    run = np.append(on_sd("kl_optimal", n), LOW)
    np.testing.assert_allclose(np.diff(np.arctan(run)), (math.atan(LOW) - math.atan(HIGH)) / n, rtol=0, atol=1e-13)
    assert [row.name for row in GRIDS.values() if row.final == "sigma_min"] == ["kl_optimal"]


@pytest.mark.parametrize("xl", [False, True])
def test_align_your_steps_between_its_published_levels_is_their_geometric_mean(xl: bool) -> None:
    table = np.array(AYS[xl])
    levels = on_sd("align_your_steps", 21, xl=xl)
    close(levels[::2], table)
    close(levels[1::2], np.sqrt(table[1:] * table[:-1]))
    close(on_sd("ays", 20, xl=xl), levels[:-1])


# What holds of all.


@pytest.mark.parametrize("schedule", [SD, NoiseSchedule.squaredcos_cap_v2(), NoiseSchedule.linear(1e-4, 0.02, 250)])
@pytest.mark.parametrize("name", GRIDS)
def test_levels_fall_strictly_for_every_count(name: str, schedule: NoiseSchedule) -> None:
    low, high = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    ends = {"lowest visited": set[bool](), "highest visited": set[bool]()}
    for n in range(1, 201):
        levels = grid(name, n, low, high, schedule)
        assert levels.dtype == np.float64 and levels.shape == (n,)
        assert np.isfinite(levels).all() and (levels > 0).all() and (np.diff(levels) < 0).all()
        if n > 1:
            ends["lowest visited"].add(math.isclose(levels[-1], low, rel_tol=1e-9))
            ends["highest visited"].add(math.isclose(levels[0], high, rel_tol=1e-9))
    if name not in ("ays", "align_your_steps"):  # made for SD alone
        assert ends["lowest visited"] == {name not in ("sgm_uniform", "simple", "ddim_uniform", "kl_optimal")}
        assert name == "ddim_uniform" or ends["highest visited"] == {True}


@pytest.mark.parametrize("name", GRIDS)
def test_one_step_begins_at_the_highest_level(name: str) -> None:
    assert on_sd(name, 1).tolist() == pytest.approx([HIGH], rel=3e-5)  # Align Your Steps is published to 0.001
    single = NoiseSchedule.trained([0.5])
    assert "xl" in GRIDS[name].needs or grid(name, 1, 1.0, 1.0, single).tolist() == pytest.approx([1.0])


def test_rounding_does_not_leave_the_range_nor_the_table() -> None:
    for low, high in np.exp(np.random.default_rng(3).uniform(-6, 5, (60, 2))):
        low, high = sorted((float(low), float(high)))
        for name, row in GRIDS.items():
            if row.needs == ("sigma_min", "sigma_max"):
                levels = grid(name, 7, low, high, None)
                assert levels[0] <= high and levels[-1] >= low, (name, low, high)
    assert set(on_sd("normal", 1000)) == set(on_sd("uniform", 1000)) == set(SIGMAS)


def test_a_range_is_enough_where_no_schedule_is_needed() -> None:
    for name, row in GRIDS.items():
        if "schedule" not in row.needs:
            assert len(grid(name, 8, 0.002, 80.0, None)) == 8
        else:
            with pytest.raises(UsageError, match=f"{name} is laid out on a trained schedule.*; take karras, "):
                grid(name, 8, 0.002, 80.0, None)


REFUSED = [
    (("simple", 1001, LOW, HIGH, SD), "1001 steps do not fit the grid simple on these noise levels; at most 1000 do"),
    (("DDIM", 1000, LOW, HIGH, SD), "1000 steps do not fit the grid ddim_uniform .* at most 999 do"),
    (("simple", 5000, LOW, HIGH, SD), "at most 1000 do"),
    (("karras", 0, LOW, HIGH, SD), "0 steps were asked for; a run has at least 1"),
    (("karras", 2, 1.0, 1.0, SD), "2 steps do not fit the grid karras .* at most 1 do"),
    (("karras", 5, 2.0, 1.0, SD), "noise levels from 1.0 to 2.0 are no range"),
    (("karras", 5, 0.0, 1.0, SD), "no range"),
    (("exponential", 5, LOW, math.inf, SD), "noise levels from inf to"),
    (("karas", 5, LOW, HIGH, SD), "unknown grid of noise levels 'karas'; did you mean 'karras'"),
]


@pytest.mark.parametrize(("order", "said"), REFUSED)
def test_refusals(order: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        grid(*order)


LABELS = {  # A1111's
    "Karras": "karras", "Exponential": "exponential", "Polyexponential": "polyexponential", "Uniform": "uniform",
    "SGM Uniform": "sgm_uniform", "KL Optimal": "kl_optimal", "Align Your Steps": "align_your_steps", "Beta": "beta",
    "Simple": "simple", "Normal": "normal", "DDIM": "ddim_uniform", "SGMUniform": "sgm_uniform",
}  # fmt: skip


def test_names_are_found_in_any_case_and_mean_one_grid() -> None:
    for label, name in LABELS.items():
        for written in (label, label.upper(), f" {label.lower()} ", name, name.upper()):
            assert find_grid(written).name == name
    known = [name.lower() for row in GRIDS.values() for name in {row.name, row.label.lower(), *row.aliases} if name]
    assert len(known) == len(set(known))
    assert all(row.name == name and row.description for name, row in GRIDS.items())
