"""Optimisers against published formulas and the packages they come from; learning-rate schedules against diffusers and
torch; what must be kept of an optimiser for a run to go on as if it had never stopped.
"""

import contextlib
import dataclasses
import io
import json
import math
from typing import Any

import prodigyopt
import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load, save
from torch import Tensor, nn

from ldm.errors import LdmError, UsageError
from ldm.training import optimizers
from ldm.training.config import LoopConfig
from ldm.training.lora_config import NAMED
from ldm.training.optimizers import OPTIMIZERS, RATES, Group, make_optimizer

C = LoopConfig("nowhere", learning_rate=1e-2, beta1=0.8, beta2=0.95, epsilon=1e-2, weight_decay=0.03)
SHAPES = ((4, 3), (5,), (2, 3, 2))
RATE = {"adamw": (1e-2, 3e-3), "prodigy": (1.0, 1.0), "sgd": (1e-2, 3e-3)}  # of the first parameter and of the others
STEPS = 40


def fresh() -> list[nn.Parameter]:
    """Parameters, one of them all 0 as the second factor of a LoRA is."""
    draws = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=draws, dtype=torch.float64).float() for shape in SHAPES]
    return [nn.Parameter(values[0]), nn.Parameter(values[1] * 0), nn.Parameter(values[2])]


def made(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    first, others = RATE[name]
    return make_optimizer(name, [Group(parameters[:1], first), Group(parameters[1:], others)], C)


def goal(step: int, i: int) -> float:
    """What parameter i is drawn to."""
    return 3 * math.sin(i + 1) + 0.1 * math.sin(step)


def gradients(step: int, parameters: list[nn.Parameter]) -> None:
    """A gradient that depends on where the parameters are, and on the step."""
    for i, p in enumerate(parameters):
        p.grad = p.detach() - goal(step, i)


def walk(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], begin: int, end: int) -> None:
    for step in range(begin, end):
        gradients(step, parameters)
        optimizer.step()


# -- optimisers --------------------------------------------------------------------------------------------------------


def adamw(p: Tensor, g: Tensor, state: dict[str, Any], lr: float, step: int) -> Tensor:
    """Loshchilov & Hutter 2019, algorithm 2, with the decay at the rate of the step as in torch."""
    state["m"] = C.beta1 * state.get("m", 0) + (1 - C.beta1) * g
    state["v"] = C.beta2 * state.get("v", 0) + (1 - C.beta2) * g * g
    m, v = state["m"] / (1 - C.beta1**step), state["v"] / (1 - C.beta2**step)
    return p - lr * (m / (v.sqrt() + C.epsilon) + C.weight_decay * p)


def sgd(p: Tensor, g: Tensor, state: dict[str, Any], lr: float, step: int) -> Tensor:
    """Momentum without damping, decay in the gradient."""
    state["m"] = C.beta1 * state.get("m", 0) + g + C.weight_decay * p
    return p - lr * state["m"]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_are_the_published_ones(name: str) -> None:
    parameters = fresh()
    optimizer = made(name, parameters)
    rule = {"adamw": adamw, "sgd": sgd}[name]
    wanted = [p.detach().double() for p in parameters]
    states: list[dict[str, Any]] = [{} for _ in wanted]
    for step in range(STEPS):
        gradients(step, parameters)
        optimizer.step()
        for i, p in enumerate(wanted):
            wanted[i] = rule(p, p - goal(step, i), states[i], RATE[name][min(i, 1)], step + 1)
    for p, w in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_adamw_is_fused() -> None:
    assert all(group["fused"] for group in made("adamw", fresh()).param_groups)


