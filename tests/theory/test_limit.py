"""The limit line: against closed forms, and as a bound on what the recursion does."""

import math

import pytest
import torch

from orwcfm_fast.errors import UserError
from orwcfm_fast.theory.forecast import forecast
from orwcfm_fast.theory.limit import LimitLine, limit_line


def normal(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_one_dimension_equals_the_optimum():
    """N(0, 1), r = 1[x > 0]: those within a of 0 move there; 8,192 quantiles, to 1 %."""
    levels = (torch.arange(8192, dtype=torch.float64) + 0.5) / 8192
    x = torch.special.ndtri(levels)[torch.randperm(8192, generator=torch.Generator().manual_seed(0))]
    line = limit_line(x[:, None], (x > 0).double())
    for a in (0.3, 0.8, 1.5):
        inside = 0.5 * math.erf(a / math.sqrt(2))
        second = inside - a * math.exp(-a * a / 2) / math.sqrt(2 * math.pi)  # ∫_{−a}^0 x² φ(x) dx
        low, high = line.least_w2(0.5 + inside)
        assert high == pytest.approx(math.sqrt(second), rel=0.01)
        assert low == pytest.approx(math.sqrt(second), rel=0.03)


def test_a_linear_reward_shifts_all():
    """r = x: W2 is the gain itself, in any dimension in which samples lie close."""
    x = normal(6000, 1)
    line = limit_line(x, x[:, 0])
    low, high = line.least_w2(float(x.mean()) + 0.5)
    assert low == pytest.approx(0.5, rel=0.02) and high == pytest.approx(0.5, rel=0.02)


def test_the_line_rises_from_no_change_and_ends_at_the_highest_reward():
    x = normal(500, 3)
    line = limit_line(x, x[:, 0].sigmoid())
    assert (
        float(line.w2[0]) == 0
        and bool((line.w2.diff() >= -1e-9).all())
        and bool((line.reward.diff() > 0).all())
    )
    assert bool((line.w2_low <= line.w2).all()) and float(line.w2_low.min()) >= 0
    assert line.least_w2(-1.0) == (0.0, 0.0) and math.isnan(line.least_w2(2.0)[0])
    again = LimitLine.from_dict(line.to_dict())
    assert torch.equal(again.w2, line.w2)


def test_more_samples_bring_the_line_down_to_its_extrapolation():
    x = normal(4000, 5)
    r = (x[:, 0] > 0.5).double()
    few, many = limit_line(x[:500], r[:500]), limit_line(x, r)
    start = float(r.mean())
    shift = float(r[:500].mean()) - start
    for gain in (0.1, 0.3):
        low, high = few.least_w2(start + shift + gain)
        assert low < many.least_w2(start + gain)[1] < high


@pytest.mark.parametrize("method", ["orw", "orw-centred"])
def test_no_forecast_beats_the_line(method):
    x = normal(400, 4)
    for alpha in (0.0, 0.5):
        final = forecast(x, x[:, 0].sigmoid(), alpha, 1.0, 2, method=method, exact_w2=False).final
        assert 0 <= final.w2_least < final.w2_coupled


def test_equal_rewards_have_no_line_and_bad_input_is_refused():
    line = limit_line(normal(50, 2), torch.ones(50))
    assert float(line.w2.max()) == 0
    for x, r in (
        (normal(4, 2), torch.ones(4)),
        (normal(9, 2), torch.ones(8)),
        (normal(9, 2), torch.full((9,), math.nan)),
    ):
        with pytest.raises(UserError, match="limit line"):
            limit_line(x, r)
