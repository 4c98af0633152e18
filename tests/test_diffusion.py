"""Schedules, predictions and losses against golden numbers, closed forms and diffusers in one process."""

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from torch import Tensor

from ldm.diffusion import (
    PREDICTIONS,
    DiffusionLoss,
    NoiseSchedule,
    c_in,
    min_snr_weights,
)
from ldm.diffusion.prediction import FLOW, edm, rates
from ldm.errors import UsageError

SD = NoiseSchedule.scaled_linear()
ZERO = SD.with_zero_terminal_snr()
TIMES = [0, 1, 249, 499, 749, 999]


def draws(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def printed(values: Any, digits: int = 9) -> list[str]:
    """To so many significant digits, as the golden numbers are printed."""
    return [f"{float(value):.{digits}g}" for value in np.atleast_1d(values)]


# Schedules.

GOLDEN = [  # alphas_cumprod at TIMES; sigmas at TIMES or, where fewer are recorded, at the ends
    (
        NoiseSchedule.linear(),
        [0.9999, 0.999780092, 0.524085374, 0.0785872429, 0.00335055044, 4.03582977e-05],
        {0: "0.0100005", 999: "157.4073"},
    ),
    (
        SD,
        [0.99915, 0.998296028, 0.675432414, 0.27766965, 0.0566234916, 0.00466009851],
        {0: "0.02916716", 1: "0.04131441", 249: "0.6932049", 499: "1.612886", 749: "4.081729", 999: "14.61464"},
    ),
    (
        NoiseSchedule.scaled_linear(0.0015, 0.0195),
        [0.9985, 0.996994427, 0.510514301, 0.115844491, 0.00844483049, 0.000142303975],
        {0: "0.03875891", 999: "83.82249"},
    ),
    (
        NoiseSchedule.squaredcos_cap_v2(),
        [0.999958716, 0.999912576, 0.847012161, 0.49384359, 0.144272102, 2.42876691e-09],
        {999: "20291.17"},
    ),
    (ZERO, [0.99915, 0.998233446, 0.654189007, 0.242359167, 0.0331714828, 0], {999: "inf"}),
]


@pytest.mark.parametrize(("schedule", "alphas_cumprod", "sigmas"), GOLDEN)
def test_golden_numbers_of_schedules(
    schedule: NoiseSchedule, alphas_cumprod: list[float], sigmas: dict[int, str]
) -> None:
    assert printed(schedule.alphas_cumprod[TIMES]) == printed(alphas_cumprod)
    for t, expected in sigmas.items():
        digits = len(expected.replace("0.0", "", 1).replace(".", "").lstrip("0"))
        assert printed(schedule.sigmas[t], digits) == [expected]
    assert schedule.num_train_timesteps == 1000 and schedule.betas.dtype == np.float64


def test_golden_scalars() -> None:
    cosine = NoiseSchedule.squaredcos_cap_v2(4000)
    assert printed(cosine.betas[0]) == ["9.86581881e-06"]
    assert printed(cosine.alphas_cumprod[-1], 6) == ["1.51798e-10"]
    assert printed(-2 * math.log(NoiseSchedule.linear().sigmas[-1]), 6) == ["-10.1177"]  # log SNR at T
    assert printed(-2 * math.log(SD.sigmas[-1]), 6) == ["-5.36405"]
    linear = NoiseSchedule.linear()
    for t, expected in [(1, 5.45318766e-05), (500, 0.0100513358), (999, 0.0199999835)]:
        assert printed(linear.variance(t)) == printed(expected)
    assert linear.variance(0) == 0  # and diffusers' own tests of DDPM's and DDIM's variances, to 1e-5:
    for t, expected in [(487, 0.00979), (999, 0.02)]:
        assert linear.variance(t) == pytest.approx(expected, abs=1e-5)
    for t, previous, expected in [(420, 400, 0.14771), (980, 960, 0.32460), (487, 486, 0.00979), (999, 998, 0.02)]:
        assert linear.variance(t, previous=previous) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
def test_config_gives_the_betas_of_diffusers(name: str, zero: bool) -> None:
    trained = np.linspace(0.001, 0.02, 50).tolist() if name == "trained" else None
    config: dict[str, Any] = {
        "num_train_timesteps": 50 if trained else 500,
        "beta_start": 0.0008,
        "beta_end": 0.015,
        "beta_schedule": "linear" if trained else name,
        "trained_betas": trained,
        "rescale_betas_zero_snr": zero,
    }
    ours, theirs = NoiseSchedule.from_config(config), diffusers.DDIMScheduler(**config)
    # float32 there; rescaled betas are differences of products of them, and the cosine's last alphas are 0.001
    np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), rtol=1e-3 if zero else 1e-5, atol=1e-7)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-7)
    assert ours.zero_terminal_snr == zero


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'squaredcos_cap_v2'"):
        NoiseSchedule.from_config({"beta_schedule": "squaredcos"})
    with pytest.raises(UsageError, match="at least 1"):
        NoiseSchedule.from_config({"num_train_timesteps": 0})
    for betas in ([], [0.1, 1.0, 0.1], [0.0, 0.1], [0.1, 1.5], [0.1, math.nan], [[0.1]]):
        with pytest.raises(UsageError, match="betas"):
            NoiseSchedule(np.array(betas))
    with pytest.raises(UsageError, match="2 timesteps"):
        NoiseSchedule(np.array([0.1])).with_zero_terminal_snr()
    for t, previous in [(3, 3), (3, 4), (3, -2), (1000, 999)]:
        with pytest.raises(UsageError, match="time"):
            SD.q_posterior(t, previous)


