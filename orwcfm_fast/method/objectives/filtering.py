"""Regression on rewarded samples without an anchor."""

import torch

from orwcfm_fast.method.objectives.objective import Coefficients, Point, method


@method(
    "rwr", "reward", old=False, reference=False, uses_alpha=False, rests=False,
    remedy="rewards that are not negative",
)  # fmt: skip
def rwr(at: Point) -> Coefficients:
    """w = r / mean r, b = a = 0: reward-weighted regression (Peters and Schaal, ICML 2007)."""
    nothing = torch.zeros_like(at.signal)
    return at.signal / at.mean.clamp_min(1e-12), nothing, nothing


@method("raft", "best", old=False, reference=False, uses_alpha=False, rests=False)
def raft(at: Point) -> Coefficients:
    """w = 1 for the best of its group, b = a = 0: reward-ranked fine-tuning (Dong et al., TMLR 2023)."""
    nothing = torch.zeros_like(at.signal)
    return at.signal, nothing, nothing
