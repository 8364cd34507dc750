"""The exact velocity of one round by quadrature, and the density that its flow makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from orwcfm_fast.theory.density import FLOOR, Grid
from orwcfm_fast.theory.parallel import CHUNK, in_parallel


@dataclass(frozen=True)
class Stage:
    """What one round's velocity is made of: density q and weights w on the grid [P], α and c of that round."""

    density: Tensor
    weight: Tensor
    alpha: float
    centre: Tensor


@dataclass(frozen=True)
class ExactVelocity:
    """The velocity that minimises a round's objective, given those of the rounds before it.

    With E[·] over x1 from the round's density q given x_t = x, c of `weighting.centre`, and v_old the velocity of
    the round before:

        orw          v*(t, x) = (E[w·u] + α·v_ref) / (E[w] + α)
        orw-centred  v*(t, x) = (E[(w − c)·u] + c·v_old + α·v_ref) / (E[w] + α)

    x_t = (1−t)·x0 + t·x1 and u = x1 − x0 = (x1 − x)/(1−t), so v* = (D − x)/(1−t), where D mixes posterior
    means of x1. The posterior is N(x; t·x1, (1−t)²)·q(x1), summed over the grid; in 2-D the Gaussian factors
    by axis. Where its width in x1, s = (1−t)/t, falls below a cell, the score (D − y)/s², y = x/t, is continued
    linearly in s² from widths of one cell and √2 cells: smooth up to t = 1.

    reference: q_0 [P], whose own velocity is v_ref. stages: the rounds that v* depends on, the latest last:
    all of them for orw-centred, whose v_old is theirs; one for orw; none for v_ref itself.
    centred: whether w is centred and v_old held on to.
    """

    grid: Grid
    reference: Tensor
    stages: tuple[Stage, ...] = ()
    centred: bool = False

    def after(self, stage: Stage) -> ExactVelocity:
        """The velocity that minimises the next round's objective."""
        return replace(self, stages=(*self.stages, stage) if self.centred else (stage,))

    @property
    def density(self) -> Tensor:
        """The density [P] that the latest round was trained on."""
        return self.stages[-1].density if self.stages else self.reference

    def __call__(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Velocity at time t in [0, 1] and points x [n, d] → [n, d], float64, per unit time."""
        return self.with_divergence(float(t), x.double())[0].to(x)

    @property
    def finest(self) -> float:
        """The smallest posterior width that the grid resolves: one cell."""
        return max(self.grid.widths)

    def with_divergence(self, t: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """v [n, d] and div v [n]."""
        if t * (1 + self.finest) <= 1 + 1e-12:
            mean, trace = self._mean(t, x)
            return (mean - x) / (1 - t), (trace - self.grid.dim) / (1 - t)
        s, y = (1 - t) / t, x / t
        near, far = self._score(self.finest, y), self._score(self.finest * math.sqrt(2), y)
        lean = (s / self.finest) ** 2 - 1
        score, divergence = (a + lean * (b - a) for a, b in zip(near, far, strict=True))
        return y + s / t * score, (self.grid.dim + s / t * divergence) / t

    def _score(self, s: float, y: Tensor) -> tuple[Tensor, Tensor]:
        """(D − y)/s² and its divergence in y, at posterior width s."""
        t = 1 / (1 + s)
        mean, trace = self._mean(t, t * y)
        return (mean - y) / s**2, (t * trace - self.grid.dim) / s**2

    def _mean(self, t: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """D [n, d] and the trace of ∂D/∂x [n]."""
        parts = [self._mean_of(t, chunk) for chunk in x.split(CHUNK)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _mean_of(self, t: float, x: Tensor) -> tuple[Tensor, Tensor]:
        mass, first, second = self._moments(t, x)

        def posterior(field: int, density: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """E[f], E[f·x1] and their derivatives in x along each axis, f the ratio of two of the fields."""
            of = mass[density][:, None]
            weight, mean, square = mass[field][:, None] / of, first[field] / of, second[field] / of
            centre = first[density] / of
            scale = t / (1 - t) ** 2  # ∂E[f|x] = cov(f, x1)·t/(1−t)²
            return weight, mean, scale * (mean - weight * centre), scale * (square - mean * centre)

        _, start, _, start_slope = posterior(0, 0)
        mean, slope = start, start_slope
        for k, stage in enumerate(self.stages):
            weight, top, weight_slope, top_slope = posterior(2 * k + 2, 2 * k + 1)
            if self.centred:
                _, plain, _, plain_slope = posterior(2 * k + 1, 2 * k + 1)
                top = top + stage.centre * (mean - plain)
                top_slope = top_slope + stage.centre * (slope - plain_slope)
            total = weight + stage.alpha
            mean = (top + stage.alpha * start) / total
            slope = (top_slope + stage.alpha * start_slope - mean * weight_slope) / total
        return mean, slope.sum(1)

    def _moments(self, t: float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Σ K·f, Σ K·f·x1 and Σ K·f·x1² for the F fields f = q_0, q_1, w_1·q_1, …: [F, n], [F, n, d], [F, n, d]."""
        columns = [self.reference]
        for stage in self.stages:
            weighted = stage.weight * stage.density
            if float(stage.weight.min()) >= 0:
                weighted = weighted.clamp_min(FLOOR)
            columns += [stage.density, weighted]
        fields, count = torch.stack(columns, -1), len(columns)
        kernels = []
        for axis, y in enumerate(self.grid.axes):
            exponent = (x[:, axis, None] - t * y) / (1 - t)
            exponent = exponent.mul_(exponent).mul_(-0.5)
            # 1e-70 squared times FLOOR is still no denormal number
            kernels.append(exponent.sub_(exponent.amax(1, keepdim=True)).clamp_min_(-161).exp_())
        if self.grid.dim == 1:
            y = self.grid.axes[0][:, None]
            sums = kernels[0] @ torch.cat([fields, y * fields, y * y * fields], 1)
            mass, first, second = sums.T.reshape(3, count, -1)
            return mass, first[..., None], second[..., None]
        (y0, y1), (k0, k1) = self.grid.axes, kernels
        rows = fields.reshape(len(y0), -1)
        along = [(k0 @ (y0[:, None] ** p * rows)).reshape(len(x), len(y1), count) for p in range(3)]
        across = [k1 * y1**p for p in range(3)]

        def total(p: int, r: int) -> Tensor:
            return torch.bmm(across[r][:, None], along[p]).squeeze(1).T

        first = torch.stack([total(1, 0), total(0, 1)], -1)
        return total(0, 0), first, torch.stack([total(2, 0), total(0, 2)], -1)


def time_grid(steps: int, finest: float) -> list[float]:
    """1 = t_0 > … = 0: the first step is the one below the grid's resolution."""
    last = 1 / (1 + finest)
    angles = torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)
    return [1.0, *(last * torch.sin(angles)).tolist()]