def test_prodigy_is_that_of_diffusers_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = fresh(), fresh()
    optimizer = made("prodigy", ours)
    assert capsys.readouterr() == ("", "")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it decays weights
        oracle = prodigyopt.Prodigy(
            theirs, lr=1.0, betas=(C.beta1, C.beta2), eps=C.epsilon, weight_decay=C.weight_decay, decouple=True,
            use_bias_correction=True, safeguard_warmup=True,
        )  # fmt: skip
    walk(optimizer, ours, 0, STEPS)
    walk(oracle, theirs, 0, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert optimizer.param_groups[0]["d"] > 100 * optimizer.param_groups[0]["d0"]  # it has found a step size
    assert capsys.readouterr() == ("", "")


def resumed(name: str, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """A new optimiser of the parameters, with tensors and finite numbers of the old one's state and groups."""
    entries = {f"{i}/{k}": torch.as_tensor(v) for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    scalars = [
        {k: v for k, v in group.items() if isinstance(v, int | float) and math.isfinite(v)}
        for group in optimizer.state_dict()["param_groups"]
    ]
    tensors, numbers = load(save(entries)), json.loads(json.dumps(scalars))
    again = made(name, parameters)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, field = key.split("/")
        state.setdefault(int(index), {})[field] = value
    groups = [g | n for g, n in zip(again.state_dict()["param_groups"], numbers, strict=True)]
    again.load_state_dict({"state": state, "param_groups": groups})
    return again


@pytest.mark.parametrize("name", RATE)
def test_tensors_and_numbers_are_all_of_a_state(name: str) -> None:
    whole, halves = fresh(), fresh()
    walk(made(name, whole), whole, 0, STEPS)
    optimizer = made(name, halves)
    for begin in range(0, STEPS, 10):
        walk(optimizer, halves, begin, begin + 10)
        optimizer = resumed(name, optimizer, halves)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_prodigy_does_nothing_at_rate_0_and_goes_on() -> None:
    """As at the first step of a warm-up."""
    parameters, before = fresh(), fresh()
    optimizer = made("prodigy", parameters)
    for rate in (0.0, 1.0):
        for group in optimizer.param_groups:
            group["lr"] = rate
        walk(optimizer, parameters, 0, 3)
        assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True)) == (rate == 0)


@pytest.mark.cuda
def test_8_bit_moments_stay_near_those_of_adamw() -> None:
    pytest.importorskip("bitsandbytes")
    draws = torch.Generator().manual_seed(0)
    start = torch.randn(128, 64, generator=draws)  # below 4096 numbers it would keep all bits
    walked = []
    for name in ("adamw", "adamw8bit"):
        parameter = nn.Parameter(start.cuda())
        walk(make_optimizer(name, [Group([parameter], 1e-2)], C), [parameter], 0, STEPS)
        walked.append(parameter.detach().cpu())
    whole, eighth = walked
    assert 0 < (eighth - whole).norm() < 0.05 * (whole - start).norm()


# -- schedules ---------------------------------------------------------------------------------------------------------


def theirs(name: str, c: LoopConfig) -> Any:
    """diffusers' schedule of a rate, and the optimiser it drives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=c.learning_rate)
    return optimizer, get_scheduler(
        name, optimizer, num_warmup_steps=c.warmup_steps, num_training_steps=c.steps, num_cycles=c.lr_num_cycles,
        power=c.lr_power,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMED["lr_scheduler"])
def test_rates_are_those_of_diffusers_at_every_step(name: str) -> None:
    for steps in (1, 2, 7, 120):
        for warmup in (0, 1, 3, 50, 120, 130):
            for cycles, power, rate in ((1, 1.0, 1e-3), (3, 2.0, 1.0), (4, 0.5, 2e-7)):
                c = LoopConfig("", steps=steps, warmup_steps=warmup, learning_rate=rate)
                c = dataclasses.replace(c, lr_num_cycles=cycles, lr_power=power)
                (factor,) = theirs(name, c)[1].lr_lambdas
                for step in range(steps + 30):
                    if name == "polynomial" and step == steps == warmup:
                        continue  # where theirs divides by 0
                    assert RATES[name](step, c) == factor(step), (c, step)


@pytest.mark.parametrize("name", NAMED["lr_scheduler"])
def test_rates_are_those_that_a_loop_with_diffusers_steps_at(name: str) -> None:
    c = LoopConfig("", steps=20, warmup_steps=5, learning_rate=1e-3)
    optimizer, schedule = theirs(name, c)
    for step in range(c.steps):
        assert c.learning_rate * RATES[name](step, c) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("steps", "warmup", "share"), [(50, 8, 0.05), (30, 0, 0.0), (40, 39, 0.5), (5, 9, 0.1)])
def test_cosine_to_share_is_torchs_after_a_line(steps: int, warmup: int, share: float) -> None:
    c = LoopConfig("", steps=steps, warmup_steps=warmup, learning_rate=2e-3, final_share=share)
    got = [RATES["cosine_to_share"](step, c) for step in range(steps + 20)]
    assert got[:warmup] == [(step + 1) / warmup for step in range(min(warmup, steps + 20))]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    length = max(1, steps - warmup)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=length, eta_min=share)
    for step in range(warmup, warmup + length + 1):
        assert RATES["cosine_to_share"](step, c) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        annealing.step()
    assert got[-1] == pytest.approx(share)  # and stays there


# -- names and refusals ------------------------------------------------------------------------------------------------


def test_options_of_a_run_are_those_there_are() -> None:
    # Muon makes whole matrices orthogonal; the thin ones of a LoRA would not gain what it costs.
    assert [*NAMED["optimizer"]] == [name for name in OPTIMIZERS if name != "muon"]
    assert [*NAMED["lr_scheduler"], "cosine_to_share"] == list(RATES)
    assert {field.name: field.default for field in dataclasses.fields(LoopConfig)}["lr_scheduler"] in RATES


@pytest.mark.parametrize(
    ("field", "value"),
    [("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.5), ("beta2", math.nan), ("epsilon", 0.0), ("epsilon", math.inf),
     ("weight_decay", -1.0), ("weight_decay", math.inf), ("learning_rate", -1e-3), ("learning_rate", math.nan)],
)  # fmt: skip
def test_bad_numbers_are_refused(field: str, value: float) -> None:
    c = dataclasses.replace(C, **{field: value})
    for name in OPTIMIZERS:
        with pytest.raises(UsageError, match=f"{field} is {value}; it must be "):
            make_optimizer(name, [Group(fresh(), c.learning_rate)], c)


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'adamw'"):
        make_optimizer("adam", [Group(fresh(), 1.0)], C)


def test_prodigy_refuses_rates_that_differ() -> None:
    with pytest.raises(
        UsageError, match=r"one learning rate for all.* 0\.005, 1\.0; give text_encoder_lr and token_lr"
    ):
        make_optimizer("prodigy", [Group(fresh()[:1], 1.0), Group(fresh()[1:], 5e-3)], C)


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes")])
def test_a_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda asked: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(LdmError, match=f"{package} is not installed, and {name} needs it; run: pip install {package}"):
        make_optimizer(name, [Group(fresh(), 1.0)], C)


@pytest.mark.parametrize(("device", "there"), [("auto", False), ("cpu", True)])
def test_8_bit_adam_needs_cuda(device: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    with pytest.raises(UsageError, match=r"memory of CUDA devices, .* use adamw"):
        make_optimizer("adamw8bit", [Group(fresh(), 1e-3)], dataclasses.replace(C, device=device))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 1e-7}, "learning_rate is 1e-07; polynomial ends at 1e-07"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"lr_power": -1.0}, r"lr_power is -1\.0"),
        ({"lr_power": math.nan}, "lr_power is nan"),
    ],
)
def test_polynomial_refuses_what_it_cannot_do_before_the_first_step(change: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RATES["polynomial"](0, dataclasses.replace(C, warmup_steps=10, **change))
