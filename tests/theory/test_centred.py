"""The exact recursion of the centred objective: against its formula, against the paper's, at rest."""

import math

import pytest
import torch

from orwcfm_fast.errors import UserError
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
    c = (posterior_mean(settled, 1, w, t, x) + 0.5).clamp_max(1)[:, None]
    assert bool((c < 1).any()) and bool((c == 1).any())
    points = settled.grid.points
    both = [posterior_mean(settled, 1, f * points, t, x) for f in (w[:, None], torch.ones_like(points))]
    u = (both[0] - c * both[1]) / (1 - t)
    mean_w = posterior_mean(settled, 1, w, t, x)[:, None] - c
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
    points, mean_w = settled.grid.points, posterior_mean(settled, last, w, t, x)[:, None]
    c = (mean_w + 0.5).clamp_max(1)
    both = [posterior_mean(settled, last, f * points, t, x) for f in (w[:, None], torch.ones_like(points))]
    pull = (both[0] - c * both[1] - (mean_w - c) * (x + (1 - t) * v)) / (1 - t)
    assert float((pull - 0.5 * (v - v_ref)).abs().max()) < 0.2 * float(
        pull.abs().max()
    )  # settled to 1e-3 in E[r]
    assert float(pull.abs().max()) > 0.1


def test_errors_do_not_grow_over_many_rounds_where_alpha_is_small_and_tau_high():
    """With the mean weight as c, the solver's own errors grow until it loses mass."""
    coarse, fine = (
        exact_recursion(TWO_GAUSSIANS, right, 0.1, 1.0, 14, cells=(cells,), steps=24, check=False)
        for cells in (64, 128)
    )
    assert all(abs(r.mass - 1) < 0.01 for r in coarse.rounds)
    assert coarse.rewards == pytest.approx(fine.rewards, abs=0.01)


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
    # what v_old is off E[u | x_t] is the grid's error alone: in 2-D with 96 cells a side a tenth of this
    assert found.rewards == pytest.approx(paper.rewards, abs=1e-6 if dim == 1 else 3e-5)


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
