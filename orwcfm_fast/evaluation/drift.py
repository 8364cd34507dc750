"""Drift: how far a policy has moved from its reference, measured on shared noise."""

from itertools import pairwise

import torch
from torch import Tensor

from orwcfm_fast.method.rollout import in_parts
from orwcfm_fast.method.samplers import solve
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Sampling


def sample_with_gap(
    policy: Policy, reference: Policy, x0: Tensor, how: Sampling, chunk: int, condition: Tensor | None = None
) -> tuple[Tensor, float]:
    """Samples of the policy from x0 [N, *shape], and ∫E‖v − v_ref‖² dt along the way (trapezoid).

    Args:
        condition: rows [N] of the prompts, as for `sample`.
    """
    ends, gaps = [], []
    with torch.inference_mode():
        both = (in_parts(p, x0, how, chunk, condition) for p in (policy, reference))
        for (part, own), (_, anchor) in zip(*both, strict=True):
            seen: dict[float, Tensor] = {}

            def velocity(t: float, x: Tensor, own=own, anchor=anchor, seen=seen) -> Tensor:
                v = own(t, x)
                # a solver's first evaluation at a time is the one on its trajectory
                if t not in seen:
                    seen[t] = (v.float() - anchor(t, x).float()).square().flatten(1).sum()
                return v

            ends.append(solve(velocity, part, how.solver, how.nfe, policy.grid(how.grid)).float())
            gaps.append(_integral({t: float(gap) for t, gap in seen.items()}))
    return torch.cat(ends), sum(gaps) / len(x0)


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
