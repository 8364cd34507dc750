"""Evaluation on held-out samples: reward, W2 measured in three ways, diversity, fidelity; models side by side."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.data.datasets import SHIPPED, load_data
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.features import decoded_features
from orwcfm_fast.evaluation.fidelity import FIDELITY_MIN, fidelity, mode_coverage, vendi_score
from orwcfm_fast.evaluation.held_out import VELOCITY_GAP_SAMPLES, Evaluator, HeldOutSamples, draw_held_out
from orwcfm_fast.evaluation.intervals import Interval, half_sampled, mean_pairwise_distance
from orwcfm_fast.method import noise
from orwcfm_fast.method.rollout import sample, start_conditions, start_noise
from orwcfm_fast.method.weighting import effective_sample_size
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import Scores
from orwcfm_fast.settings import Sampling
from orwcfm_fast.sharding import is_sharded

EXACT_W2_SAMPLES = 2048
DIVERSITY_SAMPLES = 2048


@dataclass(frozen=True)
class Measures:
    """What was measured of one model. W2 is against the reference, in units of the samples; None without a reference.

    Attributes:
        reward: mean over the samples.
        w2_coupled: √E‖x − x_ref‖² on shared noise, at least W2.
        w2_exact: exact W2 of the same two sets of samples (POT).
        w2_floor: exact W2 of two independent sets of reference samples.
        velocity_gap: ∫E‖v − v_ref‖² dt along the model's trajectories.
        lipschitz: largest local slope L of v_ref met on its trajectories; W2² ≤ e^{2L} · velocity_gap.
        diversity: mean pairwise distance in `features`. vendi: Vendi score in them, of images only.
        fid, kid, precision, recall: in `features`, `against` the data or the reference.
        modes: number of modes of labelled 1-D and 2-D data that are covered. on_data: share of samples on that data.
        pixel_std: standard deviation, averaged over coordinates.
        confidence: mean probability of the most probable class. classes: share of the samples in each class.
        rewards: each reward by itself where there are several. holdout: the rewards that were not trained on.
        ess_share: effective sample size of the weights that the samples would have in a round, over n.
    """

    name: str
    n: int
    reward: Interval
    w2_coupled: Interval | None
    w2_exact: Interval | None
    w2_floor: Interval | None
    velocity_gap: float | None
    lipschitz: float | None
    diversity: Interval
    pixel_std: float
    confidence: float | None
    classes: dict[str, Interval] = field(default_factory=dict)
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
    ess_share: float | None = None

    @property
    def of_images(self) -> bool:
        """Whether the samples are images, of which alone the Vendi score is measured."""
        return self.vendi is not None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measures":
        """The inverse of `to_dict`."""
        found: dict[str, Any] = dict(values)
        for key, value in values.items():
            if key in ("classes", "rewards", "holdout"):
                found[key] = {name: Interval(**v) for name, v in value.items()}
            elif isinstance(value, dict):
                found[key] = Interval(**value)
            elif key in ("w2_exact", "w2_floor") and value is not None:
                # a summary from before these had intervals
                found[key] = Interval(value, value, value)
        return cls(**found)


@dataclass(frozen=True)
class FidelityTarget:
    """What fidelity is measured against: real samples, with labels where the data has them, or the reference.

    `strict`: requested by the user, so that too few samples are an error.
    """

    name: str
    samples: Tensor | None = None
    labels: Tensor | None = None
    strict: bool = False


def target_for(against: str, data: str, n: int, data_dir: str = "") -> FidelityTarget | None:
    """At most n real samples of the data; None where fidelity is not measured against data.

    Raises:
        UserError: the data is missing and cannot be downloaded.
    """
    if against not in ("auto", "data") or (against == "auto" and data.partition(":")[0] not in SHIPPED):
        return None
    samples, labels = load_data(data, data_dir)
    pick = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:n]
    return FidelityTarget("data", samples[pick], None if labels is None else labels[pick], against == "data")


def evaluate(
    models: dict[str, Policy],
    reference: Policy | None,
    evaluator: Evaluator,
    how: Sampling,
    n: int,
    sizes: BatchSizes,
    *,
    target: FidelityTarget | None = None,
    against_reference: bool = False,
    ranks: ProcessGroup = SINGLE_PROCESS,
    weigh: Callable[[Scores], Tensor] | None = None,
) -> list[Measures]:
    """Measure each model on the same n start noises, which no rollout, probe, forecast or `orwcfm sample` draws.

    Args:
        models: by name.
        reference: what W2 is measured against; a model that is the reference itself has a W2 of 0.
        how: solver, number of evaluations, seed.
        sizes: its `chunk` is the number of samples drawn at once.
        target: real samples that fidelity is measured against.
        against_reference: measure fidelity against samples of the reference from other noise instead.
        ranks: every rank calls this and draws its share; the first measures, the others return an empty list.
        weigh: scores of n samples → their weights [n], for `ess_share`, which is left out where it raises UserError.

    Raises:
        UserError: there is no reference to measure against, or there are too few samples.
    """
    if against_reference and reference is None:
        raise UserError("--against reference: these models have none; name one with --reference")
    first = next(iter(models.values()))
    others = n if against_reference else min(n, EXACT_W2_SAMPLES)

    def draw(chunk: int) -> tuple[Tensor | None, Tensor | None, Tensor | None, dict[str, HeldOutSamples]]:
        mine, x_ref, other, other_features = ranks.share(n), None, None, None
        if reference:
            x_ref = _draw_samples(reference, how, mine, chunk)
            there = ranks.share(others)
            other = _draw_samples(reference, how, slice(n + there.start, n + there.stop), chunk)
            if against_reference:
                other_features = decoded_features(reference, evaluator.features, other, chunk)
        found = {
            name: draw_held_out(name, policy, reference, x_ref, evaluator, how, mine, chunk)
            for name, policy in models.items()
        }
        return x_ref, other, other_features, found

    with ranks.together():
        x_ref, other, real, drawn = sizes.fit("chunk", draw, n)
    x_ref = None if x_ref is None else ranks.gather(x_ref, n)
    other = None if other is None else ranks.gather(other, others)
    real = None if real is None else ranks.gather(real, others)
    drawn = {name: found.gathered(ranks, n) for name, found in drawn.items()}
    with ranks.together():
        if not ranks.first:
            return []
        floor = slope = None
        if reference and x_ref is not None and other is not None:
            floor = exact_w2(x_ref[:EXACT_W2_SAMPLES], other[:EXACT_W2_SAMPLES])
            # its 70 evaluations of 64 samples in float32 take too long with a network that takes prompts; FSDP
            # gathers weights in the policy's precision alone
            bf16_shards = reference.precision != torch.float32 and any(
                map(is_sharded, reference.network.parameters())
            )
            if not reference.conditions and not bf16_shards:
                slope = lipschitz(reference, start_noise(first, min(n, 64), how.seed, noise.HELD_OUT), how)
        if real is not None:
            target = FidelityTarget("reference", strict=True)
        elif target is not None and target.samples is not None:
            real = _features_like(target.samples, next(iter(drawn.values())), evaluator)
        return [
            _measure(name, found, evaluator, x_ref, floor, slope, target, real, weigh)
            for name, found in drawn.items()
        ]


def _draw_samples(policy: Policy, how: Sampling, which: slice, chunk: int) -> Tensor:
    """The samples `which`, by their numbers, of a policy."""
    n = which.stop - which.start
    x0 = start_noise(policy, n, how.seed, noise.HELD_OUT, which.start)
    return sample(policy, x0, how, chunk, condition=start_conditions(policy, n, how, which.start))


def _features_like(samples: Tensor, drawn: HeldOutSamples, evaluator: Evaluator) -> Tensor:
    """Features of real samples, which must have the shape of a model's decoded ones."""
    if samples.shape[1:] != drawn.decoded:
        shapes = ["×".join(map(str, shape)) for shape in (samples.shape[1:], drawn.decoded)]
        raise UserError(f"--against data: its samples are {shapes[0]}, the model's {shapes[1]}")
    return evaluator.features(samples.to(drawn.x.device))


