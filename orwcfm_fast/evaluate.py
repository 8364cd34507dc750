"""Evaluation on held-out samples: reward, W2 three ways, diversity, confidence; models side by side."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast import noise
from orwcfm_fast.drift import coupled_w2, pairwise_distance, sample_with_gap
from orwcfm_fast.policy import Policy
from orwcfm_fast.rewards import RewardSum, Scores, make_reward
from orwcfm_fast.rollout import Reward, sample, start_noise
from orwcfm_fast.settings import Sampling

EXACT_W2_MAX = 2048
SPREAD_MAX = 2048
GAP_MAX = 512


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval, 1.96 standard errors each side."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> "Interval":
        """Of independent values [N]."""
        mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Measures:
    """One model's figures. W2 in the units of the samples, against the reference; None without one.

    Attributes:
        reward: mean over the samples; w2_coupled: √E‖x − x_ref‖² on shared noise, at least W2;
        w2_exact: exact W2 of the same two samples (POT); w2_floor: of two independent reference samples;
        velocity_gap: ∫E‖v − v_ref‖² dt along the model's trajectories; lipschitz: largest local slope L of
        v_ref met there, so that W2² ≤ e^{2L} · velocity_gap; diversity: mean pairwise distance in features;
        pixel_std: mean over coordinates of the standard deviation; confidence: of the digits classifier;
        rewards: each by itself where several add up; holdout: those that were not trained on.
    """

    name: str
    n: int
    reward: Interval
    w2_coupled: float | None
    w2_exact: float | None
    w2_floor: float | None
    velocity_gap: float | None
    lipschitz: float | None
    diversity: float
    pixel_std: float
    confidence: float | None
    rewards: dict[str, Interval] = field(default_factory=dict)
    holdout: dict[str, Interval] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Judge:
    """What measures: reward, features for diversity; the classifier's confidence and accuracy where there is one."""

    reward: Reward
    reward_name: str
    features: Callable[[Tensor], Tensor]
    confidence: Callable[[Tensor], Tensor] | None = None
    accuracy: float | None = None
    holdout: RewardSum | None = None


def judge_for(data: str, reward: Reward, name: str, holdout: RewardSum | None = None) -> Judge:
    """Features and confidence by the data: the classifier's for digits, else the samples themselves."""
    if data.partition(":")[0] != "digits":
        return Judge(reward, name, lambda x: x.flatten(1), holdout=holdout)
    from orwcfm_fast.rewards.digits import digit_classifier

    classifier = digit_classifier()

    def confidence(x: Tensor) -> Tensor:
        return classifier.probabilities(x).max(1).values

    return Judge(reward, name, classifier.features, confidence, classifier.accuracy, holdout)


def evaluate(
    models: dict[str, Policy], reference: Policy | None, judge: Judge, how: Sampling, n: int, chunk: int
) -> list[Measures]:
    """Measure each model on the same n start noises (those of `orwcfm sample` with that seed).

    Args:
        models: by the name to show.
        reference: what W2 is measured against; a model that is the reference gets zeros.
        how: solver, evaluations, seed.
    """
    first = next(iter(models.values()))
    x0 = start_noise(first, n, how.seed)
    x_ref = sample(reference, x0, how, chunk) if reference else None
    floor = slope = None
    if reference and x_ref is not None:
        other = sample(
            reference, start_noise(first, min(n, EXACT_W2_MAX), how.seed, noise.SAMPLE, n), how, chunk
        )
        floor = exact_w2(x_ref[:EXACT_W2_MAX], other)
        slope = lipschitz(reference, x0[:64], how)
    return [
        _measure(name, policy, reference, judge, how, x0, x_ref, floor, slope, chunk)
        for name, policy in models.items()
    ]


def _measure(name, policy, reference, judge, how, x0, x_ref, floor, slope, chunk) -> Measures:
    if reference is None:
        x, gap = sample(policy, x0, how, chunk), None
    elif policy is reference:
        x, gap = x_ref, 0.0
    else:
        x, gap = sample_with_gap(policy, reference, x0[:GAP_MAX], how, chunk)
        x = torch.cat([x, sample(policy, x0[GAP_MAX:], how, chunk)]) if len(x0) > GAP_MAX else x
    seen = policy.decode(x)
    with torch.inference_mode():
        spread = pairwise_distance(judge.features(seen[:SPREAD_MAX]))
        confidence = float(judge.confidence(seen).mean()) if judge.confidence else None
    scores = make_reward(judge.reward, name=judge.reward_name).scores(seen, name)
    held_out = judge.holdout.scores(seen, name) if judge.holdout else None
    return Measures(
        name=name,
        n=len(x),
        reward=Interval.of(scores.total),
        w2_coupled=None if x_ref is None else coupled_w2(x, x_ref),
        w2_exact=None if x_ref is None else exact_w2(x[:EXACT_W2_MAX], x_ref[:EXACT_W2_MAX]),
        w2_floor=floor,
        velocity_gap=gap,
        lipschitz=slope,
        diversity=spread,
        pixel_std=float(seen.flatten(1).std(0).mean()),
        confidence=confidence,
        rewards=_intervals(scores) if len(scores.values) > 1 else {},
        holdout=_intervals(held_out) if held_out else {},
    )


def _intervals(scores: Scores) -> dict[str, Interval]:
    return {name: Interval.of(values) for name, values in scores.values.items()}


def exact_w2(x: Tensor, y: Tensor) -> float:
    """W2 of two samples [N, …] and [M, …] as empirical measures (POT's network simplex)."""
    import ot

    if torch.equal(x, y):
        return 0.0
    cost = ot.dist(x.flatten(1).double().cpu().numpy(), y.flatten(1).double().cpu().numpy())
    return float(max(ot.emd2([], [], cost, numItermax=2_000_000), 0.0)) ** 0.5


def lipschitz(policy: Policy, x0: Tensor, how: Sampling, iterations: int = 6) -> float:
    """Largest ‖∂v/∂x‖ met along trajectories from x0: power iteration by finite differences.

    The Jacobian of a flow's exact velocity is symmetric, so its largest stretch is its largest |eigenvalue|.
    """
    generator = torch.Generator().manual_seed(0)
    epsilon, largest = 1e-2, 0.0
    exact = replace(policy, precision=torch.float32)  # differences are small
    with torch.inference_mode():
        x = x0
        for k in range(steps := 10):
            t = (k + 0.5) / steps
            v = exact.velocity(t, x)
            z = torch.randn(x.shape, generator=generator).to(x.device)
            for _ in range(iterations):
                z = z / z.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (x.dim() - 1))
                z = (exact.velocity(t, x + epsilon * z) - v) / epsilon
            largest = max(largest, float(z.flatten(1).norm(dim=1).max()))
            x = x + v / steps
    return largest
