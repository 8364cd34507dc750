"""Held-out samples: each rank draws, decodes and scores its share; the decoded ones are not kept."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orwcfm_fast.distributed import ProcessGroup
from orwcfm_fast.evaluation.drift import sample_with_drift
from orwcfm_fast.evaluation.features import Features, features_for
from orwcfm_fast.method import noise
from orwcfm_fast.method.rollout import sample, start_conditions, start_noise
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import Reward, RewardSum, Scores, make_reward
from orwcfm_fast.settings import RewardOptions, Sampling

VELOCITY_GAP_SAMPLES = 512
FLOAT64_CHUNK = 1 << 22  # values converted to float64 at once


@dataclass(frozen=True)
class Evaluator:
    """What held-out samples are evaluated with.

    Attributes:
        reward, holdout: the rewards that were trained on, and those that were not.
        features: in which diversity and fidelity are measured.
        probabilities: decoded samples → probabilities [B, K] of the K classes, where the data has a classifier.
        accuracy: of that classifier, on `judged_on` held-out real samples.
    """

    reward: Reward
    reward_name: str
    features: Features
    probabilities: Callable[[Tensor], Tensor] | None = None
    accuracy: float | None = None
    judged_on: int = 0
    holdout: RewardSum | None = None


def evaluator_for(
    data: str,
    reward: Reward,
    name: str,
    holdout: RewardSum | None = None,
    features: str = "auto",
    options: RewardOptions | None = None,
) -> Evaluator:
    """The evaluator of samples like `data`; handwritten digits have a classifier."""
    from orwcfm_fast.rewards.digits import classifier_of

    found = features_for(features, data, options)
    classifier = classifier_of(data, options.data_dir if options else "")
    if classifier is None:
        return Evaluator(reward, name, found, holdout=holdout)
    judged = classifier.accuracy, classifier.judged_on
    return Evaluator(reward, name, found, classifier.probabilities, *judged, holdout)


@dataclass(frozen=True)
class HeldOutSamples:
    """N samples of one model, with everything that is measured of the decoded ones.

    Attributes:
        x: samples [N, *shape].
        features: of the decoded samples, [N, F].
        decoded: shape of one decoded sample.
        moments: sums over the decoded samples of their values and of their squares, float64 [1, 2, D].
        scores, held_out: of the rewards trained on, and of those that were not.
        probabilities: of the classes, [N, K]; None without a classifier.
        gap: sum over the first VELOCITY_GAP_SAMPLES of ∫‖v − v_ref‖² dt; None without a reference.
    """

    x: Tensor
    features: Tensor
    decoded: tuple[int, ...]
    moments: Tensor
    scores: Scores
    held_out: Scores | None
    probabilities: Tensor | None
    gap: float | None

    @property
    def std(self) -> float:
        """Standard deviation of the decoded samples, averaged over coordinates."""
        n, (total, squares) = len(self.x), self.moments.sum(0)
        return float(((squares - total**2 / n).clamp_min(0) / (n - 1)).sqrt().mean())

    def gathered(self, ranks: ProcessGroup, n: int) -> "HeldOutSamples":
        """All n samples on every rank, from the share that each rank has."""

        def whole(part: Tensor) -> Tensor:
            return ranks.gather(part, n)

        return replace(
            self,
            x=whole(self.x),
            features=whole(self.features),
            moments=ranks.gather(self.moments, ranks.world),
            scores=self.scores.each(whole),
            held_out=self.held_out and self.held_out.each(whole),
            probabilities=None if self.probabilities is None else whole(self.probabilities),
            gap=None if self.gap is None else sum(ranks.all(self.gap)),
        )


def draw_held_out(
    name: str,
    policy: Policy,
    reference: Policy | None,
    x_ref: Tensor | None,
    evaluator: Evaluator,
    how: Sampling,
    mine: slice,
    chunk: int,
) -> HeldOutSamples:
    """Draw the held-out samples `mine` of a model, and measure them.

    Args:
        name: of the model, for messages.
        x_ref: the reference's samples of the same noise, which are taken where the model is the reference itself.
        mine: numbers of the samples that this rank draws.
        chunk: samples drawn at once.
    """
    x0 = start_noise(policy, mine.stop - mine.start, how.seed, noise.HELD_OUT, mine.start)
    condition = start_conditions(policy, len(x0), how, mine.start)
    gap = None if reference is None else 0.0
    if policy is reference:
        assert x_ref is not None
        x = x_ref
    else:
        parts, k = [], max(min(VELOCITY_GAP_SAMPLES - mine.start, len(x0)), 0) if reference else 0
        if reference and k:
            rows = condition if condition is None else condition[:k]
            x, drift = sample_with_drift(policy, reference, x0[:k], how, chunk, rows)
            parts, gap = [x], drift.gap * k
        if k < len(x0):
            rows = condition if condition is None else condition[k:]
            parts.append(sample(policy, x0[k:], how, chunk, condition=rows))
        x = torch.cat(parts)
    return _score(name, policy, x, condition, evaluator, gap, mine.start, chunk)


def _score(name, policy, x, condition, evaluator, gap, start, chunk) -> HeldOutSamples:
    """Decode and measure the samples x, those of a pipeline a chunk at a time; others in one reward call."""
    size = chunk if policy.pipeline else len(x)
    conditions = [None] if condition is None else condition.split(size)
    reward = make_reward(evaluator.reward, name=evaluator.reward_name)
    features, probabilities, scores, held_out = [], [], [], []
    moments: Tensor | float = 0.0
    for part, rows in zip(x.split(size), conditions, strict=True):
        seen, prompts = policy.decode(part, rows), policy.prompts_of(rows)
        features.append(evaluator.features(seen))
        with torch.inference_mode():
            probabilities += [evaluator.probabilities(seen)] if evaluator.probabilities else []
        scores.append(reward.scores(seen, name, start, prompts))
        held_out += [evaluator.holdout.scores(seen, name, start, prompts)] if evaluator.holdout else []
        moments = _moments(seen.flatten(1)) + moments
        start += len(part)
    assert isinstance(moments, Tensor)
    return HeldOutSamples(
        x, torch.cat(features), tuple(seen.shape[1:]), moments[None], Scores.joined(scores),
        Scores.joined(held_out) if held_out else None, torch.cat(probabilities) if probabilities else None, gap,
    )  # fmt: skip


def _moments(flat: Tensor) -> Tensor:
    """Σ over samples [N, D] of their values and of their squares, float64 [2, D]."""
    total = flat.new_zeros(2, flat.shape[1], dtype=torch.float64)
    for part in flat.split(max(1, FLOAT64_CHUNK // flat.shape[1])):
        exact = part.double()
        total[0] += exact.sum(0)
        total[1] += exact.square_().sum(0)
    return total
