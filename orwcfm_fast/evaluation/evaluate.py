"""Evaluation on held-out samples: reward, W2 three ways, diversity, confidence; models side by side."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast import noise
from orwcfm_fast.data import SHIPPED, load_data
from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.drift import sample_with_gap
from orwcfm_fast.evaluation.features import Features, features_for
from orwcfm_fast.evaluation.fidelity import FIDELITY_MIN, fidelity, mode_coverage, vendi_score
from orwcfm_fast.evaluation.intervals import Interval, half_sampled, mean_pairwise_distance
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import RewardSum, Scores, make_reward
from orwcfm_fast.rollout import Reward, sample, start_conditions, start_noise
from orwcfm_fast.settings import RewardOptions, Sampling

EXACT_W2_MAX = 2048
SPREAD_MAX = 2048
GAP_MAX = 512


@dataclass(frozen=True)
class Measures:
    """One model's figures. W2 in the units of the samples, against the reference; None without one.

    Attributes:
        reward: mean over the samples; w2_coupled: √E‖x − x_ref‖² on shared noise, at least W2;
        w2_exact: exact W2 of the same two samples (POT); w2_floor: of two independent reference samples;
        velocity_gap: ∫E‖v − v_ref‖² dt along the model's trajectories; lipschitz: largest local slope L of
        v_ref met there, so that W2² ≤ e^{2L} · velocity_gap; diversity: mean pairwise distance in features;
        vendi: Vendi score in those features, images only; fid, kid, precision, recall: in them, `against` data
        or reference; modes, on_data: modes of labelled 1-D and 2-D data that are covered, share of samples on it;
        pixel_std: mean over coordinates of the standard deviation; confidence: of the digits classifier;
        rewards: each by itself where several add up; holdout: those that were not trained on.
    """

    name: str
    n: int
    reward: Interval
    w2_coupled: Interval | None
    w2_exact: float | None
    w2_floor: float | None
    velocity_gap: float | None
    lipschitz: float | None
    diversity: Interval
    pixel_std: float
    confidence: float | None
    rewards: dict[str, Interval] = field(default_factory=dict)
    holdout: dict[str, Interval] = field(default_factory=dict)
    features: str = ""
    vendi: Interval | None = None
    against: str = ""
    fid: Interval | None = None
    kid: Interval | None = None
    precision: Interval | None = None
    recall: Interval | None = None
    modes: Interval | None = None
    on_data: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measures":
        """What `to_dict` gave."""
        found: dict[str, Any] = dict(values)
        for key, value in values.items():
            if key in ("rewards", "holdout"):
                found[key] = {name: Interval(**v) for name, v in value.items()}
            elif isinstance(value, dict):
                found[key] = Interval(**value)
        return cls(**found)


@dataclass(frozen=True)
class Judge:
    """What measures: reward, features for diversity; the classifier's confidence and accuracy where there is one."""

    reward: Reward
    reward_name: str
    features: Features
    confidence: Callable[[Tensor], Tensor] | None = None
    accuracy: float | None = None
    holdout: RewardSum | None = None


def judge_for(
    data: str,
    reward: Reward,
    name: str,
    holdout: RewardSum | None = None,
    features: str = "auto",
    options: RewardOptions | None = None,
) -> Judge:
    """Features by choice and data; confidence by the classifier for digits."""
    found = features_for(features, data, options)
    if data.partition(":")[0] != "digits":
        return Judge(reward, name, found, holdout=holdout)
    from orwcfm_fast.rewards.digits import digit_classifier

    classifier = digit_classifier()

    def confidence(x: Tensor) -> Tensor:
        return classifier.probabilities(x).max(1).values

    return Judge(reward, name, found, confidence, classifier.accuracy, holdout)


@dataclass(frozen=True)
class Target:
    """What fidelity is measured against: real or reference samples, decoded, with labels where there are some.

    `strict`: asked for by the user, so that too few samples are an error.
    """

    name: str
    samples: Tensor
    labels: Tensor | None = None
    strict: bool = False


def target_for(against: str, data: str, n: int, data_dir: str = "") -> Target | None:
    """At most n real samples of the data; None where fidelity is not measured against data.

    Raises:
        UserError: the data is not there, and cannot be had.
    """
    if against not in ("auto", "data") or (against == "auto" and data.partition(":")[0] not in SHIPPED):
        return None
    samples, labels = load_data(data, data_dir)
    pick = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:n]
    return Target("data", samples[pick], None if labels is None else labels[pick], against == "data")


