"""UniPC: Zhao et al. 2023 (arXiv:2302.04867), a predictor and a corrector of one form; one network call a step."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm.diffusion.prediction import Estimate
from ldm.errors import UsageError, choose
from ldm.schedulers.exponential import Algorithm, algorithm, phis
from ldm.schedulers.solver import Advance, Leg, Past

BH = ("bh1", "bh2")


def unipc(
    solver_order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
) -> Advance:
    """Each step first corrects x by what the network says there, then predicts the next (algorithms 5-8 there).

    solver_order: of the predictor, 1 to 4; the corrector adds one. solver_type: B(h) = h ("bh1") or e^h - 1 ("bh2").
    predict_x0: of data, else of noise. lower_order_final: the last steps are of lower order, as in diffusers.
    disable_corrector: steps after which x is not corrected. A step to sigma 0, whose h is infinite, takes x0 (where
    diffusers' bh1 is not a number). UsageError: an order or a name that is not there.
    """
    choose("solver_type", solver_type, BH)
    if solver_order not in (1, 2, 3, 4):
        raise UsageError(f"solver_order is {solver_order!r}; UniPC has orders 1 to 4 here")
    how = algorithm("dpmsolver++" if predict_x0 else "dpmsolver")

    def order_at(leg: Leg, index: int) -> int:
        left = len(leg.sigmas) - 1 - index
        return min(solver_order, index + 1, left if lower_order_final else solver_order)

    def advance(leg: Leg) -> Tensor:
        if leg.past and leg.index - 1 not in disable_corrector:
            order = order_at(leg, leg.index - 1)
            corrected = _update(leg, how, leg.past[:order], leg.sigma, solver_type, leg.starts[0])
            if not predict_x0:  # the noise stays what the network said: x0 moves along with x
                leg.said = Estimate(leg.x0 + (corrected - leg.x))
            leg.x = corrected
        if leg.next == 0:
            return leg.toward(leg.x0, 0.0)
        return _update(leg, how, leg.starts[: order_at(leg, leg.index)], leg.next, solver_type, None)

    return advance


def _update(
    leg: Leg, how: Algorithm, starts: Sequence[Past], end: float, solver_type: str, there: Past | None
) -> Tensor:
    """From starts[0] to the level `end`: equation 3, or with the estimate there equation 9."""
    frame = how.step(starts[0].sigma, end)
    if frame.h == 0:
        return starts[0].x
    points = [*starts[1:], *([there] if there else [])]
    m = how.model(starts[0])
    ways = [math.log(starts[0].sigma / point.sigma) / frame.h for point in points]
    phi, b_of_h = phis(frame.hh, len(points) + 1), frame.hh if solver_type == "bh1" else phis(frame.hh, 1)[0]
    # R rho = b with R_ik = r_k^(i-1), b_i = i! phi_(i+1) / B(h); of one unknown it is 1/2 to this order
    rhos = [0.5] * len(points)
    if len(points) > 1:
        wanted = [math.factorial(i) * phi[i] / b_of_h for i in range(1, len(points) + 1)]
        rhos = np.linalg.solve(np.vander(ways, increasing=True).T, wanted).tolist()
    terms = [(phi[0], m)]
    for rho, way, point in zip(rhos, ways, points, strict=True):
        terms.append((b_of_h * rho / way, how.model(point) - m))
    return frame.x_next(leg, starts[0].x, terms)
