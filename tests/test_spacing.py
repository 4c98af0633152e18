"""Which levels a run visits: against diffusers for many lengths, against A1111's rules, and what is refused."""

import math
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest

from ldm.diffusion import NoiseSchedule, Spacing, levels
from ldm.diffusion.continuous import EDMSchedule, FlowSchedule
from ldm.diffusion.grids import grid
from ldm.diffusion.spacing import FAMILIES, Family, respaced
from ldm.errors import UsageError
from ldm.schedulers import SCHEDULERS, from_config

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = NoiseSchedule.scaled_linear()
CLASSES = {  # row -> diffusers' class of that family
    "ddim": "DDIMScheduler", "plms": "PNDMScheduler", "euler": "EulerDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler", "deis": "DEISMultistepScheduler",
    "dpm++2s": "DPMSolverSinglestepScheduler", "lcm": "LCMScheduler",
}  # fmt: skip


@pytest.mark.parametrize("total", [1000, 1100, 37])
@pytest.mark.parametrize("name", CLASSES)
def test_timesteps_and_sigmas_of_many_lengths_equal_diffusers(name: str, total: int) -> None:
    family, schedule = SCHEDULERS[name].family, NoiseSchedule.scaled_linear(num_train_timesteps=total)
    lengths = [n for n in (*range(2, 41), 64, 99, 125, 333, 500, 998) if n < total - 1]
    spacings = (
        ["leading"] if name in ("plms", "lcm") else ["linspace"] if name == "dpm++2s" else ["leading", "trailing"]
    )
    spacings += ["linspace"] * (len(spacings) == 2)
    for spacing in spacings:
        asked = {"timestep_spacing": spacing, "steps_offset": int(name != "lcm")}
        extra = {"skip_prk_steps": True} if name == "plms" else {} if name == "dpm++2s" else asked
        extra = extra | asked if name == "plms" else extra
        oracle = getattr(diffusers, CLASSES[name])(**SD, num_train_timesteps=total, **extra)
        for n in lengths:
            if name == "lcm" and n > 37:
                continue
            inference = {"original_inference_steps": 50 if total >= 50 else total} if name == "lcm" else {}
            oracle.set_timesteps(n, **inference)
            ours = levels(schedule, n, Spacing(spacing, steps_offset=asked["steps_offset"]), family)
            times = np.delete(oracle.timesteps.numpy(), 1) if name == "plms" else oracle.timesteps.numpy()
            if spacing == "trailing" and len(np.arange(total, 0, -total / n)) > n:
                times = times[:n]  # its arange rounds past 0 here
            np.testing.assert_allclose(ours.timesteps, times, rtol=0, atol=2e-3)
            np.testing.assert_allclose(ours.sigmas[:n], schedule.sigma(np.array(ours.timesteps)), rtol=1e-12)
            if name == "euler":
                np.testing.assert_allclose(ours.sigmas[:n], oracle.sigmas.numpy()[:n], rtol=2e-5)
                assert ours.start == pytest.approx(float(oracle.init_noise_sigma), rel=1e-5)


def test_levels_of_known_runs() -> None:
    # recorded upstream: DDIM and PNDM with offset 1; the others from the definitions, and Karras on SD's range
    assert levels(SCHEDULE, 5, Spacing("leading", 1), "ddim").timesteps == (801, 601, 401, 201, 1)
    prk = [901, 851, 851, 801, 801, 751, 751, 701, 701, 651, 651, 601, 601, 501, 401, 301, 201, 101, 1]
    assert list(levels(SCHEDULE, 10, Spacing("leading", 1), "ddim").timesteps) == [*prk[:12:4], *prk[12:]]
    assert levels(SCHEDULE, 10, Spacing("leading", 1), "euler").timesteps[:2] == (901, 801)
    assert levels(SCHEDULE, 10, Spacing("trailing"), "dpm_solver").timesteps[:2] == (999, 899)
    expected = [14.614641, 9.102928, 5.478392, 3.168603, 1.749417, 0.914072, 0.446918, 0.201398, 0.081910, 0.029167]
    run = levels(SCHEDULE, 10, Spacing("linspace", sigma_grid="karras"), "dpm_solver")
    np.testing.assert_allclose(run.sigmas, [*expected, 0.0], atol=6e-7)
    assert levels(SCHEDULE, 1, Spacing("linspace"), "euler").timesteps == (999,)  # diffusers begins at 0, without noise
    assert run.start == math.hypot(1, run.sigmas[0])
    assert all(type(number) is float for number in (*run.sigmas, *run.timesteps, run.start))
    assert levels(SCHEDULE, 4, Spacing(), "distilled").timesteps == (999, 759, 499, 259)  # LCM's own four


