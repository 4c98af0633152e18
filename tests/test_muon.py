"""Muon: its matrices against singular value decompositions and the plain iteration, its steps against torch's own, its
states against a run without an interruption.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.training.config import LoopConfig
from ldm.training.ema import EMA
from ldm.training.loop import Batch, Stage, train
from ldm.training.muon import LEAST_SIDE, QUINTIC, ROUNDS, Muon, orthogonal
from ldm.training.optimizers import Group, make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(8, 8), (16, 27), (27, 16), (32, 288), (64, 8), (48, 48)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quintic(singular: np.ndarray) -> np.ndarray:
    """What five rounds of s <- a s + b s^3 + c s^5 make of singular values."""
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        singular = a * singular + b * singular**3 + c * singular**5
    return singular


def plain(x: Tensor) -> Tensor:
    """Newton-Schulz as Jordan et al. write it, on the matrix itself."""
    a, b, c = QUINTIC
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


# -- matrices ----------------------------------------------------------------------------------------------------------


def test_the_quintic_brings_singular_values_near_one() -> None:
    """Published: those from 0.01 to 1 come into 0.7 .. 1.2, and none leaves it upwards."""
    made = quintic(np.linspace(0, 1, 200_001))
    assert made.min() == 0 and made.max() < 1.21
    assert made[2000:].min() > 0.68  # from 0.01 on


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    """U f(S / |S|) V^T of the decomposition U S V^T, with f the five quintics: exact in float64."""
    x = drawn(*shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    wanted = u @ torch.diag(torch.from_numpy(quintic((s / s.norm()).numpy()))) @ v
    made = orthogonal(x[None])[0]
    assert made.shape == shape and torch.allclose(made, wanted, rtol=0, atol=1e-6)
    again = torch.linalg.svdvals(made)
    assert int((again > 0.68).sum()) >= int((s / s.norm() > 0.01).sum()) >= 0.9 * min(shape) and again.max() < 1.21


@pytest.mark.parametrize("shape", [*SHAPES, (128, 1152)])
def test_orthogonal_is_the_plain_iteration(shape: tuple[int, int]) -> None:
    """On the Gram matrix alone: to the last digits in float64, and in float32 as near as that allows."""
    x = drawn(*shape, seed=1) @ torch.diag(torch.logspace(0, -2, shape[1], dtype=torch.float64))  # well and ill-posed
    wanted = plain(x)
    assert float((orthogonal(x[None])[0] - wanted).abs().max()) <= 1e-10
    assert float((orthogonal(x[None].float())[0] - wanted).abs().max()) <= 2e-4


def test_matrices_are_made_orthogonal_each_for_itself() -> None:
    """Several at once, of very different sizes; one that is zero stays so."""
    stack = drawn(4, 12, 30) * torch.tensor([1.0, 1e-4, 1e4, 0.0], dtype=torch.float64)[:, None, None]
    made = orthogonal(stack)
    assert all(torch.allclose(made[i], plain(stack[i]), rtol=0, atol=1e-10) for i in range(4))
    assert not made[3].any() and torch.isfinite(made).all()


# -- the optimiser -----------------------------------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {"betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9}
LAID = {  # name: shape of a parameter, and whether Muon takes it
    "square": ((12, 12), True), "wide": ((16, 40), True), "tall": ((40, 16), True), "alike": ((16, 40), True),
    "vector": ((40,), False), "thin": ((4, 40), False), "narrow": ((40, 5), False),
}  # fmt: skip


def parameters(shapes: dict[str, tuple[tuple[int, ...], bool]]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(drawn(*shape, seed=i).float()) for i, (name, (shape, _)) in enumerate(shapes.items())}


def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Muon with AdamW's scale for matrices, its AdamW for the rest, for twelve steps. torch's rounds its iteration
    to bfloat16, which is left out here.
    """
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())
    ours, theirs = parameters(LAID), parameters(LAID)
    matrices, others = ([p for name, p in theirs.items() if LAID[name][1] == taken] for taken in (True, False))
    scale = "match_rms_adamw"
    optimizers = [
        Muon([{"params": list(ours.values()), "lr": 0.02}], **OPTIONS),
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn=scale),
        torch.optim.AdamW(others, lr=0.02, betas=(0.9, 0.97), weight_decay=0.1),
    ]
    for step in range(12):
        for i, (a, b) in enumerate(zip(ours.values(), theirs.values(), strict=True)):
            a.grad = b.grad = 1e-3 * drawn(*a.shape, seed=100 * step + i).float()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
            optimizer.step()
    begun = parameters(LAID)
    for name, p in ours.items():
        moved = float((p - begun[name]).detach().abs().max())
        assert moved > 0.01 and float((p - theirs[name]).detach().abs().max()) <= 1e-3 * moved, name


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_the_matrix_of_its_rows(channels_last: bool) -> None:
    """[out, in, h, w] moves as [out, in h w] does, however it lies in memory, and the same in a group of its own."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    kernels = [nn.Parameter(drawn(16, 10, 3, 3, seed=i).float().contiguous(memory_format=form)) for i in range(3)]
    flat = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in kernels]
    together = Muon([{"params": kernels, "lr": 0.1}], **OPTIONS)
    alone = Muon([{"params": [p], "lr": 0.1} for p in flat], **OPTIONS)
    for step in range(5):
        for i, (kernel, matrix) in enumerate(zip(kernels, flat, strict=True)):
            gradient = drawn(16, 10, 3, 3, seed=10 * step + i).float()
            kernel.grad, matrix.grad = gradient.contiguous(memory_format=form), gradient.flatten(1)
        together.step()
        alone.step()
    for kernel, matrix in zip(kernels, flat, strict=True):
        assert torch.allclose(kernel.flatten(1), matrix, rtol=0, atol=1e-5)
        assert kernel.is_contiguous(memory_format=form)


def test_a_step_has_the_size_of_adamw_s() -> None:
    """Root mean square 0.2 of the rate, more or less: the singular values lie between 0.7 and 1.2."""
    for shape in ((32, 32), (16, 200), (200, 16)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = drawn(*shape).float()
        Muon([{"params": [p], "lr": 1.0}], **OPTIONS | {"weight_decay": 0.0}).step()
        assert 0.2 * 0.68 <= float(p.detach().square().mean().sqrt()) <= 0.2 * 1.21


def test_what_has_no_gradient_stays() -> None:
    a, b = nn.Parameter(torch.ones(10, 10)), nn.Parameter(torch.ones(10))
    optimizer = Muon([{"params": [a, b], "lr": 0.1}], **OPTIONS)
    optimizer.step()
    assert bool((a == 1).all()) and bool((b == 1).all()) and not optimizer.state
    b.grad = torch.ones(10)
    optimizer.step()
    assert bool((a == 1).all()) and not (b == 1).any()


# -- states ------------------------------------------------------------------------------------------------------------


def gradients(optimizer: torch.optim.Optimizer, step: int) -> None:
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = drawn(*p.shape, seed=50 * step + i).float()


def test_a_state_makes_the_round_trip() -> None:
    """By state_dict, into an optimiser that was elsewhere; moments are called as AdamW's are."""
    shapes = LAID | {"kernel": ((16, 8, 3, 3), True)}
    whole, again = (parameters(shapes) for _ in range(2))
    first, second = (Muon([{"params": list(ps.values()), "lr": 0.1}], **OPTIONS) for ps in (whole, again))
    for step in range(3):
        gradients(first, step)
        first.step()
    gradients(second, 77)
    second.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for name, p in again.items():
        p.data = whole[name].data.clone()
    for step in range(3, 6):
        for optimizer in (first, second):
            gradients(optimizer, step)
            optimizer.step()
    assert all(torch.equal(whole[name], again[name]) for name in shapes)
    kept = {name: set(state) for name, state in zip(shapes, first.state_dict()["state"].values(), strict=True)}
    for name, (_, taken) in shapes.items():
        assert kept[name] == ({"exp_avg"} if taken else {"exp_avg", "exp_avg_sq", "step"})


