"""What the loss of a denoiser can be told besides its prediction, and the noise it is trained on: against closed
forms, torch's own losses and autograd.
"""

import math
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from test_diffusion import SD, ZERO, draws
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion import PREDICTIONS, DiffusionLoss
from ldm.diffusion.losses import HUBER_SCHEDULES, LOSSES
from ldm.diffusion.noising import perturbed, training_noise
from ldm.errors import UsageError
from ldm.training.lora_config import NAMED

T = torch.tensor([0, 400, 999])
C = 0.1


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise and a network's output."""
    x0, noise, output = draws(3, 3, 4, 8, 8)
    return x0, noise, output


def residual_loss(loss: DiffusionLoss, residual: Tensor) -> Tensor:
    """The loss of a network that is off by this everywhere, at T."""
    x0, noise, _ = batch()
    x0, noise = x0.double(), noise.double()
    return loss(lambda x, t: loss.target(x0, t, noise) + residual, x0, T, noise)


def expected_c(name: str, alphas_cumprod: np.ndarray) -> np.ndarray:
    """kohya's and diffusers' `huber_schedule`, level by level."""
    rows = []
    for t, a in enumerate(alphas_cumprod):
        sigma = math.sqrt((1 - a) / a) if a else math.inf
        rows.append({
            "snr": (1 - C) / (1 + sigma) ** 2 + C,
            "exponential": math.exp(t * math.log(C) / len(alphas_cumprod)),
            "constant": C,
        }[name])  # fmt: skip
    return np.array(rows)


def test_the_squared_error_is_that_of_before_bit_for_bit() -> None:
    x0, noise, output = batch()
    loss = DiffusionLoss(SD, "v_prediction")
    plain = (output - loss.target(x0, T, noise)).square().flatten(1).mean(1)
    assert torch.equal(loss(lambda x, t: output, x0, T, noise), plain)


# -- Huber -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SD, ZERO], ids=["sd", "zero"])
@pytest.mark.parametrize("name", HUBER_SCHEDULES)
def test_schedules_of_c(name: str, schedule: object) -> None:
    assert isinstance(schedule, type(SD))
    table = HUBER_SCHEDULES[name](C, schedule.sigmas)
    np.testing.assert_allclose(table, expected_c(name, schedule.alphas_cumprod), rtol=1e-12)
    assert np.isfinite(table).all() and table.min() >= C * (1 - 1e-12) and table.max() <= 1


def test_options_of_a_run_are_those_of_the_loss() -> None:
    assert list(NAMED["loss_type"]) == list(LOSSES) and list(NAMED["huber_schedule"]) == list(HUBER_SCHEDULES)


@pytest.mark.parametrize("size", [1e-4, 0.03, 1.0, 50.0])
@pytest.mark.parametrize("schedule", HUBER_SCHEDULES)
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_is_the_published_formula(kind: str, schedule: str, size: float) -> None:
    c = expected_c(schedule, ZERO.alphas_cumprod)[T]
    scale = 2 * c if kind == "huber" else 2
    loss = DiffusionLoss(ZERO, "v_prediction", loss_type=kind, huber_c=C, huber_schedule=schedule)
    got = residual_loss(loss, torch.tensor(size))
    np.testing.assert_allclose(got, scale * (np.hypot(size, c) - c), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "theirs", "gap"),
    [
        ("huber", lambda r: F.huber_loss(r, 0 * r, delta=C), C * C),
        ("smooth_l1", lambda r: F.smooth_l1_loss(r, 0 * r, beta=C), C),
    ],
)
def test_huber_is_near_torchs_at_both_ends(kind: str, theirs: Callable[[Tensor], Tensor], gap: float) -> None:
    """The pseudo-Huber rounds the corner off: twice torch's loss near 0, and this gap below it far out."""
    loss = DiffusionLoss(SD, loss_type=kind, huber_c=C, huber_schedule="constant")
    residuals = [torch.tensor(size, dtype=torch.float64) for size in (1e-4, 0.05, 0.1, 0.5, 100.0)]
    below = [float(2 * theirs(r) - residual_loss(loss, r).mean()) / gap for r in residuals]
    assert below == sorted(below)
    assert 0 < below[0] < 1e-6 and 0.999 < below[-1] < 1, below


