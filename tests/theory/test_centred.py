"""The exact recursion of the centred objective: against its formula, against the paper's, at rest."""

import math

import pytest
import torch

from orwcfm_fast.errors import UserError
from orwcfm_fast.method.weighting import GROWTH, SHRINKING
from orwcfm_fast.theory import GaussianMixture, exact_recursion

TWO_GAUSSIANS = GaussianMixture([0.5, 0.5], [-1.5, 1.5], [0.3, 0.3])


def right(x):
    return (x[:, 0] > 0).double()


def posterior_mean(recursion, number, f, t, x):
    """E[f(x1) | x_t = x] under q_number by a plain sum over the grid; f [P] or [P, d] → [n] or [n, d]."""
    y, q = recursion.grid.points, recursion.rounds[number].density.reshape(-1)
    kernel = torch.exp(-(x[:, None] - t * y).square().sum(-1) / (2 * (1 - t) ** 2)) * q
    return kernel / kernel.sum(1, keepdim=True) @ f


@pytest.fixture(scope="module")
def settled():
    return exact_recursion(
        TWO_GAUSSIANS, right, 0.5, 1.0, 30, cells=(64,), steps=24, settle=1e-3, check=False
    )


def test_each_velocity_is_where_the_gradient_of_its_objective_vanishes(settled):
    """(w − c)·(v − u) + c·(v − v_old) + α·(v − v_ref), its mean given x_t: 0 in the second round."""
    t, x = 0.6, torch.linspace(-1.2, 1.2, 7, dtype=torch.float64)[:, None]
    v, v_old, v_ref = (settled.rounds[k].velocity(t, x) for k in (2, 1, 0))
    w = settled.reward.exp() / float((settled.rounds[1].density * settled.grid.cell) @ settled.reward.exp())
    c = float(settled.rounds[2].velocity.stages[-1].centre)
    u = (posterior_mean(settled, 1, (w - c)[:, None] * settled.grid.points, t, x)) / (1 - t)
    mean_w = posterior_mean(settled, 1, w - c, t, x)[:, None]
    gradient = mean_w * v - (u - mean_w * x / (1 - t)) + c * (v - v_old) + 0.5 * (v - v_ref)
    assert float(gradient.abs().max()) < 1e-9
    assert float((v_old - v_ref).abs().max()) > 0.1


def test_the_fixed_point_balances_reward_and_anchor(settled):
    """At rest E[(w − c)·(u − v) | x_t] = α·(v − v_ref)."""
    assert settled.settled is not None
    t, x = 0.5, torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    last = len(settled.rounds) - 1
    v, v_ref = settled.rounds[last].velocity(t, x), settled.rounds[0].velocity(t, x)
    w = settled.reward.exp() / float(
        (settled.rounds[last].density * settled.grid.cell) @ settled.reward.exp()
    )
    c = float(settled.rounds[last].velocity.stages[-1].centre)
    moment = posterior_mean(settled, last, (w - c)[:, None] * settled.grid.points, t, x)
    pull = (moment - posterior_mean(settled, last, w - c, t, x)[:, None] * (x + (1 - t) * v)) / (1 - t)
    assert float((pull - 0.5 * (v - v_ref)).abs().max()) < 0.2 * float(
        pull.abs().max()
    )  # settled to 1e-3 in E[r]
    assert float(pull.abs().max()) > 0.1


def test_the_centre_is_the_mean_until_errors_can_have_grown_tenfold():
    found = exact_recursion(TWO_GAUSSIANS, right, 0.1, 1.0, 10, cells=(64,), steps=24, check=False)
    grown, centres = 1.0, []
    for stage in found.rounds[-1].velocity.stages:
        bound = float(stage.weight.min()) + 0.1
        grown *= max(1.0, 1 / bound)
        centres.append(1.0 if grown <= GROWTH else SHRINKING * bound)
        assert float(stage.centre) == pytest.approx(centres[-1])
    assert centres[0] == 1 > 0.6 > centres[-1]


@pytest.mark.parametrize("dim", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_without_anchor_centred_and_paper_are_one_recursion(dim):
    if dim == 1:
        density, reward, how = TWO_GAUSSIANS, right, dict(cells=(128,), steps=128)
    else:
        density = GaussianMixture([1.0], [[0.0, 0.5]], [[1.0, 0.7]])
        reward, how = (lambda x: x[:, 0] - x[:, 1]), dict(cells=(64, 64), bounds=((-6, 7), (-5, 5)))
    found, paper = (
        exact_recursion(density, reward, 0.0, 0.5, 2, method=method, check=False, **how)
        for method in ("orw-centred", "orw")
    )
    assert found.rewards == pytest.approx(paper.rewards, abs=1e-6)


@pytest.mark.parametrize("dim", [1, 2])
def test_anchored_fixed_points_of_both_forms_lie_close_and_apart(dim):
    if dim == 1:
        density, how = TWO_GAUSSIANS, dict(cells=(96,))
    else:
        density, how = (
            GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], 0.5),
            dict(cells=(32, 32), steps=16),
        )
    found, paper = (
        exact_recursion(density, right, 0.3, 1.0, 3, method=method, check=False, **how)
        for method in ("orw-centred", "orw")
    )
    assert found.rewards[0] == pytest.approx(paper.rewards[0], abs=1e-6)  # v_old is v_ref: no difference yet
    assert 1e-4 < abs(found.rewards[-1] - paper.rewards[-1]) < 0.02


def test_without_temperature_the_velocity_is_the_reference_itself():
    found = exact_recursion(TWO_GAUSSIANS, right, 0.3, 0.0, 3, cells=(64,), check=False)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for t in (0.2, 0.9, 1.0):
        apart = found.rounds[-1].velocity(t, x) - found.rounds[0].velocity(t, x)
        assert float(apart.abs().max()) < 1e-9


def test_a_method_without_a_recursion_is_refused():
    with pytest.raises(UserError, match=r"method .nft. has no forecast.*orw-centred or orw"):
        exact_recursion(TWO_GAUSSIANS, right, 1.0, 0.5, method="nft")
    assert math.isfinite(
        exact_recursion(TWO_GAUSSIANS, right, 1.0, 0.5, 1, cells=(64,), check=False).rewards[0]
    )