def test_final_level_and_terminal_stand_in() -> None:
    for family, kind in FAMILIES.items():
        lowest = float(SCHEDULE.sigmas[kind.lowest])
        assert levels(SCHEDULE, 7, Spacing(final_sigmas_type="sigma_min"), family).sigmas[-1] == lowest
        assert levels(SCHEDULE, 7, Spacing(), family).sigmas[-1] == 0
    low = float(SCHEDULE.sigmas[0])
    assert levels(SCHEDULE, 7, Spacing(sigma_grid="kl_optimal"), "k_diffusion").sigmas[-1] == low
    zero = SCHEDULE.with_zero_terminal_snr()
    first = {family: levels(zero, 5, Spacing("trailing"), family).sigmas[0] for family in FAMILIES}
    for family in ("euler", "kdpm2", "dpm_solver", "dpm_single", "k_diffusion"):
        assert family == "dpm_single" or first[family] == pytest.approx(math.sqrt(2**24 - 1), rel=1e-9)
    assert first["ddim"] == pytest.approx(1e8, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_where_a_run_from_nothing_begins(family: str, spacing: str) -> None:
    run = levels(SCHEDULE, 6, Spacing(spacing), family)
    of_sigma = family == "k_diffusion" or (family in ("euler", "kdpm2") and spacing != "leading")
    assert run.start == (run.sigmas[0] if of_sigma else math.hypot(1, run.sigmas[0]))


def test_the_highest_time_of_a_grid_that_is_cut_is_that_of_diffusers() -> None:
    """Its float32 has 998.9999 there with Stable Diffusion's levels, and cuts."""
    for name in ("exponential", "beta"):
        oracle = diffusers.DPMSolverMultistepScheduler(**SD, **{f"use_{name}_sigmas": True})
        for n in (1, 2, 7, 20, 50):
            oracle.set_timesteps(n)
            run = levels(SCHEDULE, n, Spacing("linspace", sigma_grid=name), "dpm_solver")
            assert list(run.timesteps) == oracle.timesteps.tolist() and run.timesteps[0] == 998
    for name in ("karras", "lu"):
        times = levels(SCHEDULE, 9, Spacing(sigma_grid=name), "dpm_solver").timesteps
        exact = SCHEDULE.t(grid(name, 9, float(SCHEDULE.sigmas[0]), float(SCHEDULE.sigmas[-1]), SCHEDULE))
        assert times == tuple(np.round(exact)) and times[0] == 999 and times[-1] == 0
    exact = SCHEDULE.t(grid("karras", 9, float(SCHEDULE.sigmas[0]), float(SCHEDULE.sigmas[-1]), SCHEDULE))
    assert levels(SCHEDULE, 9, Spacing(sigma_grid="karras"), "k_diffusion").timesteps == tuple(exact)
    visited = levels(SCHEDULE, 9, Spacing("leading", 1, "karras"), "euler")  # over the levels of the spacing
    assert visited.sigmas[0] == pytest.approx(SCHEDULE.sigma(889), rel=1e-12)
    assert visited.sigmas[-2] == pytest.approx(SCHEDULE.sigma(1), rel=1e-12)


@pytest.mark.parametrize("n", [2, 7, 20, 30, 50])
def test_ddim_and_plms_of_stable_diffusion_webui(n: int) -> None:
    """timesteps = clip(range(0, 1000, 1000 // n) + 1, 0, 999), from the last to the second; the first ends it."""
    times = np.clip(np.arange(0, 1000, 1000 // n) + 1, 0, 999)[::-1]
    for name in ("DDIM", "PLMS"):
        run = from_config({"_class_name": "PNDMScheduler", **SD}, name, a1111=True).levels(n)
        assert run.timesteps == tuple(times[:-1])
        np.testing.assert_allclose(run.sigmas, SCHEDULE.sigmas[times], rtol=1e-12)
        assert run.start == math.hypot(1, run.sigmas[0])
    one = from_config({"_class_name": "PNDMScheduler", **SD}, "DDIM", a1111=True).levels(1)
    assert one.timesteps == (999,)  # there, none


@pytest.mark.parametrize(
    ("n", "spacing", "family", "says"),
    [
        (0, Spacing(), "ddim", "at least 1"),
        (-3, Spacing(), "euler", "at least 1"),
        (1001, Spacing("trailing"), "ddim", "at most 1000 do"),
        (1000, Spacing("leading", 1), "euler", "at most 999 do"),
        (1000, Spacing("linspace"), "dpm_solver", "at most 999 do"),
        (5, Spacing("leading", 1000), "ddim", "none does"),
        (5, Spacing("leading", -1), "ddim", "none does"),
        (51, Spacing(), "distilled", "distilled from a run of 50; take at most 50"),
        (9, Spacing(original_inference_steps=8), "distilled", "take at most 8"),
        (3, Spacing(timesteps=(1000.0, 5.0)), "ddim", "timesteps begin at 1000; this schedule has those from 0 to 999"),
    ],
)
def test_steps_that_do_not_fit_are_refused(n: int, spacing: Spacing, family: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        levels(SCHEDULE, n, spacing, family)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"timestep_spacing": "trailling"}, "did you mean 'trailing'"),
        ({"final_sigmas_type": "sigma_mni"}, "did you mean 'sigma_min'"),
        ({"sigma_grid": "karas"}, "did you mean 'karras'"),
        ({"timesteps": (5.0, 5.0)}, "timesteps are .* they must be numbers that fall, none below 0"),
        ({"timesteps": (5.0, -1.0)}, "none below 0"),
        ({"sigmas": (1.0, 2.0)}, "sigmas are"),
        ({"sigmas": (math.inf, 2.0)}, "sigmas are"),
        ({"sigmas": (2.0,), "timesteps": (3.0,)}, "timesteps and sigmas were both given"),
    ],
)
def test_spacings_that_do_not_exist_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Spacing(**fields)