class Small(nn.Module):
    """A convolution, a matrix and vectors, to be fitted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(2, LEAST_SIDE, 3), nn.GELU(), nn.Conv2d(LEAST_SIDE, 16, 3), nn.Flatten(), nn.Linear(64, 12)
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.model(batch[0]) - batch[1]).square().mean(), {}


class Numbers(Dataset[Batch]):
    def __getitem__(self, index: int) -> Batch:
        x = drawn(4, 2, 6, 6, seed=index).float()
        return x, x.flatten(1)[:, :12]


def nothing(*args: Any) -> Any:
    raise AssertionError("not wanted here")


def steps(out: Path) -> Iterator[int]:
    c = LoopConfig(str(out), steps=8, optimizer="muon", learning_rate=0.05, warmup_steps=2, save_every=3, workers=0,
                   device="cpu", weight_decay=0.01)  # fmt: skip
    objective = Small()
    stage = Stage(objective, objective.model, Numbers(), nothing, nothing, nothing)
    for progress in train(stage, c, {}, EMA(objective.model, 0.9)):
        yield progress.step


def test_a_resumed_run_ends_as_if_unbroken(tmp_path: Path) -> None:
    assert list(steps(tmp_path / "whole")) == [1, 2, 3, 4, 5, 6, 7, 8]
    broken = steps(tmp_path / "broken")
    assert [next(broken) for _ in range(5)] == [1, 2, 3, 4, 5]
    broken.close()
    assert list(steps(tmp_path / "broken")) == [4, 5, 6, 7, 8]
    ended, wanted = (load_file(tmp_path / name / "state-8" / "state.safetensors") for name in ("broken", "whole"))
    assert ended.keys() == wanted.keys() and all(torch.equal(ended[key], value) for key, value in wanted.items())
    begun = load_file(tmp_path / "whole" / "state-6" / "state.safetensors")
    assert {key for key, value in wanted.items() if torch.equal(begun[key], value)} <= {
        key for key in wanted if key.startswith("group/")
    }


def test_a_run_asks_for_it_by_name(tmp_path: Path) -> None:
    """With the run's betas, epsilon and decay; groups keep rates of their own, and may not decay."""
    a, b = nn.Parameter(torch.zeros(9, 9)), nn.Parameter(torch.zeros(9))
    c = LoopConfig(str(tmp_path), beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.3)
    made = make_optimizer("muon", [Group([a], 0.1), Group([b], 0.2, decays=False)], c)
    assert isinstance(made, Muon)
    first, second = made.param_groups
    assert (first["lr"], first["weight_decay"], second["lr"], second["weight_decay"]) == (0.1, 0.3, 0.2, 0.0)
    assert first["betas"] == (0.8, 0.95) and first["eps"] == 1e-6 and first["momentum"] == 0.95
