"""95 % confidence intervals: of a mean by its standard error, of other statistics by random halves of the samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REPEATS = 64


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval, 1.96 standard errors each side."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> "Interval":
        """The interval of the mean of independent values [N]."""
        mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)

    def root(self) -> "Interval":
        """The interval of the square root of this quantity; its ends are at least 0."""
        return Interval(*(math.sqrt(max(v, 0.0)) for v in (self.mean, self.low, self.high)))


def halves(n: int, repeats: int = REPEATS, seed: int = 0) -> Tensor:
    """Random halves of n samples, drawn without replacement: bool [repeats, n], n // 2 true in each row."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(repeats, n, generator=generator).argsort(1)
    return order < n // 2


def from_halves(estimate: float, values: Tensor, n: int) -> Interval:
    """Interval of a statistic from its values [R] on random halves of the n samples.

    The bootstrap without replacement (subsampling: Politis & Romano, Ann. Statist. 1994). With replacement
    a sample would occur twice, which distances to nearest neighbours, the Vendi score and FID take for lost
    diversity. A half differs from the whole by as much as the whole differs from the truth:
    Var(θ_m − θ_n) = σ²(1/m − 1/n), with m = n/2 that is σ²/n.
    """
    m = n // 2
    half = 1.96 * float(values.double().std()) * math.sqrt(m / (n - m))
    return Interval(estimate, estimate - half, estimate + half)


def half_sampled(
    statistics: Callable[..., Sequence[float]], *samples: Tensor, repeats: int = REPEATS, seed: int = 0
) -> list[Interval]:
    """Every value of `statistics` on all samples [N, …], with an interval from its values on random halves."""
    rows = [halves(len(x), repeats, seed + i).to(x.device) for i, x in enumerate(samples)]
    values = torch.tensor(
        [[*statistics(*(x[row[r]] for x, row in zip(samples, rows, strict=True)))] for r in range(repeats)]
    )
    least = min(map(len, samples))
    return [from_halves(v, values[:, k], least) for k, v in enumerate(statistics(*samples))]


def mean_pairwise_distance(x: Tensor, repeats: int = REPEATS) -> Interval:
    """Mean Euclidean distance of two different samples of x [N, F], N ≥ 4."""
    flat = x.flatten(1).float()
    distance, n = torch.cdist(flat, flat), len(flat)
    half = halves(n, repeats).to(distance)
    m = n // 2
    values = ((half @ distance) * half).sum(1) / (m * (m - 1))
    return from_halves(float(distance.sum() / (n * (n - 1))), values, n)
