"""Rows whose coefficients follow the policy's own velocity, anchored to an average of past policies."""

import torch

from orwcfm_fast.method.objectives.objective import LARGEST_ADVANTAGE, Coefficients, Point, method


@method(
    "nft", "advantage", old=True, reference=True, uses_alpha=False, reads_velocity=True,
    averages=lambda done: min(0.001 * done, 0.5), samples_average=True,
)  # fmt: skip
def nft(at: Point) -> Coefficients:
    """w = (c₊ − c₋)/β, b = c₊ + c₋ − w, a = kl: DiffusionNFT (Zheng et al., arXiv 2509.16117).

    c₊ = 5βρ·s²/ω₊ and c₋ = 5β(1 − ρ)·s²/ω₋, ρ = ½ + A/10; ω± is the mean absolute error of the endpoint that the
    branch v± = v_old ± β(v − v_old) predicts, s·|v± − u|, at least 1e-5.
    """
    assert at.branch_errors
    beta, s = at.settings.nft_beta, at.noise_level
    plus, minus = ((s * error).clamp_min(1e-5) for error in at.branch_errors)
    share = 0.5 + at.signal / (2 * LARGEST_ADVANTAGE)
    c_plus = LARGEST_ADVANTAGE * beta * share * s**2 / plus
    c_minus = LARGEST_ADVANTAGE * beta * (1 - share) * s**2 / minus
    w = (c_plus - c_minus) / beta
    return w, c_plus + c_minus - w, torch.full_like(w, at.settings.kl)


@method(
    "awm",
    "advantage",
    old=True,
    reference=True,
    uses_alpha=False,
    reads_velocity=True,
    averages=lambda done: min(0.001 * done, 0.3),
)
def awm(at: Point) -> Coefficients:
    """w = A/5·s·ℓ^{−3/4}, b = 1, a = kl: advantage-weighted matching (Xue et al., arXiv 2509.25050).

    ℓ is the draw's own loss: the gradient of the published loss −A/5·s·4(ℓ + 1e-10)^¼, on policy.
    """
    assert at.own_loss is not None
    w = at.signal / LARGEST_ADVANTAGE * at.noise_level * (at.own_loss + 1e-10) ** -0.75
    return w, torch.ones_like(w), torch.full_like(w, at.settings.kl)
