"""DPM-Solver and DPM-Solver++: Lu et al. 2022 (arXiv:2206.00927, 2211.01095), one network call a step.

Two ways to second and third order: multistep, from the estimates of the steps before, and singlestep, which goes back
to the first of two or three levels and takes them together. diffusers' sde-dpmsolver++ of order 3 takes 1/2 from phi_3
with the wrong sign, so that its third-order term does not vanish with h; here it is as in k-diffusion's 3M SDE.
"""

import math

from torch import Tensor

from ldm.errors import UsageError, choose
from ldm.schedulers.exponential import Algorithm, algorithm, phis
from ldm.schedulers.solver import Advance, Leg, Past

SOLVER_TYPES = ("midpoint", "heun")


def multistep(
    solver_order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Advance:
    """DPM-Solver++(2M) (algorithm 2 there), 3M, and their forms for noise and for the reverse SDE.

    solver_order: 1 to 3. solver_type: how D_1 enters at order 2, "midpoint" as phi_1 / 2 (which is phi_2 up to second
    order), "heun" as phi_2. Of lower order: the first steps, a step to sigma 0, whose h is infinite, and as diffusers
    has it the last step with euler_at_final, and the last two with lower_order_final below 15 steps.
    UsageError: an order or a name that is not there.
    """
    how, count = _checked(solver_order, algorithm_type, solver_type)

    def advance(leg: Leg) -> Tensor:
        order = min(count, leg.left) if lower_order_final and len(leg.sigmas) <= 15 else count
        if leg.next == 0 or (euler_at_final and leg.left == 1):
            order = 1
        return _step(leg, how, leg.starts[:order], leg.x, heun=solver_type == "heun", bent=1.0)

    return advance


def singlestep(
    solver_order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> Advance:
    """DPM-Solver-2 and -3, and DPM-Solver++(2S): steps of order 1, 2 (, 3) in turn; the higher ones start again from
    where the first of the turn stood (DPM-Solver, algorithms 1-2; DPM-Solver++, algorithm 1).

    A run that ends at sigma 0 ends with order 1; with lower_order_final all do whose last turn would be whole, as in
    diffusers. solver_type: at order 3 "midpoint" leaves out phi_3. Others and errors as of `multistep`.
    """
    how, count = _checked(solver_order, algorithm_type, solver_type)

    def advance(leg: Leg) -> Tensor:
        total, turn = len(leg.sigmas) - 1, leg.index % count
        if leg.left == 1 and (leg.next == 0 or (lower_order_final and total % count == 0)):
            turn = 0
        points = leg.starts[: turn + 1][::-1]
        if solver_type == "midpoint" and len(points) == 3:
            return _step(leg, how, points[::2], points[0].x, heun=True, bent=0.0)
        return _step(leg, how, points, points[0].x, heun=solver_type == "heun", bent=2.0)

    return advance


def _checked(order: int, algorithm_type: str, solver_type: str) -> tuple[Algorithm, int]:
    choose("solver_type", solver_type, SOLVER_TYPES)
    if order not in (1, 2, 3):
        raise UsageError(f"solver_order is {order!r}; DPM-Solver has orders 1, 2 and 3")
    return algorithm(algorithm_type), order


def _step(leg: Leg, how: Algorithm, points: tuple[Past, ...], x: Tensor, heun: bool, bent: float) -> Tensor:
    """From x at points[0] to the end of the leg, with D_1 and D_2 from the differences to the other points.

    bent: what D_2 is of the second divided difference: 2, or 1 in the multistep form of the authors' code and all
    others, by which its third order is not reached.
    """
    if leg.next == 0:
        return points[0].x0  # for first order, all that is asked for there
    frame = how.step(points[0].sigma, leg.next)
    if frame.h == 0:
        return x
    m, *others = [how.model(point) for point in points]
    # (m_k - m) / r_k, where r_k is the way to that point in lambda, in steps of h
    ways = [math.log(points[0].sigma / point.sigma) / frame.h for point in points[1:]]
    slopes = [(other - m) / way for other, way in zip(others, ways, strict=True)]
    phi = phis(frame.hh, 3)
    terms = [(phi[0], m)]
    if len(slopes) == 1:
        terms.append((phi[1] if heun else phi[0] / 2, slopes[0]))
    elif slopes:
        bend = (slopes[1] - slopes[0]) / (ways[1] - ways[0])
        terms += [(phi[1], slopes[0] - ways[0] * bend), (bent * phi[2], bend)]
    return frame.x_next(leg, x, terms)