def _reachable(velocity: ExactVelocity) -> Tensor:
    """In 2-D the points where the new density can matter: 1e-16 of the peak, and a rim of two cells."""
    if velocity.grid.dim == 1:
        return torch.arange(len(velocity.reference))
    near = torch.maximum(velocity.density, velocity.reference).reshape(1, 1, *velocity.grid.counts)
    near = torch.nn.functional.max_pool2d(near, 5, stride=1, padding=2).reshape(-1)
    return (near > 1e-16 * near.max()).nonzero().squeeze(1)


def push(velocity: ExactVelocity, steps: int, threads: int = 1) -> tuple[Tensor, Tensor]:
    """Carry the grid's points back from t=1 to t=0 (Runge–Kutta 4).

    Returns the noise [P, d] that lands on each point and the density [P] of the flow's law there:
    q(y) = N(x0(y); 0, I)·exp(−∫ div v dt). In 2-D noise is NaN and density 0 where neither the
    current density nor the reference comes to 1e-16 of its peak.
    """
    reachable = _reachable(velocity)
    times = time_grid(steps, velocity.finest)
    carried = in_parallel(lambda x: _carry(velocity, x, times), velocity.grid.points[reachable], threads)
    x, log_jacobian = carried[:, :-1], carried[:, -1]
    log_noise = -0.5 * (x**2).sum(1) - 0.5 * velocity.grid.dim * math.log(2 * math.pi)
    noise = torch.full_like(velocity.grid.points, math.nan)
    density = torch.zeros(len(noise), dtype=torch.float64)
    noise[reachable], density[reachable] = x, (log_noise + log_jacobian).exp()
    return noise, density


def _carry(velocity: ExactVelocity, x: Tensor, times: list[float]) -> Tensor:
    """Points and the integral of div v along their way, [n, d + 1]."""
    log_jacobian = torch.zeros(len(x), dtype=torch.float64)
    for t, t_next in pairwise(times):
        dt = t_next - t
        v1, d1 = velocity.with_divergence(t, x)
        v2, d2 = velocity.with_divergence(t + dt / 2, x + dt / 2 * v1)
        v3, d3 = velocity.with_divergence(t + dt / 2, x + dt / 2 * v2)
        v4, d4 = velocity.with_divergence(t_next, x + dt * v3)
        x = x + dt / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        log_jacobian += dt / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return torch.cat([x, log_jacobian[:, None]], 1)
