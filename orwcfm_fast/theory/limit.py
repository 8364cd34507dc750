"""The limit line: the least W2 at which a reward can be had at all, by whatever method of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError

POINTS = 24  # multipliers λ at which the line is computed
LEAST_SAMPLES = 8
ROWS = 512  # samples whose destinations are looked for at once; also those that the multipliers are chosen on
SHRINKING = (0.7, 0.93)  # bounds of the ratio by which the distance to the limit shrinks when samples double


@dataclass(frozen=True)
class LimitLine:
    """Reward against W2 by optimal transport, from no change to the highest reward.

    reward: [K], rising. w2: [K], the least W2 at each reward when every sample may only become another of these
    samples: no less than the truth. w2_low: [K], extrapolated to unlimited samples; the truth lies between.
    """

    reward: Tensor
    w2: Tensor
    w2_low: Tensor

    def to_dict(self) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, found: dict[str, list[float]]) -> LimitLine:
        return cls(*(torch.tensor(found[f.name], dtype=torch.float64) for f in fields(cls)))

    def least_w2(self, reward: float) -> tuple[float, float]:
        """The least W2 at which `reward` can be had: extrapolated, and on the samples; NaN beyond the line."""
        if not float(self.reward[0]) <= reward <= float(self.reward[-1]):
            return (0.0, 0.0) if reward < float(self.reward[0]) else (math.nan, math.nan)
        return _interpolated(self.reward, self.w2_low, reward), _interpolated(self.reward, self.w2, reward)


def limit_line(samples: Any, rewards: Any) -> LimitLine:
    """The least W2 to the samples' law at each mean reward, over all laws on these samples.

    min_q W2²(q, q_0) − λ·E_q[r] has its solution where each sample x_i moves to argmin_j ‖x_i − x_j‖² − λ·r_j; λ
    through its range gives the convex curve of W2² against reward (Lagrange duality). On more samples each finds
    better destinations, so the line comes down; halves and quarters of the samples show how fast.

    Args:
        samples: [S, …] of the model before training, S ≥ 8. rewards: [S].

    Raises:
        UserError: fewer than 8 samples, other shapes, values that are not finite.
    """
    x = torch.as_tensor(samples).detach()
    x, r = x.reshape(len(x), -1).float(), torch.as_tensor(rewards).detach().double().to(x.device)
    if (
        len(x) < LEAST_SAMPLES
        or r.shape != (len(x),)
        or not bool(x.isfinite().all())
        or not bool(r.isfinite().all())
    ):
        raise UserError(
            f"limit line: {len(x)} samples, rewards {tuple(r.shape)}; needs 8 or more, all finite"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    x, r = (x - x.mean(0))[order], r[order]  # small numbers for float32; parts that are random ones
    start, end = float(r.mean()), float(r.max())
    levels = torch.linspace(start, end, POINTS, dtype=torch.float64)
    w2 = _curve(x, r, levels)
    halves, quarters = (_mean_of_parts(x, r, levels - start, parts) for parts in (2, 4))
    before, last = quarters - halves, halves - w2  # how far it came down in each doubling
    ratio = (last.sum() / before.sum().clamp_min(1e-12)).clamp(*SHRINKING)  # of all levels: one is too noisy
    low = (w2 - last.clamp_min(0) * ratio / (1 - ratio)).clamp_min(0)
    return LimitLine(levels, w2, torch.minimum(low, w2).cummax(0).values)


def _mean_of_parts(x: Tensor, r: Tensor, gains: Tensor, parts: int) -> Tensor:
    """W2 [K] at gains of reward [K], the mean over disjoint parts of the samples."""
    found = []
    for k in range(parts):
        own = r[k::parts]
        found.append(_curve(x[k::parts], own, gains + float(own.mean())))
    return torch.stack(found).mean(0)


def _interpolated(x: Tensor, y: Tensor, at: float) -> float:
    above = min(max(int(torch.searchsorted(x, at)), 1), len(x) - 1)
    low, high = float(x[above - 1]), float(x[above])
    share = 1.0 if high == low else min(max((at - low) / (high - low), 0.0), 1.0)
    return float(y[above - 1]) * (1 - share) + float(y[above]) * share


def _curve(x: Tensor, r: Tensor, levels: Tensor) -> Tensor:
    """Least W2 [K] at mean rewards `levels` [K] when each sample may become another of them.

    λ is the slope of W2² against reward, so a cubic (Hermite) joins the points that the multipliers give; its slopes
    are at most three times the chord's, which keeps it rising.
    """
    if float(r.max()) == float(r.min()):
        return torch.zeros_like(levels)
    multipliers = _multipliers(x[:ROWS], r[:ROWS])
    reward, square = _moved(x, r, multipliers)
    slope = torch.tensor([0.0, *multipliers], dtype=torch.float64)
    above = torch.searchsorted(reward, levels).clamp(1, len(reward) - 1)
    below = above - 1
    width = (reward[above] - reward[below]).clamp_min(1e-12)
    s = ((levels - reward[below]) / width).clamp(0, 1)
    steepest = 3 * (square[above] - square[below]) / width
    first, last = (torch.minimum(slope[at], steepest) * width for at in (below, above))
    found = square[below] * (1 + 2 * s) * (1 - s) ** 2 + square[above] * s**2 * (3 - 2 * s)
    return (found + first * s * (1 - s) ** 2 - last * s**2 * (1 - s)).clamp_min(0).sqrt()


def _multipliers(x: Tensor, r: Tensor) -> list[float]:
    """λ [POINTS] at which the mean reward of these samples rises in even steps."""
    import numpy as np

    far, scale = 4 * float(x.square().sum(1).max()) + 1e-30, float(r.max() - r.min()) + 1e-30
    tried = np.geomspace(1e-6 * far, 4 * far, 100) / scale
    reward, _ = _moved(x, r, tried.tolist())
    levels = np.linspace(float(reward[0]), float(reward[-1]), POINTS)[1:]
    return [*np.interp(levels, reward[1:].numpy(), tried).tolist(), float(tried[-1])]


def _moved(x: Tensor, r: Tensor, multipliers: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean reward and mean squared way [K + 1] where each sample goes to its best place; first, where none does."""
    square, count = x.square().sum(1), len(multipliers)
    bonus = (torch.tensor(multipliers, dtype=torch.float64, device=x.device)[:, None] * r).float()
    gains, costs = (torch.zeros(count + 1, dtype=torch.float64, device=x.device) for _ in range(2))
    gains[0] = r.sum()
    for rows in torch.arange(len(x), device=x.device).split(ROWS):
        distance = torch.addmm(square[None] + square[rows, None], x[rows], x.T, alpha=-2).clamp_min_(0)
        distance[torch.arange(len(rows)), rows] = 0
        for k in range(count):
            to = (distance - bonus[k]).argmin(1)
            gains[k + 1] += r[to].sum()
            costs[k + 1] += distance.gather(1, to[:, None]).double().sum()
    return (gains / len(x)).cpu(), (costs / len(x)).cpu()