def evaluate(
    models: dict[str, Policy],
    reference: Policy | None,
    judge: Judge,
    how: Sampling,
    n: int,
    chunk: int,
    *,
    target: Target | None = None,
    against_reference: bool = False,
) -> list[Measures]:
    """Measure each model on the same n start noises (those of `orwcfm sample` with that seed).

    Args:
        models: by the name to show.
        reference: what W2 is measured against; a model that is the reference gets zeros.
        how: solver, evaluations, seed.
        target: real samples that fidelity is measured against.
        against_reference: measure fidelity against the reference, on samples of other noise.
    """
    first = next(iter(models.values()))
    x0 = start_noise(first, n, how.seed)
    x_ref = sample(reference, x0, how, chunk) if reference else None
    floor = slope = None
    if reference and x_ref is not None:
        count = n if against_reference else min(n, EXACT_W2_MAX)
        fresh = start_noise(first, count, how.seed, noise.SAMPLE, n)
        other = sample(reference, fresh, how, chunk, condition=start_conditions(reference, count, how, n))
        floor = exact_w2(x_ref[:EXACT_W2_MAX], other[:EXACT_W2_MAX])
        # 70 evaluations of 64 samples in float32 are too many of a network that takes prompts
        slope = None if reference.conditions else lipschitz(reference, x0[:64], how)
        if against_reference:
            target = Target("reference", reference.decode(other), strict=True)
    elif against_reference:
        raise UserError("--against reference: these models have none; name one with --reference")
    return [
        _measure(name, policy, reference, judge, how, x0, x_ref, floor, slope, chunk, target)
        for name, policy in models.items()
    ]


def _measure(name, policy, reference, judge, how, x0, x_ref, floor, slope, chunk, target) -> Measures:
    condition = start_conditions(policy, len(x0), how)
    if reference is None:
        x, gap = sample(policy, x0, how, chunk), None
    elif policy is reference:
        x, gap = x_ref, 0.0
    else:
        x, gap = sample_with_gap(policy, reference, x0[:GAP_MAX], how, chunk)
        if len(x0) > GAP_MAX:
            later = condition if condition is None else condition[GAP_MAX:]
            x = torch.cat([x, sample(policy, x0[GAP_MAX:], how, chunk, condition=later)])
    seen, prompts = policy.decode(x), policy.prompts_of(condition)
    features = judge.features(seen)
    with torch.inference_mode():
        confidence = float(judge.confidence(seen).mean()) if judge.confidence else None
    scores = make_reward(judge.reward, name=judge.reward_name).scores(seen, name, prompts=prompts)
    held_out = judge.holdout.scores(seen, name, prompts=prompts) if judge.holdout else None
    found = Measures(
        name=name,
        n=len(x),
        reward=Interval.of(scores.total),
        w2_coupled=None if x_ref is None else Interval.of((x - x_ref).square().flatten(1).sum(1)).root(),
        w2_exact=None if x_ref is None else exact_w2(x[:EXACT_W2_MAX], x_ref[:EXACT_W2_MAX]),
        w2_floor=floor,
        velocity_gap=gap,
        lipschitz=slope,
        diversity=mean_pairwise_distance(features[:SPREAD_MAX]),
        pixel_std=float(seen.flatten(1).std(0).mean()),
        confidence=confidence,
        rewards=_intervals(scores) if len(scores.values) > 1 else {},
        holdout=_intervals(held_out) if held_out else {},
        features=judge.features.name,
        vendi=_vendi(features) if seen.dim() == 4 else None,
    )
    return found if target is None else replace(found, **_against(seen, features, judge, target))


def _vendi(features: Tensor) -> Interval:
    return half_sampled(lambda x: [vendi_score(x)], features[:SPREAD_MAX], repeats=32)[0]


def _against(seen: Tensor, features: Tensor, judge: Judge, target: Target) -> dict[str, Any]:
    """The figures that compare with other samples."""
    real = target.samples.to(seen.device)
    if real.shape[1:] != seen.shape[1:]:
        shapes = ["×".join(map(str, v.shape[1:])) for v in (real, seen)]
        raise UserError(f"--against data: its samples are {shapes[0]}, the model's {shapes[1]}")
    found: dict[str, Any] = {"against": f"{len(real)} of the {target.name}"}
    if seen.dim() == 2 and seen.shape[1] <= 2 and target.labels is not None:
        found["modes"], found["on_data"] = mode_coverage(seen, real, target.labels)
    if min(len(seen), len(real)) < FIDELITY_MIN and not target.strict:
        return found
    return found | vars(fidelity(features, judge.features(real), target.name, target.strict))


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
