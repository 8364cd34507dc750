"""Drift: how far a policy has moved from its reference, measured on shared noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from orwcfm_fast.method.rollout import in_parts
from orwcfm_fast.method.samplers import solve
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Sampling

BINS = 10
"""Equal parts of [0, 1] in which the norms of velocities are compared."""


@dataclass(frozen=True)
class Drift:
    """How the policy's velocity differs from the reference's along the trajectories of n samples.

    Attributes:
        gap: ∫E‖v − v_ref‖² dt (trapezoid).
        energies: for each of BINS equal parts of [0, 1], Σ‖v‖² and Σ‖v_ref‖² over samples and times in it.
    """

    n: int
    gap: float
    energies: Sequence[tuple[float, float]]

    @classmethod
    def joined(cls, parts: Sequence["Drift"]) -> "Drift":
        """Of all samples, from those of parts of them."""
        n = sum(part.n for part in parts)
        bins = zip(*(part.energies for part in parts), strict=True)
        energies = [(sum(v for v, _ in both), sum(r for _, r in both)) for both in bins]
        return cls(n, sum(part.gap * part.n for part in parts) / n, energies)

    def norm_ratios(self) -> list[float | None]:
        """√(E‖v‖² / E‖v_ref‖²) in each part of [0, 1]; None where no time lies in it."""
        return [math.sqrt(v / ref) if ref else None for v, ref in self.energies]


def sample_with_drift(
    policy: Policy, reference: Policy, x0: Tensor, how: Sampling, chunk: int, condition: Tensor | None = None
) -> tuple[Tensor, Drift]:
    """Samples of the policy from x0 [N, *shape], and its drift from the reference along the way.

    Args:
        condition: rows [N] of the prompts, as for `sample`.
    """
    ends, drifts = [], []
    with torch.inference_mode():
        both = (in_parts(p, x0, how, chunk, condition) for p in (policy, reference))
        for (part, own), (_, anchor) in zip(*both, strict=True):
            seen: dict[float, Tensor] = {}

            def velocity(t: float, x: Tensor, own=own, anchor=anchor, seen=seen) -> Tensor:
                v = own(t, x)
                # a solver's first evaluation at a time is the one on its trajectory
                if t not in seen:
                    a, b = v.float(), anchor(t, x).float()
                    seen[t] = torch.stack([y.square().sum() for y in (a - b, a, b)])
                return v

            ends.append(solve(velocity, part, how.solver, how.nfe, policy.grid(how.grid)).float())
            drifts.append(_drift(seen, len(part)))
    return torch.cat(ends), Drift.joined(drifts)


def _drift(seen: dict[float, Tensor], n: int) -> Drift:
    """From the sums (‖v − v_ref‖², ‖v‖², ‖v_ref‖²) [3] at each time."""
    sums = {t: found.tolist() for t, found in seen.items()}
    energies = [(0.0, 0.0)] * BINS
    for t, (_, v, ref) in sums.items():
        k = min(int(t * BINS), BINS - 1)
        energies[k] = (energies[k][0] + v, energies[k][1] + ref)
    return Drift(n, _integral({t: gap for t, (gap, _, _) in sums.items()}) / n, energies)


def _integral(values: dict[float, float]) -> float:
    """Integral over [0, 1] of a function known at some times, and constant before the first and after the last."""
    points = sorted(values.items())
    points = [(0.0, points[0][1]), *points, (1.0, points[-1][1])]
    return sum((t2 - t1) * (a + b) / 2 for (t1, a), (t2, b) in pairwise(points))


def coupled_w2(x: Tensor, x_ref: Tensor) -> float:
    """√E‖x − x_ref‖² of samples [N, *shape] from the same noise: no less than W2 of their distributions."""
    return float((x - x_ref).square().flatten(1).sum(1).mean().sqrt())


def pairwise_distance(x: Tensor) -> float:
    """Mean Euclidean distance of two different samples of x [N, …]."""
    flat = x.flatten(1).float()
    return float(torch.cdist(flat, flat).sum() / (len(flat) * (len(flat) - 1)))
