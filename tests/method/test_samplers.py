"""Samplers reach their order on an ODE with a known solution, and cost what they say."""

import math
from itertools import pairwise

import pytest
import torch

from orwcfm_fast.errors import UserError
from orwcfm_fast.method.samplers import SOLVERS, Solver, solve, time_grid, times
from orwcfm_fast.method.samplers.adams import adams_weights
from orwcfm_fast.method.samplers.adaptive import dopri5

FIXED = [name for name in SOLVERS.names() if not SOLVERS.get(name).adaptive]
GRIDS = ["uniform", "power:1.3", "power:2"]
X0 = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)


def velocity(t, x):
    """x(1) = x(0)·exp(sin 2)."""
    return x * (1 + 2 * t) * math.cos(t + t * t)


EXACT = X0 * math.exp(math.sin(2.0))


class Counted:
    def __init__(self, function=velocity):
        self.function, self.calls = function, []

    def __call__(self, t, x):
        self.calls.append(t)
        return self.function(t, x)


def logistic(t, x):
    return x * (1 - x)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", FIXED)
def test_converges_at_its_order(name, grid):
    method = SOLVERS.get(name)
    errors = []
    for steps in (256, 512):
        x = method(velocity, X0, time_grid(steps, grid))
        errors.append((x - EXACT).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(method.order, abs=0.3)


@pytest.mark.parametrize("name", FIXED)
def test_converges_at_its_order_where_velocity_depends_on_x_alone(name):
    method, x0 = SOLVERS.get(name), torch.tensor([0.1, 0.6], dtype=torch.float64)
    exact = 1 / (1 + (1 / x0 - 1) * math.exp(-1))
    errors = [(method(logistic, x0, time_grid(n, "power:1.3")) - exact).abs().max().item() for n in (32, 64)]
    assert math.log2(errors[0] / errors[1]) > method.order - 0.3


@pytest.mark.parametrize("nfe", [4, 5, 12, 13, 20, 99])
@pytest.mark.parametrize("name", FIXED)
def test_nfe_counts_network_evaluations(name, nfe):
    method, counted = SOLVERS.get(name), Counted()
    solve(counted, X0, name, nfe)
    assert len(counted.calls) == method.evals_per_step * method.steps(nfe) + method.extra
    assert nfe - method.evals_per_step < len(counted.calls) <= nfe


@pytest.mark.parametrize("name", FIXED)
def test_velocity_gets_python_float_times_between_0_and_1(name):
    counted = Counted()
    solve(counted, X0, name, 12, "power:1.3")
    assert all(type(t) is float and 0 <= t <= 1 for t in counted.calls)


@pytest.mark.parametrize("grid", GRIDS)
def test_grid_runs_from_0_to_1_and_increases(grid):
    t = time_grid(7, grid)
    assert (t[0], t[-1], len(t)) == (0.0, 1.0, 8)
    assert all(a < b for a, b in pairwise(t))


def test_power_grid_is_its_formula():
    assert time_grid(4, "power:2") == pytest.approx([0, 7 / 16, 12 / 16, 15 / 16, 1])


def test_adams_weights_on_equal_steps_are_the_textbook_ones():
    assert adams_weights([0.0, 1.0], 1.0, 2.0) == pytest.approx([-1 / 2, 3 / 2])
    assert adams_weights([0.0, 1.0, 2.0, 3.0], 3.0, 4.0) == pytest.approx(
        [-9 / 24, 37 / 24, -59 / 24, 55 / 24]
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_abm4_is_exact_where_velocity_is_cubic_in_time(grid):
    """From four evaluations on: the start-up's points are corrected from the very beginning."""
    cubic = lambda t, x: torch.full_like(x, 4 * t**3 - 6 * t + 1)  # noqa: E731
    for nfe in (4, 5, 9):
        assert (solve(cubic, X0, "abm4", nfe, grid) - (X0 - 1)).abs().max() < 1e-12


def test_dopri5_solves_a_sample_alike_whoever_it_is_solved_with():
    """One fast sample among many slow ones, whose mean error hides its own."""
    rates = torch.tensor([[40.0], *[[0.01]] * 63])

    def decay(t, x):
        return -rates[: len(x)] * (x - math.cos(9 * t))

    x0 = torch.linspace(-1, 1, 64)[:, None] + 2
    together, alone = (dopri5(decay, x0[:n], [0, 1]) for n in (64, 1))
    assert (together[0] - alone[0]).abs() < 1e-4


def test_dopri5_refuses_velocities_of_16_bits():
    with pytest.raises(UserError, match="--precision fp32"):
        dopri5(lambda t, x: x.bfloat16(), torch.ones(2, 3), [0, 1])


def test_dopri5_keeps_its_tolerance():
    errors = [(dopri5(velocity, X0, [0, 1], tol, tol) - EXACT).abs().max() for tol in (1e-5, 1e-7, 1e-9)]
    assert errors[0] < 1e-3
    assert errors[1] < 1e-5
    assert errors[2] < 1e-7
    assert (solve(velocity, X0, "dopri5", nfe=1) - EXACT).abs().max() < 1e-3


@pytest.mark.parametrize("name", FIXED)
def test_too_few_evaluations_name_the_fewest(name):
    least = SOLVERS.get(name).min_nfe
    with pytest.raises(UserError, match=f"at least {least}"):
        times(least - 1, name)
    solve(velocity, X0, name, least)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UserError, match="did you mean 'heun'"):
        times(8, "huen")
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        time_grid(8, "unifrom")


@pytest.mark.parametrize("grid", ["power:0.5", "power:-1", "power:", "power:nan", "power:x"])
def test_bad_power_is_one_line(grid):
    with pytest.raises(UserError, match="from 1 up"):
        time_grid(8, grid)


def test_solution_stays_float32_when_velocity_is_bf16():
    x = solve(lambda t, x: velocity(t, x).bfloat16(), X0.float(), "ab4", 12)
    assert x.dtype == torch.float32


def test_registry_entries_say_what_they_are():
    assert all(isinstance(SOLVERS.get(name), Solver) and SOLVERS.summary(name) for name in SOLVERS.names())
