"""The exact velocity of an empirical measure, in any dimension: a softmax over the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from orwcfm_fast.theory.parallel import in_parallel

STEP = 0.18  # of the flow, on average; Runge–Kutta 4. 4 steps to t = 0.7 on digits: E[r] to 0.001 a round
RESOLVED = 0.02  # what is not known yet of sample and reward, as a share of variance, where a flow may stop


class Empirical:
    """Samples s [S, D] that carry measures Σ p_j δ(s_j), and the times at which their flows are followed.

    Attributes:
        samples: [S, D] less their mean, float32; points x_t are given less t times that mean.
        times: from 0 to the earliest time at which x_t says to which sample it leads, and to which reward; shorter
            steps at the end, where the velocity changes fast.
    """

    def __init__(self, samples: Tensor, rewards: Tensor, generator: torch.Generator) -> None:
        self.samples = samples - samples.mean(0)  # keeps float32 exponents small
        self.low, self.high = self.samples.amin(0), self.samples.amax(0)
        self.half_square = 0.5 * self.samples.square().sum(1)
        self.generator = generator
        end = self._resolved_time(rewards)
        steps = max(4, math.ceil(end / STEP))
        self.times = [end * (i / steps) ** 0.7 for i in range(steps + 1)]

    @property
    def end(self) -> float:
        return self.times[-1]

    def kernel(self, t: float, x: Tensor) -> Tensor:
        """N(x; t·s_j, (1−t)²) up to a factor per x: [n, S], greatest 1."""
        scale = t / (1 - t) ** 2
        logits = torch.addmm(-t * scale * self.half_square[None], x, self.samples.T, alpha=scale)
        # e^−80: no denormal numbers, in which exp is seven times slower
        return logits.sub_(logits.amax(1, keepdim=True)).clamp_min_(-80).exp_()

    def noised(self, t: float, index: Tensor) -> Tensor:
        """x_t of the samples of index [n], noise drawn anew → [n, D]."""
        noise = torch.randn(len(index), self.samples.shape[1], generator=self.generator)
        return t * self.samples[index] + (1 - t) * noise.to(self.samples)

    def _resolved_time(self, rewards: Tensor) -> float:
        index = torch.linspace(0, len(self.samples) - 1, min(512, len(self.samples))).long()
        mean = rewards.double().mean()
        both = self.samples, (rewards.double() - mean).to(self.samples)[:, None]
        # constant rewards but for rounding say nothing
        least = (1e-30, 1e-30 + 1e-12 * float(mean) ** 2)
        variances = [float(x.square().sum(1).mean()) + own for x, own in zip(both, least, strict=True)]
        for t in (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93):
            kernel = self.kernel(t, self.noised(t, index))
            kernel = kernel / kernel.sum(1, keepdim=True)
            left = [float((kernel @ x - x[index]).square().sum(1).mean()) for x in both]
            if all(own < RESOLVED * variance for own, variance in zip(left, variances, strict=True)):
                return t
        return 0.95


@dataclass(frozen=True)
class Stage:
    """What one round's velocity is made of: masses p and weights w over the samples [S], the round's α and c."""

    masses: Tensor
    weights: Tensor
    alpha: float
    centre: float = 1.0


class EmpiricalVelocity:
    """v* = (D − x)/(1−t) of `theory.velocity.ExactVelocity`, on an empirical measure.

    D(t, x) = Σ_j c_j(t, x)·s_j. Every posterior mean in it has the same kernel matrix, so the coefficients c are
    the kernel times a sum over the rounds: K ∘ (B·M), with the masses M [2N + 1, S] of the rounds and factors
    B(t, x) [n, 2N + 1].

    Args:
        start: p_0 [S], whose own velocity is v_ref. stages: as in ExactVelocity: all rounds so far for
            orw-centred, the latest for orw, none for v_ref itself.
    """

    def __init__(self, measure: Empirical, start: Tensor, stages: Sequence[Stage], centred: bool) -> None:
        self.measure, self.centred, count = measure, centred, len(start)
        self.alpha = torch.tensor([s.alpha for s in stages]).to(measure.samples)
        rows = [start, *(s.masses for s in stages), *(s.masses * s.weights for s in stages)]
        # times S, near 1: float32 products stay normal numbers
        self.rows = torch.stack(rows).to(measure.samples) * count
        self.centre = torch.tensor([s.centre for s in stages]).to(measure.samples)
        self.columns = self.rows.T.contiguous()

    def _factors(self, kernel: Tensor) -> Tensor:
        """B [n, 2N + 1]: what each of the rows counts for in D."""
        sums = kernel @ self.columns
        rounds = len(self.alpha)
        start, mass, weighted = sums.split([1, rounds, rounds], dim=1)
        share = 1 / (weighted / mass + self.alpha)  # 1 / (E[w | x_t] + α)
        if not self.centred:
            return torch.cat([self.alpha * share / start, torch.zeros_like(mass), share / mass], 1)
        # D_k = share·(E[w·u] + α·D_ref) + kept·(D_{k−1} − E[u]). The last is 0 but for what the masses are off, which
        # must not grow from round to round
        kept = (share * self.centre).clamp_max(1)
        since = kept.flip(1).cumprod(1).flip(1)
        later = torch.cat([since[:, 1:], torch.ones_like(since[:, :1])], 1) * share
        anchored = (since[:, :1] + (later * self.alpha).sum(1, True)) / start
        return torch.cat([anchored, -since / mass, later / mass], 1)

    def mean(self, t: float, x: Tensor) -> Tensor:
        """D [n, D] at points x [n, D]."""
        kernel = self.measure.kernel(t, x)
        if not len(self.alpha):
            posterior = kernel.mul_(self.rows)
            return posterior @ self.measure.samples / posterior.sum(1, keepdim=True)
        found = kernel.mul_(self._factors(kernel) @ self.rows) @ self.measure.samples
        return found.clamp_(self.measure.low, self.measure.high)  # where a mean of samples lies

    def __call__(self, t: float, x: Tensor) -> Tensor:
        return (self.mean(t, x) - x) / (1 - t)

    def flow(self, x: Tensor, forward: bool = True, threads: int = 1) -> Tensor:
        """Carry x from t=0 to the resolved time, or back."""
        times = self.measure.times if forward else self.measure.times[::-1]
        return in_parallel(lambda part: self._flow(part, times), x, threads)

    def _flow(self, x: Tensor, times: Sequence[float]) -> Tensor:
        for t, t_next in pairwise(times):
            dt, half = t_next - t, (t + t_next) / 2
            k1 = self(t, x)
            k2 = self(half, x + dt / 2 * k1)
            k3 = self(half, x + dt / 2 * k2)
            x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + self(t_next, x + dt * k3))
        return x

    def landing(self, x: Tensor) -> Tensor:
        """Shares [n, S] in which points at the resolved time go to the samples: their posterior."""
        shares = self.measure.kernel(self.measure.end, x).mul_(self.rows[len(self.alpha)])
        return shares.div_(shares.sum(1, keepdim=True))
