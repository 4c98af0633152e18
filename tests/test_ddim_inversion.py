"""From a picture back to its noise: in closed form on a Gaussian, and on the model in the box."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.data.emoji import EmojiScenes
from ldm.diffusion import Estimate, Levels, NoiseSchedule, Spacing, levels
from ldm.evaluation.reconstruction import held_out_scenes, psnr
from ldm.noise import generators
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.schedulers import SCHEDULERS
from ldm.schedulers.inversion import ITERATIONS, invert

pytestmark = pytest.mark.usefixtures("one_thread")
SD = NoiseSchedule.scaled_linear()
RUNS = {
    "leading to zero": levels(SD, 50, Spacing("leading", 1), "ddim"),
    "leading to sigma_min": levels(SD, 50, Spacing("leading", 1, final_sigmas_type="sigma_min"), "ddim"),
    "zero terminal SNR": levels(SD.with_zero_terminal_snr(), 50, Spacing("trailing"), "ddim"),
    "half of the way": Levels(
        levels(SD, 50, Spacing("leading", 1), "ddim").sigmas[25:],
        levels(SD, 50, Spacing("leading", 1), "ddim").timesteps[25:], 0.0,
    ),
}  # fmt: skip

D = 6
_DRAW = np.random.default_rng(4)
_MIX = _DRAW.standard_normal((D, D)) * np.array([1.6, 1.0, 0.8, 0.6, 0.4, 0.3])
C = _MIX @ _MIX.T / D + 0.02 * np.eye(D)
MU = _DRAW.standard_normal(D) * 0.3
X = torch.from_numpy(MU + _DRAW.standard_normal((4, D)) @ np.linalg.cholesky(C).T).view(4, 1, 1, D)


def ideal(x: Tensor, sigma: float) -> Estimate:
    """E[x0 | x] of N(MU, C)."""
    gain = torch.from_numpy(C @ np.linalg.inv(C + sigma**2 * np.eye(D))).to(x)
    mean = torch.from_numpy(MU).to(x)
    return Estimate(mean + (x - mean) @ gain.T)


def drawn(x: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    def never(sigma: float, sigma_next: float) -> Tensor:
        raise AssertionError("DDIM with eta 0 draws no noise")

    (*_, last) = SCHEDULERS["ddim"].bound({"eta": 0.0}, SD)(ideal, x, sigmas, never, None)
    return last.x


def exact(sigmas: tuple[float, ...]) -> np.ndarray:
    """What eqs. 9 and 12 of Song et al. 2021, each inverted, make of X: on unit noise, in the network's frame."""
    z = X.view(4, D).numpy().T
    a = [1 / (1 + sigma**2) for sigma in sigmas]
    for high, low in list(pairwise(a))[::-1]:
        # z_low = sqrt(a_low) x0 + sqrt(1 - a_low) (z_high - sqrt(a_high) x0) / sqrt(1 - a_high), x0 = A z_high + b
        gain = C @ np.linalg.inv(high * C + (1 - high) * np.eye(D)) * high**0.5
        offset = MU - gain @ MU * high**0.5
        kept = ((1 - low) / (1 - high)) ** 0.5
        of_x0 = low**0.5 - kept * high**0.5
        z = np.linalg.solve(kept * np.eye(D) + of_x0 * gain, z - (of_x0 * offset)[:, None])
    return z.T.reshape(4, 1, 1, D)


@pytest.mark.parametrize("name", RUNS)
def test_on_a_gaussian_it_tends_to_the_exact_inverse(name: str) -> None:
    sigmas = RUNS[name].sigmas
    begun = X * math.hypot(1, sigmas[-1])  # `exact` begins in the network's frame
    found = []
    for iterations in (1, 2, 3, 6, 40):
        steps = list(invert(ideal, begun, sigmas, iterations))
        assert [s.index for s in steps] == list(range(len(sigmas) - 1))
        assert [s.sigma for s in steps] == list(sigmas[-2::-1])
        assert [s.calls for s in steps] == [iterations * (k + 1) for k in range(len(steps))]
        unit = steps[-1].x.numpy() / math.hypot(1, sigmas[0])
        back = drawn(steps[-1].x, sigmas)
        found.append((float(np.abs(unit - exact(sigmas)).max()), float((back - begun).abs().max())))
    print(f"\n{name}: off in unit noise and drawn again:", " ".join(f"{a:.1e}/{b:.1e}" for a, b in found))
    assert all(b[0] < a[0] and b[1] < a[1] for a, b in pairwise(found[:4]))
    assert found[2][1] < 1e-2 * float(X.abs().max()) and max(found[-1]) < 1e-10


