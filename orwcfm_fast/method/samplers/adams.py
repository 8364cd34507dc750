"""Adams methods: one evaluation a step, with the velocities of the last steps, on any grid."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from orwcfm_fast.method.samplers.runge_kutta import rk4_step
from orwcfm_fast.method.samplers.solver import Velocity, solver

History = list[tuple[float, Tensor]]


def adams_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """∫ℓ_j(t) dt over [start, end] for the Lagrange polynomials ℓ_j of `nodes` (at most 6).

    With the last k evaluation times as nodes these are the variable-step Adams–Bashforth weights
    (Hairer, Nørsett & Wanner, Solving ODEs I, III.5); on equal steps the textbook ones.
    """
    mean, half = (start + end) / 2, (end - start) / 2
    # 3-point Gauss–Legendre: exact to degree 5
    gauss = [
        (mean - half * 0.6**0.5, half * 5 / 9),
        (mean, half * 8 / 9),
        (mean + half * 0.6**0.5, half * 5 / 9),
    ]
    weights = []
    for j, node in enumerate(nodes):
        weight = 0.0
        for t, w in gauss:
            for m, other in enumerate(nodes):
                if m != j:
                    w *= (t - other) / (node - other)
            weight += w
        weights.append(weight)
    return weights


def _advance(x: Tensor, start: float, end: float, history: History) -> Tensor:
    """x plus the integral over [start, end] of the polynomial through `history`'s (time, velocity)."""
    for weight, (_, v) in zip(adams_weights([t for t, _ in history], start, end), history, strict=True):
        x = x + weight * v
    return x


def _adams_bashforth(
    velocity: Velocity, x: Tensor, times: Sequence[float], order: int, history: History
) -> Tensor:
    for t, t_next in pairwise(times):
        history = [*history, (t, velocity(t, x))][-order:]
        x = _advance(x, t, t_next, history)
    return x


@solver("ab2", evals=1, order=2)
def ab2(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Adams–Bashforth 2 for any grid; the first step is Euler's, whose O(h²) is within the order."""
    return _adams_bashforth(velocity, x, times, 2, [])


@solver("ab4", evals=1, order=4, extra=2, min_steps=2)
def ab4(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Adams–Bashforth 4 for any grid, started by one RK4 step over the first two intervals.

    That step's slopes at its start and middle are the history, so the next step is already of order 3, and
    order 4 is kept with two evaluations more than there are intervals.
    """
    first, second = times[0], times[2]
    x, v_first, v_middle = rk4_step(velocity, x, first, second - first)
    return _adams_bashforth(velocity, x, times[2:], 4, [(first, v_first), ((first + second) / 2, v_middle)])


@solver("abm4", evals=1, order=3, extra=1)
def abm4(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Adams–Bashforth–Moulton 4 in predict–evaluate–correct mode, for any grid; steps + 1 evaluations.

    The velocity at a predicted point corrects that point and is then kept, not evaluated again: PEC mode
    (Lambert, Numerical Methods for ODEs, 4.2), the trick of UniPC (Zhao et al., NeurIPS 2023). Orders rise from
    1 to 4 in the first steps, whose points are corrected from the very start; the first predicted point's
    velocity keeps an O(h²) error, so the order is 3. The most accurate at 12 evaluations on 2-D models.
    """
    history = [(times[0], velocity(times[0], x))]
    corrected = x
    for i, (t, t_next) in enumerate(pairwise(times)):
        predicted = _advance(corrected, t, t_next, history)
        history = [*history, (t_next, velocity(t_next, predicted))][-4:]
        origin, start = (x, times[0]) if i < 3 else (corrected, t)  # start-up: from the very beginning
        corrected = _advance(origin, start, t_next, history)
    return corrected