def test_a_schedule_cannot_be_written_to() -> None:
    betas = np.full(10, 0.1)
    schedule = NoiseSchedule(betas)
    betas[:] = 0.5
    assert schedule.betas[0] == 0.1
    for table in (schedule.betas, schedule.alphas_cumprod, schedule.sigmas):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0.3


def test_sigma_and_t_invert_each_other() -> None:
    for schedule in (SD, ZERO, NoiseSchedule.squaredcos_cap_v2()):
        times = np.arange(1000.0)
        np.testing.assert_array_equal(schedule.sigma(times), schedule.sigmas)
        np.testing.assert_allclose(schedule.t(schedule.sigmas), times, atol=1e-9)
    between = math.sqrt(SD.sigmas[10] * SD.sigmas[11])
    assert SD.t(between) == pytest.approx(10.5)  # half way in log sigma
    assert SD.sigma(10.25) == pytest.approx(
        0.75 * SD.sigmas[10] + 0.25 * SD.sigmas[11]
    )  # linear in sigma, as diffusers
    assert (SD.t(0.0), SD.t(1e9), SD.sigma(-5), SD.sigma(2000)) == (0, 999, SD.sigmas[0], SD.sigmas[-1])
    assert ZERO.t(math.inf) == 999 and math.isinf(ZERO.sigma(999)) and math.isfinite(ZERO.sigma(998.9))
    oracle = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    theirs = oracle._sigma_to_t(np.array([0.03, 0.5, 3.3, 14.0]), np.log(SD.sigmas))
    np.testing.assert_allclose(SD.t(np.array([0.03, 0.5, 3.3, 14.0])), theirs, atol=1e-9)


@pytest.mark.parametrize("schedule", [SD, NoiseSchedule.linear(), ZERO], ids=["sd", "linear", "zero"])
@pytest.mark.parametrize(("t", "previous"), [(1, 0), (500, 499), (999, 998), (999, 0), (700, 420), (0, -1)])
def test_forward_process_is_consistent(schedule: NoiseSchedule, t: int, previous: int) -> None:
    """q(x_t | x0) is q(x_t | x_s) after q(x_s | x0), and the posterior is Bayes' rule on these Gaussians."""
    scale_s, variance_s = schedule.q_marginal(previous)
    scale_t, variance_t = schedule.q_marginal(t)
    step, added = scale_t / scale_s, schedule.variance(t, "fixed_large", previous)
    if t - previous == 1:
        assert schedule.q_step(t) == pytest.approx((step, added), abs=1e-12)
        assert added == pytest.approx(schedule.betas[t], rel=1e-9)
    assert step**2 * variance_s + added == pytest.approx(variance_t, rel=1e-12)

    to_x0, to_xt, variance = schedule.q_posterior(t, previous)
    assert variance == schedule.variance(t, "fixed_small", previous)
    if previous >= 0:
        precision = 1 / variance_s + step**2 / added
        expected = (scale_s / variance_s / precision, step / added / precision, 1 / precision)
        assert (to_x0, to_xt, variance) == pytest.approx(expected, rel=1e-9)
    else:
        assert (to_x0, to_xt, variance) == pytest.approx((1, 0, 0))


# Predictions.


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_from_the_target_of_training_is_x0(prediction: str) -> None:
    kind = PREDICTIONS[prediction]
    x0, noise = (x.double() for x in draws(2, 2, 4, 8, 8))
    for sigma in (0.03, 1.0, 14.6, 157.4):
        target = kind.target(x0, noise, *rates(sigma))
        assert float((kind.to_x0(x0 + sigma * noise, sigma, target) - x0).abs().max()) < 1e-12 * max(1, sigma**2)


@pytest.mark.parametrize("sigma", [4096.0, 1e6, 1e8])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_x0_is_exact_in_float32_at_stand_ins_for_infinity(prediction: str, sigma: float) -> None:
    kind = PREDICTIONS[prediction]
    x0, noise = draws(2, 2, 4, 8, 8)
    target = kind.target(x0, noise, *rates(sigma))
    assert float((kind.to_x0(x0 + sigma * noise, sigma, target) - x0).abs().max()) < 1e-6


def test_coefficients_in_closed_form() -> None:
    for sigma in (0.029, 1.0, 14.6, 4096.0):
        root = math.sqrt(1 + sigma**2)
        expected = {
            "epsilon": (1, -sigma),
            "v_prediction": (1 / root**2, -sigma / root),  # Salimans & Ho 2022
            "sample": (0, 1),
        }
        for prediction, kind in PREDICTIONS.items():
            assert (kind.c_skip(sigma), kind.c_out(sigma)) == pytest.approx(expected[prediction], rel=1e-12)
        assert c_in(sigma) == pytest.approx(1 / root)
    at_infinity = {name: (kind.c_skip(math.inf), kind.c_out(math.inf)) for name, kind in PREDICTIONS.items()}
    assert at_infinity == {"epsilon": (1, -math.inf), "v_prediction": (0, -1), "sample": (0, 1)}
    assert rates(math.inf) == (0, 1)