@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_of_the_loss_in_closed_form(kind: str) -> None:
    x0, noise, start = batch()
    output = start.clone().requires_grad_()
    loss = DiffusionLoss(SD, loss_type=kind, huber_c=C, huber_schedule="constant")
    loss(lambda x, t: output, x0, T, noise).sum().backward()
    r = start - noise
    root = (r * r + C * C).sqrt()
    wanted = {"l2": 2 * r, "huber": 2 * C * r / root, "smooth_l1": 2 * r / root}[kind] / r[0].numel()
    assert output.grad is not None
    torch.testing.assert_close(output.grad, wanted, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_a_perfect_prediction_has_no_loss_and_no_gradient(kind: str) -> None:
    x0, noise, _ = batch()
    output = noise.clone().requires_grad_()
    loss = DiffusionLoss(SD, loss_type=kind, huber_c=1e-3)(lambda x, t: output, x0, T, noise)
    loss.sum().backward()
    assert not loss.any() and output.grad is not None and not output.grad.any()


def test_a_small_residual_keeps_its_digits_in_single_precision() -> None:
    """sqrt(r^2 + 1) - 1 has none left in float32 where r is 1e-4."""
    x0, noise, _ = batch()
    loss = DiffusionLoss(SD, loss_type="huber", huber_c=1.0, huber_schedule="constant")
    got = loss(lambda x, t: x0 * 0 + 1e-4, x0, T, noise * 0)
    torch.testing.assert_close(got, torch.full((3,), 1e-8), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_every_loss_as_diffusers_recipe_does(prediction: str, kind: str) -> None:
    x0, noise, output = batch()
    oracle = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(oracle, T)
    weights = snr.clamp(max=5) / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(3)}[prediction]
    plain, weighted = (DiffusionLoss(SD, prediction, gamma, kind) for gamma in (None, 5.0))
    got = weighted(lambda x, t: output, x0, T, noise)
    torch.testing.assert_close(got, weights * plain(lambda x, t: output, x0, T, noise), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_losses_are_finite_where_nothing_of_the_image_is_left(prediction: str, kind: str) -> None:
    x0, noise, output = batch()
    output.requires_grad_()
    loss = DiffusionLoss(ZERO, prediction, 5.0, kind)(lambda x, t: output, x0, T, noise)
    loss.sum().backward()
    assert loss.isfinite().all() and output.grad is not None and output.grad.isfinite().all()


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_masked_places_have_no_gradient_and_the_others_theirs(kind: str) -> None:
    x0, noise, start = batch()
    mask = torch.zeros(3, 1, 8, 8)
    mask[0] = 1.0
    mask[1, :, :3] = 1.0
    mask[1, :, 3] = 0.25
    gradients, losses = [], []
    for given in (None, mask, torch.ones_like(mask)):
        output = start.clone().requires_grad_()
        loss = DiffusionLoss(SD, snr_gamma=5.0, loss_type=kind)(lambda x, t, y=output: y, x0, T, noise, given)
        loss.sum().backward()
        assert output.grad is not None
        gradients.append(output.grad)
        losses.append(loss.detach())
    plain, masked, ones = gradients
    assert not masked[(mask == 0).expand_as(masked)].any()  # exactly 0
    assert torch.equal(ones, plain) and torch.equal(losses[2], losses[0])
    torch.testing.assert_close(masked, plain * mask, rtol=1e-6, atol=0)
    assert losses[1][2] == 0 and losses[1][0] == losses[0][0]


def test_a_picture_that_is_masked_by_half_counts_half() -> None:
    x0, noise, _ = batch()
    mask = torch.ones(3, 1, 8, 8)
    mask[1, :, :4] = 0
    loss = DiffusionLoss(SD)(lambda x, t: noise + 3, x0, T, noise, mask)
    torch.testing.assert_close(loss, torch.tensor([9.0, 4.5, 9.0]))


def test_a_mask_does_not_change_the_type_of_the_loss() -> None:
    x0, noise, output = batch()
    mask = torch.ones(3, 1, 8, 8)
    for kind in (torch.float32, torch.float64):
        loss = DiffusionLoss(SD)(lambda x, t: output, x0.to(kind), T, noise.to(kind), mask.double())
        assert loss.dtype == kind


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perturbed_noise_is_in_the_input_and_not_in_the_target(prediction: str) -> None:
    x0, noise, extra = batch()
    oracle = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    seen = perturbed(noise, extra, 0.1)
    inputs: list[Tensor] = []
    loss = DiffusionLoss(SD, prediction)
    got = loss(lambda x, t: inputs.append(x) or torch.zeros_like(x), x0, T, noise, seen=seen)
    torch.testing.assert_close(inputs[0], oracle.add_noise(x0, noise + 0.1 * extra, T), rtol=0, atol=1e-5)
    target = {"epsilon": noise, "v_prediction": oracle.get_velocity(x0, noise, T), "sample": x0}[prediction]
    torch.testing.assert_close(got, target.square().mean((1, 2, 3)), rtol=1e-4, atol=0)


def test_offset_noise_is_that_of_diffusers_scripts() -> None:
    normal, shift = draws(2, 5, 4, 8, 8)
    shift = shift[:, :, 0, 0]
    theirs = normal + 0.1 * shift.view(5, 4, 1, 1)
    assert torch.equal(training_noise(normal, shift, 0.1), theirs)
    assert torch.equal(training_noise(normal[2], shift[2], 0.1), theirs[2])
    assert torch.equal(training_noise(normal, shift, 0.0), normal)
    assert training_noise(normal, shift, 0.1).dtype == torch.float32


def test_moments_of_offset_noise() -> None:
    """Variance 1 + offset^2 of a value, covariance offset^2 within a channel, 0 between channels; each mean of n
    products of normal numbers has a standard deviation below 2 (1 + offset^2) / sqrt(n); 5 of them off is too much.
    """
    n, offset = 100_000, 0.5
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n, 2, 1, 2, generator=generator)
    noise = training_noise(normal, torch.randn(n, 2, generator=generator), offset).flatten(1)
    within = torch.tensor([[1 + offset**2, offset**2], [offset**2, 1 + offset**2]])
    bound = 5 * 2 * (1 + offset**2) / math.sqrt(n)
    torch.testing.assert_close(noise.T @ noise / n, torch.block_diag(within, within), rtol=0, atol=bound)
    assert noise.mean(0).abs().max() < bound


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, -1.0, math.inf, math.nan])
def test_bad_c_is_refused(c: float) -> None:
    with pytest.raises(UsageError, match=r"huber_c is .* finite number above 0"):
        DiffusionLoss(SD, loss_type="huber", huber_c=c)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'huber'"):
        DiffusionLoss(SD, loss_type="hubert")
    with pytest.raises(UsageError, match="did you mean 'constant'"):
        DiffusionLoss(SD, huber_schedule="constnat")
