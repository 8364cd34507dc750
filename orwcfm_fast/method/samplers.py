"""Samplers: dx = v(t, x) dt from noise (t=0) to data (t=1). Each is one function `(velocity, x, times) -> x`.

`velocity(t, x)` gets t as a Python float (no host sync, no per-step tensor) and x [B, ...]; it already holds
condition, guidance, precision and the expansion of t to what the network wants. `times` increases.
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import Registry, unknown

Velocity = Callable[[float, Tensor], Tensor]
History = list[tuple[float, Tensor]]
SampleFunction = Callable[[Velocity, Tensor, Sequence[float]], Tensor]

Grid = str | Callable[[int], list[float]]

SOLVERS = Registry("solver")
OWN = "own"


class Solver:
    """A sampler and what it costs: `evals_per_step` · steps + `extra` evaluations; global error O(h^order).

    `min_steps` is the fewest steps it takes; an `adaptive` solver chooses its own steps and ignores nfe.
    """

    def __init__(
        self,
        function: SampleFunction,
        evals_per_step: int,
        order: int,
        extra: int = 0,
        min_steps: int = 1,
        adaptive: bool = False,
    ) -> None:
        self.function, self.evals_per_step, self.order = function, evals_per_step, order
        self.extra, self.min_steps, self.adaptive = extra, min_steps, adaptive
        self.__doc__ = function.__doc__

    def __call__(self, velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
        return self.function(velocity, x, times)

    def steps(self, nfe: int) -> int:
        """The most steps that fit into `nfe` network evaluations."""
        return (nfe - self.extra) // self.evals_per_step

    @property
    def min_nfe(self) -> int:
        return self.evals_per_step * self.min_steps + self.extra


def solver(name: str, evals: int, order: int, **more: int) -> Callable[[SampleFunction], SampleFunction]:
    """Decorator: registers a sampler under its command-line name with its cost and order (see `Solver`)."""

    def register(function: SampleFunction) -> SampleFunction:
        SOLVERS.register(name)(Solver(function, evals, order, **more))  # type: ignore[arg-type]
        return function

    return register


def time_grid(steps: int, grid: Grid = "uniform") -> list[float]:
    """`steps` + 1 times from 0 to 1.

    Args:
        grid: "uniform", or "power:P" for t = 1 − (1−s)^P, P ≥ 1, on uniform s: smaller steps near the data; or a
            function of `steps`, as `Policy.grid` makes of "own". Before there is a policy, "own" is uniform.

    Raises:
        UserError: unknown grid, or P not a number from 1 up.
    """
    if callable(grid):
        return grid(steps)
    s = [i / steps for i in range(steps + 1)]
    if grid in ("uniform", OWN):
        return s
    name, _, value = grid.partition(":")
    if name != "power":
        raise unknown("grid", grid, ["uniform", "power:1.3", OWN])
    if not re.fullmatch(r"\d*\.?\d+", value) or float(value) < 1:
        raise UserError(f"grid '{grid}': P in power:P must be a number from 1 up, e.g. power:1.3")
    return [1 - (1 - u) ** float(value) for u in s]


def times(nfe: int, solver: str, grid: Grid = "uniform") -> list[float]:
    """The time grid on which `solver` makes at most `nfe` network evaluations, and as many as fit.

    Raises:
        UserError: unknown solver or grid; nfe below what the solver needs for its fewest steps.
    """
    method = cast(Solver, SOLVERS.get(solver))
    if method.adaptive:
        return [0.0, 1.0]
    if nfe < method.min_nfe:
        raise UserError(f"nfe {nfe} is too few for solver '{solver}': it needs at least {method.min_nfe}")
    return time_grid(method.steps(nfe), grid)


def solve(velocity: Velocity, x: Tensor, solver: str, nfe: int, grid: Grid = "uniform") -> Tensor:
    """Integrate from t=0 to t=1.

    Args:
        velocity: (t, x) → dx/dt, shaped like x; t a Python float in [0, 1].
        x: noise, [B, ...].
        solver, grid: names; see `SOLVERS` and `time_grid`.
        nfe: network evaluations, of the whole batch; at most this many are made (adaptive solvers ignore it).

    Raises:
        UserError: unknown solver or grid; nfe too small.
    """
    return SOLVERS.get(solver)(velocity, x, times(nfe, solver, grid))


@solver("euler", evals=1, order=1)
def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Euler's method."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(t, x)
    return x


@solver("midpoint", evals=2, order=2)
def midpoint(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Explicit midpoint rule, second order."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        x = x + dt * velocity(t + dt / 2, x + dt / 2 * velocity(t, x))
    return x


@solver("heun", evals=2, order=2)
def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Heun's method (explicit trapezoid), second order."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        v = velocity(t, x)
        x = x + dt / 2 * (v + velocity(t_next, x + dt * v))
    return x


def _rk4_step(velocity: Velocity, x: Tensor, t: float, dt: float) -> tuple[Tensor, Tensor, Tensor]:
    """One step; also its slopes at t and t + dt/2 (the mean of two: O(dt³) off), for multi-step start-up."""
    k1 = velocity(t, x)
    k2 = velocity(t + dt / 2, x + dt / 2 * k1)
    k3 = velocity(t + dt / 2, x + dt / 2 * k2)
    k4 = velocity(t + dt, x + dt * k3)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4), k1, (k2 + k3) / 2


@solver("rk4", evals=4, order=4)
def rk4(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Classical Runge–Kutta, fourth order."""
    for t, t_next in pairwise(times):
        x, _, _ = _rk4_step(velocity, x, t, t_next - t)
    return x


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
    """Adams–Bashforth 4 for any grid, begun by one RK4 step over the first two intervals.

    That step's slopes at its start and middle are the history, so the next step is already of order 3, and
    order 4 is kept with two evaluations more than there are intervals.
    """
    first, second = times[0], times[2]
    x, v_first, v_middle = _rk4_step(velocity, x, first, second - first)
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


def dopri5(
    velocity: Velocity, x: Tensor, times: Sequence[float], rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """Dormand–Prince 5(4) with adaptive steps (torchdiffeq); only the ends of `times` count."""
    from torchdiffeq import odeint

    ends = torch.tensor(
        [times[0], times[-1]], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return odeint(lambda t, x: velocity(float(t), x), x, ends, method="dopri5", rtol=rtol, atol=atol)[-1]


SOLVERS.register("dopri5")(Solver(dopri5, evals_per_step=6, order=5, adaptive=True))