def test_coefficients_of_networks_without_a_table() -> None:
    for sigma in (0.002, 1.0, 80.0):
        # x_t = (1 - s) x0 + s noise and v = noise - x0, with s = sigma / (1 + sigma)
        assert (FLOW.c_in(sigma), FLOW.c_skip(sigma), FLOW.c_out(sigma)) == pytest.approx(
            (1 / (1 + sigma), 1 / (1 + sigma), -sigma / (1 + sigma))
        )
        for data in (0.5, 1.0):  # Karras et al. 2022, table 1
            whole = sigma**2 + data**2
            row = (whole**-0.5, data**2 / whole, sigma * data * whole**-0.5)
            for kind, sign in (("epsilon", 1), ("v_prediction", -1)):
                ours = edm(kind, data)
                assert (ours.c_in(sigma), ours.c_skip(sigma), sign * ours.c_out(sigma)) == pytest.approx(row)
        v = edm("v_prediction", 1.0)
        assert v.c_out(sigma) == pytest.approx(PREDICTIONS["v_prediction"].c_out(sigma))
    with pytest.raises(KeyError):
        edm("sample", 0.5)


# Losses.


@pytest.mark.parametrize("schedule", [SD, ZERO], ids=["sd", "zero"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_sees_the_input_and_target_of_diffusers(prediction: str, schedule: NoiseSchedule) -> None:
    if prediction == "epsilon" and schedule is ZERO:
        with pytest.raises(UsageError, match="v_prediction or sample"):
            DiffusionLoss(schedule, prediction)
        return
    x0, noise, output = draws(3, 5, 4, 8, 8)
    t = torch.tensor([0, 1, 400, 998, 999])
    oracle = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=schedule is ZERO
    )
    target = {"epsilon": noise, "v_prediction": oracle.get_velocity(x0, noise, t), "sample": x0}[prediction]
    seen: list[Tensor] = []

    def network(x: Tensor, times: Tensor) -> Tensor:
        seen.append(x)
        assert torch.equal(times, t)
        return output

    loss = DiffusionLoss(schedule, prediction)(network, x0, t, noise)
    torch.testing.assert_close(seen[0], oracle.add_noise(x0, noise, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(DiffusionLoss(schedule, prediction).target(x0, t, noise), target, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, (output - target).square().mean((1, 2, 3)), rtol=1e-5, atol=0)
    if schedule is ZERO:
        assert torch.equal(seen[0][-1], noise[-1])  # nothing of the image is left


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights(prediction: str) -> None:
    gamma = 5.0
    oracle = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(oracle, torch.arange(1000)).double()
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(1000)}[prediction]  # diffusers' recipe
    expected = snr.clamp(max=gamma) / divisor
    np.testing.assert_allclose(min_snr_weights(SD.alphas_cumprod, prediction, gamma), expected, rtol=1e-4)

    at_zero, at_infinity = min_snr_weights(np.array([0.0, 1.0]), prediction, gamma)  # 0 / 0 in that recipe
    limits = {"epsilon": (1, 0), "v_prediction": (0, 0), "sample": (0, gamma)}
    assert (at_zero, at_infinity) == pytest.approx(limits[prediction], abs=1e-300)


def test_weights_reach_the_loss_and_its_gradient() -> None:
    x0, noise = draws(2, 3, 4, 8, 8)
    t = torch.tensor([10, 500, 999])
    scale = torch.ones((), requires_grad=True)
    plain, weighted = (DiffusionLoss(ZERO, "v_prediction", gamma) for gamma in (None, 5.0))
    weights = torch.from_numpy(min_snr_weights(ZERO.alphas_cumprod, "v_prediction", 5.0))[t].float()
    loss = weighted(lambda x, t: scale * x, x0, t, noise)
    torch.testing.assert_close(loss, weights * plain(lambda x, t: scale * x, x0, t, noise))
    assert loss.dtype == torch.float32 and loss.shape == (3,)
    loss.sum().backward()
    assert scale.grad is not None and scale.grad.isfinite() and scale.grad != 0


def test_loss_of_half_precision_output_is_taken_in_single() -> None:
    x0, noise = draws(2, 3, 4, 8, 8)
    t = torch.tensor([10, 500, 999])
    single = DiffusionLoss(SD)(lambda x, t: x, x0, t, noise)
    half = DiffusionLoss(SD)(lambda x, t: x.bfloat16(), x0, t, noise)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single, rtol=2e-2, atol=0)
    assert DiffusionLoss(SD)(lambda x, t: x, x0.double(), t, noise.double()).dtype == torch.float64


def test_bad_losses_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'epsilon'"):
        DiffusionLoss(SD, "epsilom")
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="snr_gamma"):
            DiffusionLoss(SD, snr_gamma=gamma)
