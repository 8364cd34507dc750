"""Evaluation measures what its names say."""

import pytest
import torch
from torch import nn

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.evaluation.drift import coupled_w2, pairwise_distance, sample_with_drift
from orwcfm_fast.evaluation.evaluate import Measures, evaluate, exact_w2, lipschitz
from orwcfm_fast.evaluation.held_out import evaluator_for
from orwcfm_fast.evaluation.intervals import Interval
from orwcfm_fast.method.rollout import start_noise
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.settings import Sampling


class Affine(nn.Module):
    """v(t, x) = slope·x + shift: its flow is known."""

    def __init__(self, slope: float, shift: float) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.tensor(slope)), nn.Parameter(torch.tensor(shift))

    def forward(self, t, x):
        return self.slope * x + self.shift


def policy(slope=0.0, shift=0.0, dim=2):
    return Policy(Affine(slope, shift), (dim,), "custom", "moons")


HOW = Sampling(solver="rk4", nfe=40, grid="uniform")


def test_w2_of_a_shift_is_the_shift_in_all_three_ways():
    evaluator = evaluator_for("moons", make_reward("right"), "right")
    reference = policy(0.3)
    moved = policy(0.3, 0.5)
    found = {
        m.name: m
        for m in evaluate(
            {"reference": reference, "moved": moved}, reference, evaluator, HOW, 256, BatchSizes(chunk=100)
        )
    }
    shift = 0.5 * (2.718281828**0.3 - 1) / 0.3 * 2**0.5
    assert found["moved"].w2_coupled.mean == pytest.approx(shift, rel=1e-4)
    assert found["moved"].w2_exact.mean == pytest.approx(shift, rel=1e-3)
    assert found["moved"].velocity_gap == pytest.approx(0.5, rel=1e-3)
    assert found["moved"].lipschitz == pytest.approx(0.3, rel=0.02)
    still = found["reference"]
    assert still.w2_coupled.mean == still.w2_exact.mean == still.velocity_gap == 0
    assert found["reference"].w2_floor.low > 0.05


def test_exact_w2_never_exceeds_the_coupled_one():
    x, y = torch.randn(64, 3), torch.randn(64, 3) + 1
    assert exact_w2(x, y).mean <= coupled_w2(x, y) + 1e-9
    assert exact_w2(x, x[torch.randperm(64)]).mean == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_of_exact_w2_is_that_of_other_samples(paired):
    """With pairs, as those of shared noise are, and without."""
    torch.manual_seed(0)
    found = []
    for _ in range(200):
        x = torch.randn(100, 2)
        y = (x if paired else torch.randn(100, 2)) * torch.tensor([2.0, 1.0]) + torch.tensor([1.0, 0.0])
        found.append(exact_w2(x, y))
    spread = 1.96 * torch.tensor([w.mean for w in found]).std()
    half = torch.tensor([(w.high - w.low) / 2 for w in found]).mean()
    assert half == pytest.approx(float(spread), rel=0.15)


def test_lipschitz_finds_the_largest_slope():
    anisotropic = policy()
    anisotropic.network.slope = nn.Parameter(torch.tensor([-5.0, 1.0]))
    assert lipschitz(anisotropic, torch.randn(8, 2), HOW) == pytest.approx(5, rel=0.02)


def test_chunks_do_not_change_what_is_measured():
    a, b = policy(0.3, 0.5), policy(0.1)
    x0 = start_noise(a, 100, 0)
    whole, drift = sample_with_drift(a, b, x0, HOW, 100)
    parts, of_parts = sample_with_drift(a, b, x0, HOW, 7)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert drift.gap == pytest.approx(of_parts.gap, rel=1e-5)
    assert drift.norm_ratios() == pytest.approx(of_parts.norm_ratios(), rel=1e-5)


def test_norms_are_compared_by_time():
    class Growing(Affine):
        def forward(self, t, x):
            return torch.ones_like(x) * (1 + t).view(-1, 1)

    grown, flat = Policy(Growing(0.0, 0.0), (2,), "custom", "moons"), policy(0.0, 1.0)
    how = Sampling(solver="euler", nfe=4, grid="uniform")
    _, drift = sample_with_drift(grown, flat, torch.zeros(8, 2), how, 3)
    times = [1.0, None, 1.25, None, None, 1.5, None, 1.75, None, None]
    assert drift.norm_ratios() == [None if t is None else pytest.approx(t) for t in times]


def test_interval_covers_the_mean_95_times_in_100():
    g = torch.Generator().manual_seed(0)
    intervals = [Interval.of(torch.rand(200, generator=g)) for _ in range(1000)]
    assert 0.93 < sum(i.low <= 0.5 <= i.high for i in intervals) / 1000 < 0.97


def test_pairwise_distance_is_over_different_pairs():
    assert pairwise_distance(torch.tensor([[0.0], [1.0], [3.0]])) == pytest.approx(2.0)


def test_without_a_reference_there_is_no_w2():
    evaluator = evaluator_for("moons", make_reward("right"), "right")
    (found,) = evaluate({"a": policy()}, None, evaluator, HOW, 64, BatchSizes(chunk=64))
    assert found.w2_coupled is None and found.w2_exact is None and found.velocity_gap is None
    assert found.reward.mean == pytest.approx(0.5, abs=0.2)


def test_a_summary_from_before_w2_had_an_interval_is_read():
    evaluator = evaluator_for("moons", make_reward("right"), "right")
    (found,) = evaluate({"a": policy()}, None, evaluator, HOW, 64, BatchSizes(chunk=64))
    assert Measures.from_dict(found.to_dict()) == found
    old = Measures.from_dict(found.to_dict() | {"w2_exact": 1.5})
    assert old.w2_exact == Interval(1.5, 1.5, 1.5) and old.w2_floor is None