def test_respaced_times() -> None:
    assert respaced(1000, "ddim50") == tuple(range(980, -1, -20))
    assert respaced(300, "10,15,20") == (
        *(200 + round(k * 99 / 19) for k in range(19, -1, -1)),
        *(100 + round(k * 99 / 14) for k in range(14, -1, -1)), *range(99, -1, -11),
    )  # fmt: skip
    assert (
        respaced(10, "3") == (9, 4, 0) and respaced(7, "1,1") == (4, 0) and respaced(7, "4,3") == (6, 5, 4, 3, 2, 1, 0)
    )
    for bad, says in [("ddim333", "no whole stride takes 333 of 1000"), ("", "timesteps are ''"), ("5,x", "write how")]:
        with pytest.raises(UsageError, match=says):
            respaced(1000, bad)
    with pytest.raises(UsageError, match="11 timesteps were asked of a section of 10; ask for at most 10"):
        respaced(30, "1,11,1")
    assert all(type(time) is float for time in respaced(1000, "ddim25"))


@pytest.mark.parametrize(("start", "end"), [(0, 0.8), (0.8, 1), (0.3, 0.71), (0, 1)])
def test_parts_of_a_run_are_those_of_diffusers_sdxl(start: float, end: float) -> None:
    whole = levels(SCHEDULE, 30, Spacing("leading", 1), "euler")
    high, low = (round(1000 - share * 1000) for share in (start, end))
    kept = [t for t in whole.timesteps if (t < high or start == 0) and (t >= low or end == 1)]
    part = whole.part(start, end, 1000)
    assert list(part.timesteps) == kept and len(part.sigmas) == len(kept) + 1
    first = whole.timesteps.index(kept[0])
    assert part.sigmas == whole.sigmas[first : first + len(kept) + 1]
    assert part.start == (math.hypot(1, part.sigmas[0]) if start else whole.start)
    with pytest.raises(UsageError, match=r"no step of 30 lies between 0.51 and 0.53"):
        whole.part(0.51, 0.53, 1000)


