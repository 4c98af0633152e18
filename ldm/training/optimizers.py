"""Optimisers and learning-rate schedules, by name."""

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.errors import LdmError, UsageError, choose
from ldm.training.config import LoopConfig
from ldm.training.muon import Muon

END = 1e-7  # learning rate at which "polynomial" ends: diffusers' lr_end
MUON_MOMENTUM = 0.95
Options = list[dict[str, Any]]


class Group(NamedTuple):
    """Parameters that share a peak learning rate. decays: whether weight decay draws them towards zero. orthogonal:
    whether Muon takes their matrices for such; tables of embeddings are none.
    """

    params: Sequence[Tensor]
    learning_rate: float
    decays: bool = True
    orthogonal: bool = True


# -- optimisers --------------------------------------------------------------------------------------------------------


def make_optimizer(name: str, groups: Sequence[Group], c: LoopConfig) -> Optimizer:
    """The optimiser of a name in OPTIMIZERS, at the groups' peak learning rates; c gives its other numbers.

    UsageError for an unknown name or numbers that it cannot take, LdmError for a package that is not installed.
    """
    make = OPTIMIZERS[choose("optimizer", name, OPTIMIZERS)]
    for field, value in (("beta1", c.beta1), ("beta2", c.beta2)):
        if not 0 <= value < 1:
            raise UsageError(f"{field} is {value}; it must be at least 0 and below 1")
    if not 0 < c.epsilon < math.inf:
        raise UsageError(f"epsilon is {c.epsilon}; it must be a finite number above 0")
    rates = [("learning_rate", group.learning_rate) for group in groups]
    for field, value in (("weight_decay", c.weight_decay), *rates):
        if not 0 <= value < math.inf:
            raise UsageError(f"{field} is {value}; it must be a finite number, at least 0")
    told: Options = [{"params": list(g.params), "lr": g.learning_rate} for g in groups]
    for one, group in zip(told, groups, strict=True):
        one |= ({} if group.decays else {"weight_decay": 0.0}) | ({} if group.orthogonal else {"orthogonal": False})
    return make(told, c)


def _adamw(groups: Options, c: LoopConfig) -> Optimizer:
    """Loshchilov & Hutter 2019 (arXiv:1711.05101), in one kernel, which there is for CPU and CUDA."""
    return torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), eps=c.epsilon, weight_decay=c.weight_decay, fused=True)


def _adamw8bit(groups: Options, c: LoopConfig) -> Optimizer:
    """AdamW whose moments take a byte each: Dettmers et al. 2022 (arXiv:2110.02861)."""
    if c.device == "cpu" or not torch.cuda.is_available():  # the parameters may not be there yet
        raise UsageError("adamw8bit saves memory of CUDA devices, and this run is on none; use adamw")
    package = _package("bitsandbytes", "adamw8bit")
    made: Optimizer = package.optim.AdamW8bit(
        groups, betas=(c.beta1, c.beta2), eps=c.epsilon, weight_decay=c.weight_decay
    )
    return made


def _prodigy(groups: Options, c: LoopConfig) -> Optimizer:
    """AdamW that finds its step size itself, to be multiplied by the learning rate: Mishchenko & Defazio 2024
    (arXiv:2306.06101). Bias correction and the safeguard for warm-ups are on, as in diffusers' DreamBooth scripts.
    """
    rates = {group["lr"] for group in groups}
    if len(rates) > 1:
        raise UsageError(
            f"prodigy has one learning rate for all parameters, but these have {', '.join(map(str, sorted(rates)))}; "
            "give text_encoder_lr and token_lr the value of learning_rate (1 is usual), or use adamw"
        )
    package = _package("prodigyopt", "prodigy")
    # Given in the groups, not to the whole: then it does not print that it decays weights.
    decayed = [{"weight_decay": c.weight_decay} | group for group in groups]
    made: Optimizer = package.Prodigy(
        decayed, betas=(c.beta1, c.beta2), eps=c.epsilon, use_bias_correction=True, safeguard_warmup=True
    )
    return made


def _sgd(groups: Options, c: LoopConfig) -> Optimizer:
    """Momentum beta1, undamped; weight decay is a part of the gradient (L2), as torch has it."""
    return torch.optim.SGD(groups, momentum=c.beta1, weight_decay=c.weight_decay)


def _muon(groups: Options, c: LoopConfig) -> Optimizer:
    """Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with AdamW's scale and AdamW for the vectors."""
    return Muon(groups, (c.beta1, c.beta2), c.epsilon, c.weight_decay, MUON_MOMENTUM)


def _package(name: str, optimizer: str) -> Any:
    if find_spec(name) is None:
        raise LdmError(f"{name} is not installed, and {optimizer} needs it; run: pip install {name}, or use adamw")
    return import_module(name)


OPTIMIZERS: dict[str, Callable[[Options, LoopConfig], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
    "sgd": _sgd,
    "muon": _muon,
}

# -- schedules of the learning rate ------------------------------------------------------------------------------------

Schedule = Callable[[int, LoopConfig], float]


def _warmed(after: Schedule) -> Schedule:
    """A line from 0 up to the peak, reached after warmup_steps; then `after`."""
    return lambda step, c: step / c.warmup_steps if step < c.warmup_steps else after(step, c)


def _done(step: int, c: LoopConfig) -> float:
    """The part of the steps after the warm-up that is done."""
    return (step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)


def _linear(step: int, c: LoopConfig) -> float:
    return max(0.0, (c.steps - step) / max(1, c.steps - c.warmup_steps))


def _cosine(step: int, c: LoopConfig) -> float:
    return 0.5 * (1 + math.cos(math.pi * _done(step, c)))


def _cosine_with_restarts(step: int, c: LoopConfig) -> float:
    done = _done(step, c)
    return 0.5 * (1 + math.cos(math.pi * (c.lr_num_cycles * done % 1))) if done < 1 else 0.0


def _polynomial(step: int, c: LoopConfig) -> float:
    """UsageError unless the peak is above the end, and the power at least 0."""
    if not c.learning_rate > END:
        raise UsageError(f"learning_rate is {c.learning_rate}; polynomial ends at {END}, so it must be above that")
    if not 0 <= c.lr_power < math.inf:
        raise UsageError(f"lr_power is {c.lr_power}; it must be a finite number, at least 0")
    if step < c.warmup_steps:
        return step / c.warmup_steps
    if step > c.steps:
        return END / c.learning_rate
    left: float = (1 - _done(step, c)) ** c.lr_power
    return ((c.learning_rate - END) * left + END) / c.learning_rate


def _cosine_to_share(step: int, c: LoopConfig) -> float:
    """A line from 1 / warmup_steps up to the peak, then half a cosine down to final_share of it."""
    if step < c.warmup_steps:
        return (step + 1) / c.warmup_steps
    return c.final_share + (1 - c.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, _done(step, c))))


RATES: dict[str, Schedule] = {
    "constant": lambda step, c: 1.0,
    "constant_with_warmup": _warmed(lambda step, c: 1.0),
    "linear": _warmed(_linear),
    "cosine": _warmed(_cosine),
    "cosine_with_restarts": _warmed(_cosine_with_restarts),
    "polynomial": _polynomial,
    "cosine_to_share": _cosine_to_share,
}
"""(steps done, configuration) -> factor of the peak learning rate. All but the last are those of
diffusers.optimization.get_scheduler, step by step: after a warm-up the first step has rate 0.
"""
