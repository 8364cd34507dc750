"""Weights: their formulas, their scale, and what is refused."""

import pytest
import torch

from orwcfm_fast.errors import UserError
from orwcfm_fast.method.weighting import (
    effective_sample_size,
    weigh,
    weigh_within,
)
from orwcfm_fast.rewards.standardize import standardize

R = torch.tensor([0.1, 0.5, 0.9, 0.2])


def test_exp_is_the_formula_over_its_mean():
    raw = (2 * R.double()).exp()
    assert torch.allclose(weigh(R, 2.0).double(), raw / raw.mean(), rtol=1e-6)
    assert torch.allclose(weigh(R, 2.0, normalize=False).double(), raw, rtol=1e-6)


def test_linear_weights_of_a_group_that_scores_zero_throughout_are_zero():
    r, group = torch.tensor([0.0, 0.0, 1.0, 3.0]), torch.tensor([5, 5, 2, 2])
    assert weigh_within(r, group, 0.5, "linear").tolist() == [0, 0, 0.5, 1.5]
    with pytest.raises(UserError, match="every reward is 0"):
        weigh_within(torch.zeros(4), group, 0.5, "linear")


def test_a_constant_added_to_the_reward_changes_nothing():
    assert torch.allclose(weigh(R, 2.0), weigh(R + 5000, 2.0), rtol=1e-3)


def test_advantage_ignores_scale_and_shift_of_the_reward():
    assert torch.allclose(weigh(R, 1.0, "advantage"), weigh(40 * R - 3, 1.0, "advantage"), rtol=1e-5)


def test_rewards_that_differ_by_rounding_alone_weigh_the_same():
    r = torch.full((8,), 27.3125)
    r[:2] = torch.nextafter(r[:2], r.new_tensor(0.0))
    assert torch.equal(weigh(r, 1.0, "advantage"), torch.ones(8))
    assert torch.equal(standardize(r), torch.zeros(8))
    assert standardize(r + 0.01 * torch.arange(8)).std(correction=0) == pytest.approx(1)


def test_linear_is_reward_over_mean_and_refuses_what_has_none():
    assert torch.allclose(weigh(R, 0.5, "linear"), R / R.mean())
    for bad in (torch.tensor([1.0, -0.1]), torch.zeros(3)):
        with pytest.raises(UserError, match="use exp"):
            weigh(bad, 0.5, "linear")


def test_overflow_of_raw_weights_is_named():
    with pytest.raises(UserError, match="overflow"):
        weigh(torch.tensor([500.0, 1.0]), 1.0, normalize=False)


def test_effective_sample_size_counts_equal_weights_fully_and_one_weight_once():
    assert effective_sample_size(torch.full((7,), 0.3)) == pytest.approx(7)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
