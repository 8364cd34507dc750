"""From rewards to weights, once a round over the whole rollout."""

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards.standardize import standardize

LEAST_NOISE = 0.05  # of x_t, in telling which samples it may have come from
LEAST_OTHERS = 64  # fewer of them tell little: with 7 of each prompt a pipeline learnt more slowly
SHRINKING = 0.9
GROWTH = 10.0  # quadrature loses mass where its errors grow 30 times, and samples stray at 500 times


def weigh(
    reward: Tensor, tau: float, kind: str = "exp", normalize: bool = True, mass: Tensor | None = None
) -> Tensor:
    """Weights w [N] of a round's rewards [N], in the rewards' precision (computed in float64).

    exp: exp(τ·r); linear: r; advantage: exp(τ·(r − mean)/std). Divided by their mean over the round
    (for exp by log-sum-exp, so that no reward overflows) unless `normalize` is false; linear always is.

    Args:
        mass: probabilities [N] of the samples, under which every mean is taken; equal where None.

    Raises:
        UserError: linear with a negative reward or none above zero; a weight that is too large a number.
    """
    r = reward.double()
    p = torch.full_like(r, 1 / len(r)) if mass is None else mass.double()
    if kind == "linear":
        if bool((r < 0).any()):
            raise UserError(
                f"weights 'linear': rewards must not be negative, the least is {r.min():.4g}; use exp"
            )
        if not bool(r.any()):
            raise UserError("weights 'linear': every reward is 0; use exp")
        return (r / (p @ r)).to(reward.dtype)
    if kind == "advantage":
        r = standardize(r, mass)
    log_w = tau * r
    if normalize:
        log_w = log_w - torch.logsumexp(log_w + p.clamp_min(1e-300).log(), 0)
    w = log_w.exp().to(reward.dtype)
    if not bool(w.isfinite().all()):
        raise UserError(f"τ = {tau:g} with rewards up to {reward.abs().max():.4g} overflows; lower |τ|")
    return w


def weigh_within(
    reward: Tensor, group: Tensor, tau: float, kind: str = "exp", normalize: bool = True
) -> Tensor:
    """`weigh` within each group of samples by itself, e.g. those of one prompt; group [N] integers.

    Under `linear` a group whose rewards are all 0 has weights 0: its prompt teaches nothing in this round.

    Raises:
        UserError: as `weigh`; under `linear` only where every reward of every group is 0.
    """
    w = torch.zeros_like(reward, dtype=torch.float32)
    zero_is_no_weight = kind == "linear" and bool(reward.any())
    for one in group.unique().tolist():
        own = reward[group == one]
        if not zero_is_no_weight or bool(own.any()):
            w[group == one] = weigh(own, tau, kind, normalize)
    return w


def effective_sample_size(w: Tensor) -> float:
    """(Σ|w|)²/Σw² of weights [N], between 1 and N; N where all are 0."""
    w = w.double().abs()
    return float(w.sum() ** 2 / w.square().sum()) if bool(w.any()) else float(len(w))


def check_positive(w: Tensor) -> None:
    """Every w > 0, as the transport plan of `--coupling ot` needs.

    Raises:
        UserError: a weight that is not.
    """
    if bool((w <= 0).any()):
        raise UserError("coupling 'ot': every weight must be positive; use --coupling independent")


def centre(weights: Tensor, mean: Tensor, alpha: float, grown: Tensor) -> tuple[Tensor, Tensor]:
    """The number c that `orw-centred` subtracts from a round's weights, and what `grown` is after it; all 0-d.

    For α > 0 the policy is held between two velocities, and its own, v_old, is not quite the E[u | x_t] of its
    samples. What it is off, the round multiplies by c/(E[w | x_t] + α), at most by c/(least w + α). With the mean as c
    that grows from round to round where samples are worse than the mean by more than α. It may grow to GROWTH in all;
    from then on c is SHRINKING of the least w + α, and it dies out.

    At α = 0 v_old is E[u | x_t] but for what the network is off, and a draw's c is the mean or, where that is less,
    E[w | x_t] (`mean_weight_at`), which lets no error grow. For α > 0 the lesser of the mean and E[w | x_t] + α would
    let none grow either, but the policy overshoots: what α pulls adds up over the rounds.

    Args:
        weights: [N]; mean: their mean under the round's law.
        grown: the most that an error can have been multiplied by since the first round, 1 or more; GROWTH once a round
            would have passed it.
    """
    if alpha == 0:
        return mean, grown
    bound = weights.min() + alpha
    after = grown * (mean / bound).clamp_min(1)
    found = torch.where(after <= GROWTH, mean, torch.minimum(mean, SHRINKING * bound))
    return found, after.clamp_max(GROWTH)


def mean_weight_at(
    x_t: Tensor,
    t: Tensor,
    x1: Tensor,
    weights: Tensor,
    own: Tensor,
    condition: Tensor | None = None,
    least: int = LEAST_OTHERS,
) -> Tensor:
    """E[w | x_t] [B] as the other samples of the rollout tell it: their weights, averaged by N(x_t; t·x1, (1−t)²).

    A draw's own sample is left out, so that given x_t the estimate does not depend on the draw's noise.

    Args:
        x_t: points [B, *shape] of times t [B]; own: their samples' rows [B] among x1.
        x1: samples [N, *shape] with weights [N]. condition: of each sample [N]; only those of the same one count.

    Returns:
        the mean weight itself where fewer than `least` others are of the same condition, or all weights are equal.
    """
    mean, points, samples = weights.mean(), x_t.flatten(1).float(), x1.flatten(1).float()
    near = t[:, None] * (points @ samples.T) - 0.5 * t[:, None].square() * samples.square().sum(1)
    near = near / (1 - t[:, None]).clamp_min(LEAST_NOISE).square()
    near = near.scatter(1, own[:, None], -torch.inf)
    if condition is not None:
        near = near.masked_fill(condition[own][:, None] != condition, -torch.inf)
    told = near.isfinite().sum(1) >= max(least, 1)
    return torch.where(told, mean + near.softmax(1).to(weights) @ (weights - mean), mean)
