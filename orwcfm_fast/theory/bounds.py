"""The paper's D, and the bound chain from the velocity gap to W2 as an identity in 1-D."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from orwcfm_fast.theory.velocity import ExactVelocity

TIME_NODES = 12


def _legendre(n: int) -> tuple[list[float], list[float]]:
    """Gauss–Legendre nodes and weights on [0, 1]."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(n)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def paper_drift(velocity: ExactVelocity, reference: ExactVelocity) -> Tensor:
    """D(x1) = ∫ E_{x0} ‖v(t, x_t) − v_ref(t, x_t)‖² dt, x_t = (1−t)·x0 + t·x1, on the grid → [P].

    Gauss–Legendre in t; for each t the gap is evaluated on a grid of its own that covers x_t to six
    standard deviations, and averaged over x0 axis by axis.
    """
    grid = velocity.grid
    total = torch.zeros_like(velocity.density)

    def gap(t: float, x: Tensor) -> Tensor:
        return ((velocity(t, x) - reference(t, x)) ** 2).sum(1)

    for t, weight in zip(*_legendre(TIME_NODES), strict=True):
        s = 1 - t
        if t * (1 + velocity.finest) > 1:
            total += weight * gap(t, t * grid.points)
            continue
        axes, kernels = [], []
        for axis in grid.axes:
            spread = torch.linspace(-6 * s, 6 * s, 2, dtype=torch.float64)
            x = torch.linspace(
                float(t * axis[0] + spread[0]),
                float(t * axis[-1] + spread[1]),
                len(axis),
                dtype=torch.float64,
            )
            exponent = (-0.5 * ((x - t * axis[:, None]) / s) ** 2).clamp_min(-161)
            kernel = exponent.exp()
            axes.append(x)
            kernels.append(kernel / kernel.sum(1, keepdim=True))
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, grid.dim)
        mean = gap(t, points).reshape(grid.counts)
        for kernel in kernels:  # each pass leaves the array transposed
            mean = (kernel @ mean).T if grid.dim == 2 else kernel @ mean
        total += weight * mean.reshape(-1)
    return total


@dataclass(frozen=True)
class BoundChain:
    """Paired trajectories in 1-D: policy and reference from the same noise.

    gap: Δ(1) = x_policy(1) − x_ref(1) [n]; integral: ∫ e^{∫_t^1 s(τ)dτ} δ(t) dt [n], which equals it;
    probability: weights of the noise [n]. coupled: E[Δ(1)²], at least W2². velocity_gap: ∫E‖v − v_ref‖²dt
    along the policy's trajectories. lipschitz: the largest |s|, the L of the bound W2² ≤ e^{2L}·velocity_gap.
    """

    gap: Tensor
    integral: Tensor
    probability: Tensor
    coupled: float
    velocity_gap: float
    lipschitz: float


Velocity = Callable[[float, Tensor], Tensor]


def bound_chain(velocity: Velocity, reference: Velocity, pairs: int = 200, steps: int = 400) -> BoundChain:
    """The terms of the bound chain along trajectories of policy and reference from common noise x0 (1-D).

    With Δ = x_policy − x_ref, δ(t) = v(t, x_policy) − v_ref(t, x_policy) and the secant slope
    s(t) = (v_ref(t, x_policy) − v_ref(t, x_ref))/Δ, dΔ/dt = δ + s·Δ and Δ(0) = 0, so
    Δ(1) = ∫₀¹ e^{∫_t^1 s(τ)dτ} δ(t) dt: an identity, where the paper bounds s by a constant L.

    velocity, reference: (t, x [n, 1]) → [n, 1]. pairs: noise quantiles. steps: of Runge–Kutta 4.
    """
    levels = (torch.arange(pairs, dtype=torch.float64) + 0.5) / pairs
    noise = torch.special.ndtri(levels)[:, None]
    policy = anchor = noise
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()
    gaps, slopes = [], []
    for i, t in enumerate(times):
        v, at_policy, at_anchor = velocity(t, policy), reference(t, policy), reference(t, anchor)
        apart = policy - anchor
        near = apart.abs() < 1e-7
        nudge = reference(t, anchor + 1e-5) - reference(t, anchor - 1e-5)
        slopes.append(torch.where(near, nudge / 2e-5, (at_policy - at_anchor) / apart.masked_fill(near, 1.0)))
        gaps.append(v - at_policy)
        if i < steps:
            policy = _runge_kutta(velocity, t, times[i + 1], policy)
            anchor = _runge_kutta(reference, t, times[i + 1], anchor)
    dt = 1 / steps
    slope, delta = torch.stack(slopes).squeeze(-1), torch.stack(gaps).squeeze(-1)
    growth = torch.zeros_like(slope)
    for i, j in pairwise(range(steps, -1, -1)):
        growth[j] = growth[i] + dt / 2 * (slope[i] + slope[j])
    integral = torch.trapezoid(growth.exp() * delta, dx=dt, dim=0)
    gap = (policy - anchor).squeeze(-1)
    probability = torch.full_like(gap, 1 / pairs)
    velocity_gap = float(torch.trapezoid((delta**2 * probability).sum(1), dx=dt))
    return BoundChain(
        gap,
        integral,
        probability,
        float((probability * gap**2).sum()),
        velocity_gap,
        float(slope.abs().max()),
    )


def _runge_kutta(velocity: Velocity, t: float, t_next: float, x: Tensor) -> Tensor:
    dt, half = t_next - t, (t + t_next) / 2
    k1 = velocity(t, x)
    k2 = velocity(half, x + dt / 2 * k1)
    k3 = velocity(half, x + dt / 2 * k2)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(t_next, x + dt * k3))