def _measure(name, drawn, evaluator, x_ref, floor, slope, target, real, weigh) -> Measures:
    x, features = drawn.x, drawn.features
    near = x if x_ref is None else x - x_ref
    found = Measures(
        name=name,
        n=len(x),
        reward=Interval.of(drawn.scores.total),
        w2_coupled=None if x_ref is None else Interval.of(near.square().flatten(1).sum(1)).root(),
        w2_exact=None if x_ref is None else exact_w2(x[:EXACT_W2_SAMPLES], x_ref[:EXACT_W2_SAMPLES]),
        w2_floor=floor,
        velocity_gap=None if drawn.gap is None else drawn.gap / min(len(x), VELOCITY_GAP_SAMPLES),
        lipschitz=slope,
        diversity=mean_pairwise_distance(features[:DIVERSITY_SAMPLES]),
        pixel_std=drawn.std,
        confidence=None if drawn.probabilities is None else float(drawn.probabilities.max(1).values.mean()),
        classes={} if drawn.probabilities is None else class_shares(drawn.probabilities),
        rewards=_intervals(drawn.scores) if len(drawn.scores.values) > 1 else {},
        holdout=_intervals(drawn.held_out) if drawn.held_out else {},
        features=evaluator.features.name,
        vendi=_vendi(features) if len(drawn.decoded) == 3 else None,
        ess_share=_ess_share(drawn.scores, len(x), weigh) if weigh else None,
    )
    return found if target is None else replace(found, **_against(drawn, real, target))