# Networks without a table of levels.


@pytest.mark.parametrize("exponential", [False, True])
def test_levels_of_edm(exponential: bool) -> None:
    oracle = diffusers.EDMEulerScheduler(sigma_schedule="exponential" if exponential else "karras", rho=6.0)
    schedule = EDMSchedule(rho=6.0, exponential=exponential)
    assert levels(schedule, 1, Spacing()).sigmas == pytest.approx(
        (80.0, 0.0)
    )  # even in log sigma theirs begins at 0.002
    for n in (2, 18):
        oracle.set_timesteps(n)
        run = levels(schedule, n, Spacing())
        np.testing.assert_allclose(run.sigmas, oracle.sigmas.numpy(), rtol=2e-5)
        np.testing.assert_allclose(run.timesteps, oracle.timesteps.numpy(), atol=1e-5)
        assert run.start == pytest.approx(float(oracle.init_noise_sigma), rel=1e-6)
    assert schedule.sigma(schedule.t(3.5)) == pytest.approx(3.5, rel=1e-12)
    karras = levels(EDMSchedule(exponential=True), 5, Spacing(sigma_grid="karras"))
    np.testing.assert_allclose(karras.sigmas, [*grid("karras", 5, 0.002, 80.0, None), 0])
    low = levels(schedule, 5, Spacing(final_sigmas_type="sigma_min"))
    assert low.sigmas[-1] == low.sigmas[-2] == pytest.approx(0.002)
    assert levels(schedule, 5, Spacing(sigmas=(9.0, 3.0))).sigmas == (9.0, 3.0, 0.0)
    with pytest.raises(UsageError, match="laid out on a trained schedule and there is none"):
        levels(schedule, 5, Spacing(sigma_grid="simple"))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize("name", ["", "karras", "exponential", "beta"])
def test_levels_of_flow_matching(shift: float, terminal: float | None, name: str) -> None:
    flags = {f"use_{name}_sigmas": True} if name else {}
    oracle = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal, **flags)
    schedule = FlowSchedule(shift, terminal)
    for n in (2, 5, 28):
        oracle.set_timesteps(n)
        run = levels(schedule, n, Spacing(sigma_grid=name))
        np.testing.assert_allclose(run.timesteps, oracle.timesteps.numpy(), rtol=2e-6)
        shares = np.array(run.sigmas) / (1 + np.array(run.sigmas))
        np.testing.assert_allclose(shares, oracle.sigmas.numpy(), rtol=2e-6, atol=1e-12)
        assert run.start == 1 + run.sigmas[0]
    once = replace(schedule, twice=False)
    assert levels(once, 5, Spacing()).timesteps[-1] == pytest.approx(1000 * (terminal or once.shifted(0.001)), rel=1e-9)
    assert levels(schedule, 3, Spacing(timesteps=(800.0, 500.0))).sigmas == pytest.approx((4.0, 1.0, 0.0))


def test_every_family_is_that_of_a_row_or_of_a_profile() -> None:
    used = {row.family for row in SCHEDULERS.values()} | {"k_diffusion", "compvis"}
    assert used == set(FAMILIES) and all(isinstance(kind, Family) for kind in FAMILIES.values())
    with pytest.raises(UsageError, match="did you mean 'euler'"):
        levels(SCHEDULE, 5, Spacing(), "eluer")
