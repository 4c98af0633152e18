"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal before they are a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Of Jordan et al.: singular values from 0.01 to 1 come to 0.7 .. 1.2 in five rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
LEAST_SIDE = 8  # matrices of fewer rows or columns have little to make orthogonal
AT_ONCE = 2**17  # numbers of one batched product: small matrices together, large ones one by one, as caches like it


def orthogonal(updates: Tensor) -> Tensor:
    """Matrices [k, m, n] -> of each about U V^T of its singular value decomposition U S V^T.

    Newton-Schulz, X <- (a + b G + c G^2) X with G = X X^T, is run on the Gram matrix of the shorter side alone: the
    factors of X commute, so that they are gathered in one [m, m] matrix and meet X once.
    """
    tall = updates.shape[1] > updates.shape[2]
    x = updates.mT if tall else updates
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT
    gathered = factor = _factor(gram)
    for _ in range(ROUNDS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        gathered = factor @ gathered
    made: Tensor = gathered @ x
    return made.mT if tall else made


def _factor(gram: Tensor) -> Tensor:
    """a + b G + c G^2."""
    a, b, c = QUINTIC
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


class Muon(Optimizer):
    """Muon for weights of two or more dimensions (a convolution's [out, in, h, w] is the matrix [out, h w in]), AdamW
    for all others, and for groups whose `orthogonal` is False: tables of embeddings.

    A Muon step is scaled by 0.2 sqrt(longer side), so that its root mean square is AdamW's (Liu et al. 2025,
    arXiv:2502.16982, eq. 4) and both share learning rate and weight decay. Nesterov momentum. Moments are float32.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, weight_decay: float, momentum: float
    ) -> None:
        own = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum, "orthogonal": True}
        super().__init__(groups, own)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient; small matrices of one shape are made orthogonal together."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if group["orthogonal"] and p.ndim > 1 and min(len(p), p[0].numel()) >= LEAST_SIDE:
                    update = _nesterov(p.grad.float(), self.state[p], group)
                    matrix = update.movedim(1, -1).flatten(1)  # a view, where convolutions have their channels last
                    alike.setdefault(matrix.shape, []).append((p.movedim(1, -1), matrix))
                else:
                    p.sub_(group["lr"] * _adam(p.grad.float(), self.state[p], group))
            for (rows, columns), found in alike.items():
                together = max(1, AT_ONCE // (rows * columns))
                rate = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
                for some in (found[i : i + together] for i in range(0, len(found), together)):
                    steps = orthogonal(torch.stack([matrix for _, matrix in some]))
                    for (weight, _), step in zip(some, steps, strict=True):
                        weight.sub_(step.view(weight.shape), alpha=rate)


def _nesterov(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    mean = _kept(state, "exp_avg", grad)
    mean.lerp_(grad, 1 - group["momentum"])
    return grad.lerp(mean, group["momentum"])


def _adam(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    mean, square = (_kept(state, name, grad) for name in ("exp_avg", "exp_avg_sq"))
    count = state["step"] = state.get("step", 0) + 1
    beta1, beta2 = group["betas"]
    mean.lerp_(grad, 1 - beta1)
    square.lerp_(grad.square(), 1 - beta2)
    step: Tensor = mean / (1 - beta1**count) / ((square / (1 - beta2**count)).sqrt() + group["eps"])
    return step


def _kept(state: dict[str, Any], name: str, grad: Tensor) -> Tensor:
    """A moment of a parameter, zero at first."""
    if name not in state:
        state[name] = torch.zeros_like(grad)
    moment: Tensor = state[name]
    return moment