def _ess_share(scores: Scores, n: int, weigh: Callable[[Scores], Tensor]) -> float | None:
    try:
        return effective_sample_size(weigh(scores)) / n
    except UserError:  # e.g. linear weights of rewards that are all 0
        return None


def _vendi(features: Tensor) -> Interval:
    return half_sampled(lambda x: [vendi_score(x)], features[:DIVERSITY_SAMPLES], repeats=32)[0]


def _against(drawn: HeldOutSamples, real: Tensor, target: FidelityTarget) -> dict[str, Any]:
    """Everything that compares the samples with real ones, whose features are [M, F]."""
    found: dict[str, Any] = {"against": f"{len(real)} of the {target.name}"}
    if len(drawn.decoded) == 1 and drawn.decoded[0] <= 2 and target.labels is not None:
        assert target.samples is not None
        found["modes"], found["on_data"] = mode_coverage(drawn.x, target.samples, target.labels)
    if min(len(drawn.x), len(real)) < FIDELITY_MIN and not target.strict:
        return found
    return found | vars(fidelity(drawn.features, real, target.name, target.strict))


def class_shares(probabilities: Tensor) -> dict[str, Interval]:
    """Share of the samples in each class, by probabilities [N, K]."""
    found = probabilities.argmax(1)
    return {str(k): Interval.of((found == k).double()) for k in range(probabilities.shape[1])}


def _intervals(scores: Scores) -> dict[str, Interval]:
    return {name: Interval.of(values) for name, values in scores.values.items()}


def exact_w2(x: Tensor, y: Tensor) -> Interval:
    """W2 of two samples [N, …] as empirical measures (POT's network simplex), which is more than that of their laws.

    Rows of x and y may belong together, as samples from shared noise do. The interval says how far another N samples
    would lie off: √N (W₂² − E W₂²) is asymptotically that of the mean of φ(x) + ψ(y) with the plan's potentials
    (del Barrio & Loubes, Ann. Probab. 2019).
    """
    import ot

    if torch.equal(x, y):
        return Interval(0.0, 0.0, 0.0)
    cost = ot.dist(x.flatten(1).double().cpu().numpy(), y.flatten(1).double().cpu().numpy())
    _, found = ot.emd2([], [], cost, numItermax=2_000_000, log=True)
    return Interval.of(torch.as_tensor(found["u"] + found["v"])).root()


def lipschitz(policy: Policy, x0: Tensor, how: Sampling, iterations: int = 6) -> float:
    """Largest ‖∂v/∂x‖ met along trajectories from x0: power iteration by finite differences.

    The Jacobian of a flow's exact velocity is symmetric, so its largest stretch is its largest |eigenvalue|.
    """
    generator = torch.Generator().manual_seed(0)
    epsilon, largest = 1e-2, 0.0
    # finite differences are small; weights held in bf16 are those that the policy computes with
    network, held = policy.network, any(p.dtype != torch.float32 for p in policy.network.parameters())
    network = copy.deepcopy(network).float() if held else network
    exact = replace(policy, network=network, precision=torch.float32)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
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
