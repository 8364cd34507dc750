"""Reward at equal drift, read off the fronts of several runs."""

import pytest

from orwcfm_fast.benchmarks.methods_report import reward_at


def made(seed, *points):
    """Runs of a front that starts at a reward of 0.5; each held-out mean is known to ± 0.02."""
    return [
        {"seed": seed, "before": {"reward": [0.5, 0.48, 0.52]},
         "after": {"reward": [r, r - 0.02, r + 0.02], "w2_coupled": w2}}
        for w2, r in points
    ]  # fmt: skip


def test_a_front_is_a_line_through_its_runs_from_the_start():
    runs = made(0, (2.0, 0.8), (1.0, 0.6))
    assert reward_at(runs, 0.5)[0] == pytest.approx(0.55)
    assert reward_at(runs, 1.5) == pytest.approx((0.7, 0.01))
    assert reward_at(runs, 2.5) is None


def test_seeds_are_averaged_and_their_scatter_is_the_error_where_it_is_larger():
    runs = made(0, (1.0, 0.6)) + made(1, (1.0, 0.7)) + made(2, (0.5, 0.7))
    mean, error = reward_at(runs, 1.0)
    assert mean == pytest.approx(0.65) and error == pytest.approx(0.05)
    assert reward_at(made(0, (1.0, 0.6)) + made(1, (1.0, 0.6)), 1.0)[1] == pytest.approx(0.01 / 2**0.5)
