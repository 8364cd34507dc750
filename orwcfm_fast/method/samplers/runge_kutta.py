"""Explicit Runge–Kutta methods with fixed steps."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from orwcfm_fast.method.samplers.solver import Velocity, solver


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


def rk4_step(velocity: Velocity, x: Tensor, t: float, dt: float) -> tuple[Tensor, Tensor, Tensor]:
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
        x, _, _ = rk4_step(velocity, x, t, t_next - t)
    return x
