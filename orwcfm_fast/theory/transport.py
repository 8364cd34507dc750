"""W2 between two densities on one grid: by quantiles in 1-D, by debiased Sinkhorn in 2-D."""

import math

import numpy as np
import torch
from torch import Tensor

from orwcfm_fast.theory.density import Grid


def w2_line(grid: Grid, noise: Tensor, noise_reference: Tensor) -> float:
    """Exact W2 in 1-D, from the monotone maps [P, 1] of a density and of the reference to noise.

    Both maps y → x0 are quantiles of N(0, 1): W2² = ∫ (Y(z) − Y_ref(z))² φ(z) dz with their inverses Y, Y_ref.
    By Gauss–Legendre between the knots of both, which crowd where an inverse jumps from mode to mode.
    """
    from scipy.interpolate import PchipInterpolator

    y = grid.axes[0].numpy()
    inverses, knots = [], []
    for ranks in (noise[:, 0].numpy(), noise_reference[:, 0].numpy()):
        rising = np.concatenate([[True], np.diff(np.maximum.accumulate(ranks)) > 1e-13])
        inverses.append(PchipInterpolator(ranks[rising], y[rising]))
        knots.append(ranks[rising])
    low, high = max(k[0] for k in knots), min(k[-1] for k in knots)
    z = np.unique(np.clip(np.concatenate(knots), max(low, -8.0), min(high, 8.0)))
    nodes, weights = np.polynomial.legendre.leggauss(4)
    half = np.diff(z)[:, None] / 2
    z = z[:-1, None] + half * (1 + nodes)
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    squares = (inverses[0](z) - inverses[1](z)) ** 2 * density * half * weights
    return math.sqrt(float(squares.sum()))


def w2_plane(grid: Grid, density: Tensor, reference: Tensor, blur: float | None = None) -> float:
    """W2 in 2-D by the debiased Sinkhorn divergence, OT_ε(p, q) − ½OT_ε(p, p) − ½OT_ε(q, q), ε = 2·blur².

    blur: the entropic kernel's standard deviation, one cell unless given; its bias is of order blur⁴
    and is exactly 0 for a shift.
    """
    blur = max(grid.widths) if blur is None else blur
    p, q = (_trimmed(d.reshape(grid.counts) * grid.cell) for d in (density, reference))
    cross = _sinkhorn(grid, p, q, blur)
    own = 0.5 * (_sinkhorn(grid, p, p, blur) + _sinkhorn(grid, q, q, blur))
    return math.sqrt(max(cross - own, 0.0))


def _trimmed(mass: Tensor) -> Tensor:
    mass = torch.where(mass > 1e-12, mass, 0.0)
    return mass / mass.sum()


def _logsumexp(values: Tensor) -> Tensor:
    """Over the last axis, in place; clamped, since exp is seven times slower where it returns denormal numbers."""
    top = values.amax(-1, keepdim=True).clamp_min(-1e30)
    return values.sub_(top).clamp_min_(-80).exp_().sum(-1).log_() + top[..., 0]


def _sinkhorn(grid: Grid, p: Tensor, q: Tensor, blur: float) -> float:
    """OT_ε for the squared distance, by log-domain Sinkhorn; ε falls from the grid's diameter to 2·blur².

    Over-relaxed (Thibault et al. 2021): plain steps even out the masses of distant modes too slowly.
    """
    # float32: potentials are wanted to a fraction of ε only, and its exp is faster
    log_p, log_q = p.log().float(), q.log().float()
    f, g = torch.zeros_like(log_p), torch.zeros_like(log_q)
    width = max(high - low for low, high in grid.bounds)
    scales = math.ceil(math.log(width / blur) / math.log(1.2)) + 1

    def softmin(log_mass: Tensor, potential: Tensor, eps: float) -> Tensor:
        h = log_mass + potential / eps
        for axis in grid.axes:  # the Gaussian factors by axis; each pass leaves the array transposed
            cost = ((axis[:, None] - axis) ** 2 / eps).float()
            h = torch.cat([_logsumexp(h.T - c[:, None, :]) for c in cost.split(8)]).T
        return -eps * h

    for i, sigma in enumerate(torch.linspace(math.log(width), math.log(blur), scales).exp().tolist()):
        eps, relax = 2 * sigma**2, 1.7 if i > 2 else 1.0
        for _ in range(1 if p is q else 4):
            if p is q:
                f = g = 0.5 * (f + softmin(log_q, f, eps))
            else:
                f = f + relax * (softmin(log_q, g, eps) - f)
                g = g + relax * (softmin(log_p, f, eps) - g)
    for _ in range(10):  # plain steps remove the error that over-relaxation leaves
        if p is q:
            f = g = 0.5 * (f + softmin(log_q, f, eps))
        else:
            f = softmin(log_q, g, eps)
            g = softmin(log_p, f, eps)
    return float((p * f.double())[p > 0].sum() + (q * g.double())[q > 0].sum())
