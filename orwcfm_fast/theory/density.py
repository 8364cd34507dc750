"""Densities in one and two dimensions: Gaussian mixtures and values on a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError

FLOOR = 1e-150  # keeps every posterior defined where the density underflows


def as_double(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Grid:
    """Midpoints of equal cells: axis a has counts[a] cells of width (high − low)/count on [low, high]."""

    bounds: tuple[tuple[float, float], ...]
    counts: tuple[int, ...]

    @property
    def dim(self) -> int:
        return len(self.counts)

    @property
    def widths(self) -> tuple[float, ...]:
        return tuple((high - low) / n for (low, high), n in zip(self.bounds, self.counts, strict=True))

    @property
    def cell(self) -> float:
        return math.prod(self.widths)

    @property
    def axes(self) -> tuple[Tensor, ...]:
        return tuple(
            low + (torch.arange(n, dtype=torch.float64) + 0.5) * h
            for (low, _), n, h in zip(self.bounds, self.counts, self.widths, strict=True)
        )

    @property
    def points(self) -> Tensor:
        """[P, d], the last axis fastest."""
        return torch.stack(torch.meshgrid(*self.axes, indexing="ij"), -1).reshape(-1, self.dim)

    def halved(self) -> Grid:
        """Half as many cells on each axis, twice as wide."""
        return Grid(self.bounds, tuple(n // 2 for n in self.counts))


class GaussianMixture:
    """Σ_k weight_k N(mean_k, covariance_k) in one or two dimensions.

    Args:
        weights: [K], positive; divided by their sum.
        means: [K] or [K, d].
        stds: a number, [K] or [K, d]; or give covariances.
        covariances: [K, d, d].
    """

    def __init__(self, weights: Any, means: Any, stds: Any = None, covariances: Any = None) -> None:
        self.means = as_double(means)
        if self.means.ndim == 1:
            self.means = self.means[:, None]
        count, self.dim = self.means.shape
        if covariances is None:
            if stds is None:
                raise UserError("GaussianMixture: give stds or covariances")
            stds = as_double(stds)
            stds = stds[:, None] if stds.ndim == 1 else stds
            covariances = torch.diag_embed(stds.expand(count, self.dim) ** 2)
        self.covariances = as_double(covariances).reshape(count, self.dim, self.dim)
        weights = as_double(weights)
        if weights.shape != (count,) or not bool((weights > 0).all()):
            raise UserError(f"GaussianMixture: weights must be {count} positive numbers")
        self.weights = weights / weights.sum()
        cholesky, info = torch.linalg.cholesky_ex(self.covariances)
        if bool(info.any()) or not bool(torch.isfinite(cholesky).all()):
            raise UserError("GaussianMixture: every covariance must be positive definite")
        self._normal = torch.distributions.MultivariateNormal(self.means, scale_tril=cholesky)

    def log_prob(self, x: Tensor) -> Tensor:
        """[n, d] → [n]."""
        log_components = self._normal.log_prob(x[:, None, :])
        return torch.logsumexp(log_components + self.weights.log(), dim=1)

    def bounds(self, spread: float = 8.0) -> tuple[tuple[float, float], ...]:
        """The box that holds every component to `spread` standard deviations."""
        std = self.covariances.diagonal(dim1=1, dim2=2).sqrt()
        low, high = (self.means - spread * std).amin(0), (self.means + spread * std).amax(0)
        return tuple(zip(low.tolist(), high.tolist(), strict=True))


@dataclass(frozen=True)
class GridDensity:
    """A density by its values at the midpoints of equal cells; need not be normalised.

    bounds: ((low, high), …) per axis; values: [n] or [nx, ny], even counts.
    """

    bounds: tuple[tuple[float, float], ...]
    values: Any


Density = GaussianMixture | GridDensity | Callable[[Tensor], Tensor]


def _aligned(bounds: Sequence[tuple[float, float]], counts: Sequence[int]) -> Grid:
    """Shift the grid so that 0 is a cell face, also after halving: rewards like 1[x>0] jump there."""
    aligned = []
    for (low, high), n in zip(bounds, counts, strict=True):
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"bounds: ({low}, {high}) is not an interval; give (low, high) with low < high")
        if low < 0 < high and n > 4:
            width = (high - low) / (n - 2)
            low = math.floor(low / (2 * width)) * 2 * width
            high = low + n * width
        aligned.append((low, high))
    return Grid(tuple(aligned), tuple(counts))


def _pooled(values: Tensor) -> Tensor:
    for axis in range(values.ndim):
        values = values.unflatten(axis, (-1, 2)).mean(axis + 1)
    return values


def on_grid(
    density: Density, bounds: Sequence[tuple[float, float]] | None, counts: Sequence[int] | None, halved: bool
) -> tuple[Grid, Tensor]:
    """The grid and the normalised density on it, flat [P]; `halved` gives the grid of half the cells.

    Raises:
        UserError: the density is negative, not finite, cannot be normalised or is cut off by the bounds.
    """
    if isinstance(density, GridDensity):
        values = as_double(density.values)
        if values.ndim != len(density.bounds) or values.ndim not in (1, 2):
            raise UserError(
                f"density: values of {values.ndim} axes do not match {len(density.bounds)} bounds"
            )
        if any(n % 2 or n < 8 for n in values.shape):
            raise UserError(
                f"density: the grid {tuple(values.shape)} needs an even count, 8 or more, per axis"
            )
        grid = Grid(tuple(density.bounds), tuple(values.shape))
        if halved:
            grid, values = grid.halved(), _pooled(values)
        values = values.reshape(-1)
    else:
        if bounds is None:
            if not isinstance(density, GaussianMixture):
                raise UserError("bounds: a density given as a function needs bounds=((low, high), …)")
            bounds = density.bounds()
        if len(bounds) not in (1, 2):
            raise UserError(f"density: the exact recursion works in 1 and 2 dimensions, not {len(bounds)}")
        counts = counts or ((256,) if len(bounds) == 1 else (96, 96))
        if len(counts) != len(bounds) or any(n % 2 or n < 8 for n in counts):
            raise UserError(f"cells: {tuple(counts)} must be an even number, 8 or more, for each axis")
        grid = _aligned(bounds, counts)
        grid = grid.halved() if halved else grid
        log_density = density.log_prob if isinstance(density, GaussianMixture) else density
        values = as_double(log_density(grid.points)).reshape(-1).exp()
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise UserError(
            "density: negative or not finite on the grid; give a density ≥ 0 that is finite everywhere"
        )
    total = float(values.sum()) * grid.cell
    if not (math.isfinite(total) and total > 0):
        raise UserError(f"density: cannot be normalised, its integral over the grid is {total}")
    values = values / total
    check_edges(grid, values, "density")
    return grid, values.clamp_min(FLOOR)


def check_edges(grid: Grid, values: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Raise UserError where more than `tolerance` of the mass lies in the outermost cells: the grid cuts it off."""
    shaped = values.reshape(grid.counts)
    for axis, (low, high) in enumerate(grid.bounds):
        for edge, name in ((0, f"low end {low:.3g}"), (-1, f"high end {high:.3g}")):
            mass = float(shaped.select(axis, edge).sum()) * grid.cell
            if mass > tolerance:
                raise UserError(
                    f"{what}: {mass:.1e} of the mass lies in the last cells at the {name} of axis {axis}: "
                    "not a density that can be normalised there; widen bounds"
                )
