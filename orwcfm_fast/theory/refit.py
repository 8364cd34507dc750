"""A sampler's own density, for the exact recursion to start from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.theory.density import GridDensity

CELLS = {1: 256, 2: 96}
FINER = {1: 8, 2: 4}  # counted on a finer grid, so that smoothing, not counting, sets the shape
SMOOTHING = 0.64  # standard deviation in cells


def refit(batches: Iterable[Tensor]) -> GridDensity:
    """A Gaussian mixture refitted on samples [N, d] that come in batches, d = 1 or 2, on a grid.

    Every sample counts as a Gaussian of 0.64 cells (256 cells in 1-D, 96 × 96 in 2-D). The first batch sets
    the box: its range and half as much again; 0 is a cell face.

    Raises:
        UserError: samples of another dimension, or not finite.
    """
    counts: Tensor | None = None
    bounds: list[tuple[float, float]] = []
    for batch in batches:
        x = batch.double().cpu()
        if x.ndim != 2 or x.shape[1] not in CELLS or not bool(x.isfinite().all()):
            raise UserError(f"density: needs finite samples [N, 1] or [N, 2], not {list(x.shape)}")
        cells, finer = CELLS[x.shape[1]], FINER[x.shape[1]]
        if counts is None:
            bounds = [_box(axis, cells) for axis in x.T]
        found = torch.histogramdd(
            x, [cells * finer] * len(bounds), range=[end for b in bounds for end in b]
        ).hist
        counts = found if counts is None else counts + found
    if counts is None:
        raise UserError("density: no samples")
    kernel = _smoothing(cells, finer)
    smooth = kernel @ counts if counts.ndim == 1 else kernel @ counts @ kernel.T
    return GridDensity(tuple(bounds), smooth)


def _box(x: Tensor, cells: int) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    low, high = low - 0.25 * (high - low), high + 0.25 * (high - low)
    width = max(high - low, 1e-6) / (cells - 2)
    low = float(torch.tensor(low / (2 * width)).floor()) * 2 * width
    return low, low + cells * width


def _smoothing(cells: int, finer: int) -> Tensor:
    """[cells, cells·finer]: from fine counts to values at the cells' midpoints."""
    fine = (torch.arange(cells * finer, dtype=torch.float64) + 0.5) / finer
    middle = torch.arange(cells, dtype=torch.float64) + 0.5
    return torch.exp(-0.5 * ((middle[:, None] - fine) / SMOOTHING) ** 2)