def test_at_a_level_that_stands_for_infinity_single_precision_is_enough() -> None:
    """The unit noise x / start is all that is handed on, and the run from it draws the same."""
    run, x = RUNS["zero terminal SNR"], X.float()
    assert run.sigmas[0] > 1e7
    (*_, last) = invert(ideal, x, run.sigmas, 12)
    unit = last.x / run.start
    assert unit.dtype == torch.float32 and 0.2 < float(unit.std()) < 5
    assert float((drawn(unit * run.start, run.sigmas) - x).abs().max()) < 1e-4
    wide = drawn(unit.double() * run.start, run.sigmas)
    assert float((drawn(unit * run.start, run.sigmas) - wide).abs().max()) < 1e-5


def test_more_iterations_never_miss_by_more() -> None:
    """Also of a denoiser that is no contraction: of each picture the best is kept."""

    def wild(x: Tensor, sigma: float) -> Estimate:
        return Estimate(1.5 * torch.sin(4 * x / math.hypot(1, sigma)))

    sigmas, misses = (2.0, 0.9), []
    for iterations in range(1, 9):
        (step,) = invert(wild, X, sigmas, iterations)
        back = step.x0.lerp(step.x, 0.45)
        assert torch.equal(step.x0, wild(step.x, 2.0).x0)
        misses.append((back - X).flatten(1).norm(dim=1))
    assert (torch.stack(misses).diff(dim=0) <= 0).all() and (misses[-1] < misses[0]).any()
    together = next(invert(wild, X, sigmas, 5)).x
    assert torch.equal(together, torch.cat([next(invert(wild, x[None], sigmas, 5)).x for x in X]))


def test_it_goes_on_after_any_step_with_the_same_bits() -> None:
    sigmas = RUNS["zero terminal SNR"].sigmas[-9:]
    steps = list(invert(ideal, X, sigmas, 2))
    for k, step in enumerate(steps):
        rest = list(invert(ideal, X * math.nan, sigmas, 2, resume=step))
        assert [s.index for s in rest] == list(range(k + 1, 8))
        for a, b in zip(steps[k + 1 :], rest, strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.x0, b.x0) and (a.sigma, a.calls) == (b.sigma, b.calls)


def trips(pipeline: Pipeline, pictures: Tensor, prompts: tuple[str, ...], steps: int, iterations: int) -> Tensor:
    """PSNR [B] of pictures inverted and drawn again (scheduler ddim, guidance 1) beside their trip through the VAE."""
    order = Request(
        prompt=prompts, seed=tuple(range(len(prompts))), scheduler="ddim", num_inference_steps=steps, guidance_scale=1.0
    )
    run = pipeline.run(pipeline.resolve(order), generators(None, range(len(prompts))))
    with torch.inference_mode():
        latents = pipeline.vae.encode(pictures)
        (*_, last) = invert(run.bridge(run.levels), latents, run.levels.sigmas, iterations)
        assert last.calls == steps * iterations and len(latents) == len(prompts)
        (*_, again) = run.steps(last.x / run.levels.start, None)
    return psnr(pipeline.decode(again.latents), pipeline.decode(latents))


def test_a_picture_inverted_and_drawn_again_is_the_picture() -> None:
    """On the model in the box; in few steps, which are harder to go back."""
    pipeline = Pipeline.from_pretrained()
    (*_, last) = pipeline.sample(Request(prompt="an owl", seed=1, num_inference_steps=5))
    pictures = pipeline.decode(last.latents).clamp(-1, 1)
    found = float(trips(pipeline, pictures, ("an owl",), 20, ITERATIONS))
    print(f"20 steps, {ITERATIONS} iterations: {found:.1f} dB")
    assert found >= 35


PROMPTS = ("a taco", "an owl", "a red heart", "a penguin")


@pytest.mark.slow
def test_eight_pictures_in_fifty_steps(noto_font: Path) -> None:
    """Four drawn by the model and four scenes that it has not seen, whose words it is not told.

    Last result, the least of the 8 at 1 to 6 iterations (50 to 300 calls): 12.9, 39.1, 50.8, 57.0, 60.3 and 62.5 dB.
    """
    pipeline = Pipeline.from_pretrained()
    (*_, last) = pipeline.sample(Request(prompt=PROMPTS, seed=(0, 1, 2, 3)))
    pictures = torch.cat([pipeline.decode(last.latents).clamp(-1, 1), held_out_scenes(EmojiScenes(), 4)])
    for iterations in range(1, 7):
        found = trips(pipeline, pictures, (*PROMPTS, *["a picture"] * 4), 50, iterations)
        print(iterations, "iterations:", " ".join(f"{value:.1f}" for value in found), f"; least {found.min():.1f} dB")
        assert iterations < ITERATIONS or found.min() >= 35
