"""Rows that weigh by the advantage A, with an anchor of fixed strength."""

import torch

from orwcfm_fast.method.objectives.objective import Coefficients, Point, method


@method(
    "adrpo", "advantage", old=False, reference=True, uses_alpha=False,
    remedy="--adrpo-beta0 higher by at least {missing:.4g}",
)  # fmt: skip
def adrpo(at: Point) -> Coefficients:
    """w = A, b = 0, a = β₀ − A: adaptive divergence regularisation (Fan et al., arXiv 2510.18053)."""
    return at.signal, torch.zeros_like(at.signal), at.settings.adrpo_beta0 - at.signal


@method("ram", "advantage", old=True, reference=True, uses_alpha=False)
def ram(at: Point) -> Coefficients:
    """w = m·A, b = −m·A, a = 1: reinforce adjoint matching (Bergmeister et al., arXiv 2605.10759)."""
    pull = at.settings.ram_m * at.signal
    return pull, -pull, torch.ones_like(pull)
