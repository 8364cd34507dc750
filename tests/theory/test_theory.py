"""The exact recursion against closed forms, the design's table, and bad input."""

import math

import pytest
import torch

from orwcfm_fast.benchmarks.memory import peak_bytes
from orwcfm_fast.errors import UserError
from orwcfm_fast.theory import GaussianMixture, GridDensity, bound_chain, exact_recursion, refit
from orwcfm_fast.theory.density import on_grid
from orwcfm_fast.theory.transport import w2_plane

TWO_GAUSSIANS = GaussianMixture([0.5, 0.5], [-1.5, 1.5], [0.3, 0.3])
STANDARD_NORMAL = GaussianMixture([1.0], [0.0], [1.0])
UNIT_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: a second thread on a busy machine costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def right(x):
    return (x[:, 0] > 0).double()


@pytest.mark.parametrize(
    "alpha, method, normalize, rewards, limit",
    [
        (0.0, "orw", True, (0.622, 0.731, 0.818, 0.881, 0.924, 0.953), None),
        (1.0, "orw", False, (0.570, 0.608, 0.629, 0.640, 0.646), 0.651),
        (1.0, "orw", True, (0.561, 0.590, 0.602, 0.608, 0.610), 0.611),
        (0.3, "orw", True, (0.594, 0.661, 0.705, 0.734, 0.753), 0.784),
        (0.3, "orw-centred", True, (0.594, 0.661, 0.705, 0.735, 0.754), 0.785),
    ],
)
def test_table_of_the_design(alpha, method, normalize, rewards, limit):
    found = exact_recursion(
        TWO_GAUSSIANS, right, alpha, 0.5, 6 if limit is None else 14, method=method, normalize=normalize,
        cells=(96,), steps=32, check=False,
    )  # fmt: skip
    assert found.rewards[: len(rewards)] == pytest.approx(rewards, abs=0.002)
    if limit is not None:
        assert found.rewards[-1] == pytest.approx(limit, abs=0.002)


def test_linear_log_weight_shifts_a_gaussian_exactly():
    """N(0, 1), w = exp(r/2), r = x: round N is N(N/2, 1), at distance N/2."""
    for r in exact_recursion(
        STANDARD_NORMAL, lambda x: x[:, 0], 0.0, 0.5, 6, method="orw", bounds=((-9, 12),)
    ).rounds:
        assert r.reward == pytest.approx(r.round / 2, abs=1e-6)
        assert r.w2 == pytest.approx(r.round / 2, abs=1e-6)
        assert r.entropy == pytest.approx(UNIT_ENTROPY, abs=1e-6)


def test_quadratic_log_weight_narrows_a_gaussian_exactly():
    """N(0, 1), w = exp(−x²/2): round N is N(0, 1/(1+N))."""
    found = exact_recursion(
        STANDARD_NORMAL,
        lambda x: x[:, 0] ** 2,
        0.0,
        -0.5,
        3,
        method="orw",
        bounds=((-8, 8),),
        cells=(384,),
        steps=64,
        check=False,
    )
    points = found.grid.points[:, 0]
    for r in found.rounds:
        std = (1 + r.round) ** -0.5
        assert r.reward == pytest.approx(std**2, abs=1e-6)
        assert r.w2 == pytest.approx(1 - std, abs=1e-6)
        assert r.entropy == pytest.approx(UNIT_ENTROPY + math.log(std), abs=1e-6)
        exact = torch.exp(-0.5 * (points / std) ** 2) / (std * math.sqrt(2 * math.pi))
        assert float((r.density - exact).abs().max()) < 2e-6


def test_plane_shifts_a_gaussian_exactly():
    density = GaussianMixture([1.0], [[0.0, 0.5]], [[1.0, 0.7]])
    found = exact_recursion(
        density,
        lambda x: x[:, 0] - x[:, 1],
        0.0,
        0.5,
        2,
        cells=(64, 64),
        bounds=((-6, 7), (-5, 5)),
        check=False,
    )
    for r in found.rounds:
        means = 0.5 * r.round, 0.5 - 0.49 * 0.5 * r.round
        assert r.reward == pytest.approx(means[0] - means[1], abs=5e-3)
        assert r.w2 == pytest.approx(math.hypot(means[0], means[1] - 0.5), abs=2e-3)
        assert r.entropy == pytest.approx(2 * UNIT_ENTROPY + math.log(0.7), abs=5e-3)


def test_plane_agrees_with_line_where_the_second_axis_is_idle():
    flat = GaussianMixture([0.5, 0.5], [[-1.5, 0.0], [1.5, 0.0]], [0.3, 0.3])
    plane = exact_recursion(flat, right, 1.0, 0.5, 2, cells=(48, 48), check=False)
    line = exact_recursion(TWO_GAUSSIANS, right, 1.0, 0.5, 2, check=False)
    for two, one in zip(plane.rounds, line.rounds, strict=True):
        assert two.reward == pytest.approx(one.reward, abs=1e-3)
        assert two.w2 == pytest.approx(one.w2, abs=5e-3)
        assert two.drift == pytest.approx(one.drift, abs=1e-3)


def test_halving_cells_and_steps_moves_figures_less_than_the_stated_error():
    coarse = exact_recursion(TWO_GAUSSIANS, right, 0.3, 0.5, 5, cells=(128,), steps=24)
    fine = exact_recursion(TWO_GAUSSIANS, right, 0.3, 0.5, 5, cells=(256,), steps=48, check=False)
    assert 0 < coarse.error["reward"] < 2e-3
    for rough, good in zip(coarse.rounds, fine.rounds, strict=True):
        for name, error in rough.error.items():
            assert abs(getattr(rough, name) - getattr(good, name)) <= error + 1e-12


def test_zero_temperature_stays_at_rest():
    for alpha in (0.0, 1.0):
        found = exact_recursion(TWO_GAUSSIANS, right, alpha, 0.0, 10, cells=(128,), check=False)
        assert found.rounds[-1].reward == pytest.approx(0.5, abs=1e-5)
        assert found.rounds[-1].w2 < 1e-3
        assert found.rounds[-1].drift < 1e-6


def test_raw_weights_with_a_constant_added_mean_another_alpha():
    """w = exp(τ(r + c)) at α is w = exp(τr) at α·exp(−τc); normalised weights do not see c."""

    def higher(x):
        return right(x) + 2.0

    def final(reward, alpha, normalize):
        found = exact_recursion(
            TWO_GAUSSIANS, reward, alpha, 0.5, 2, normalize=normalize, cells=(128,), check=False
        )
        return found.rounds[-1].w2

    assert final(higher, math.e, False) == pytest.approx(final(right, 1.0, False), abs=1e-9)
    assert final(higher, 1.0, True) == pytest.approx(final(right, 1.0, True), abs=1e-9)


@pytest.mark.parametrize("weighting", ["linear", "advantage"])
def test_other_weights_raise_the_reward_too(weighting):
    found = exact_recursion(
        TWO_GAUSSIANS, lambda x: 1 + right(x), 0.5, 0.5, 2, weighting=weighting, check=False
    ).rewards
    assert 1.5 < found[0] < found[1]


def test_signed_weights_need_enough_alpha():
    def signed(reward, mass):
        return reward - 0.5

    with pytest.raises(UserError, match=r"α > 0\.5"):
        exact_recursion(TWO_GAUSSIANS, right, 0.3, 0.5, 2, weighting=signed)
    assert exact_recursion(TWO_GAUSSIANS, right, 3.0, 0.5, 1, weighting=signed, check=False).rewards[0] > 0.5


def test_bound_chain_is_an_identity():
    found = exact_recursion(TWO_GAUSSIANS, right, 0.3, 0.5, 2, check=False)
    chain = bound_chain(found.rounds[2].velocity, found.rounds[0].velocity)
    assert float(chain.gap.abs().max()) > 1
    assert float((chain.gap - chain.integral).abs().max()) < 1e-3
    assert found.rounds[2].w2 ** 2 <= chain.coupled * 1.02
    assert chain.coupled <= math.exp(2 * chain.lipschitz) * chain.velocity_gap


def test_paper_drift_is_nothing_before_round_one_and_grows():
    found = exact_recursion(TWO_GAUSSIANS, right, 1.0, 0.5, 3, check=False)
    drifts = [r.drift for r in found.rounds]
    assert drifts[0] == 0 and drifts == sorted(drifts) and drifts[1] > 0.01


def test_paper_drift_of_a_shifted_gaussian():
    """N(m, 1) against N(0, 1): v − v_ref = m(1−t)/(t² + (1−t)²) everywhere."""
    found = exact_recursion(STANDARD_NORMAL, lambda x: x[:, 0], 0.0, 0.5, 1, bounds=((-8, 9),), check=False)
    t = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    exact = 0.25 * float(torch.trapezoid(((1 - t) / (t**2 + (1 - t) ** 2)) ** 2, t))
    assert found.rounds[1].drift == pytest.approx(exact, abs=1e-5)


def test_samples_follow_the_density():
    found = exact_recursion(TWO_GAUSSIANS, right, 0.0, 0.5, 2, check=False)
    draws = found.sample(2, 40_000, seed=1)
    assert draws.shape == (40_000, 1)
    assert float((draws > 0).float().mean()) == pytest.approx(found.rewards[1], abs=0.01)
    assert float(draws[draws > 0].std()) == pytest.approx(0.3, abs=0.01)


def test_values_on_a_grid_give_what_the_mixture_gives():
    grid, values = on_grid(TWO_GAUSSIANS, None, (256,), halved=False)
    given = GridDensity(grid.bounds, 7 * values)
    a = exact_recursion(given, right(grid.points), 0.3, 0.5, 2)
    b = exact_recursion(TWO_GAUSSIANS, right, 0.3, 0.5, 2)
    assert a.rewards == pytest.approx(b.rewards, abs=1e-9)
    assert a.error["reward"] < 1e-3


@pytest.mark.parametrize("shift, stds", [((0.5, 0.2), (0.5, 0.7)), ((0.0, 0.0), (0.6, 0.6))])
def test_w2_in_the_plane_between_gaussians(shift, stds):
    bounds, cells = ((-5.0, 5.0), (-5.0, 5.0)), (48, 48)
    grid, p = on_grid(GaussianMixture([1.0], [[0.0, 0.0]], [[0.5, 0.7]]), bounds, cells, halved=False)
    _, q = on_grid(GaussianMixture([1.0], [shift], [stds]), bounds, cells, halved=False)
    exact = math.hypot(*shift, stds[0] - 0.5, stds[1] - 0.7)
    assert w2_plane(grid, q, p) == pytest.approx(exact, abs=1e-3)


def test_reward_that_is_not_finite_names_the_point():
    with pytest.raises(UserError, match=r"reward: not finite at .* x = .*narrow bounds"):
        exact_recursion(TWO_GAUSSIANS, lambda x: x[:, 0].log(), 1.0, 0.5)


@pytest.mark.parametrize(
    "density",
    [
        lambda x: torch.zeros(len(x)),
        lambda x: torch.full((len(x),), -math.inf),
        lambda x: 1000 * x[:, 0] ** 2,
    ],
    ids=["flat", "nothing", "explodes"],
)
def test_density_that_cannot_be_normalised_is_refused(density):
    with pytest.raises(UserError, match="density:"):
        exact_recursion(density, right, 1.0, 0.5, bounds=((-4, 4),))


def test_grid_too_coarse_for_the_asked_error_says_which_grid_to_use():
    with pytest.raises(UserError, match=r"too coarse for 1e-05.*use cells=\(64,\) and steps=24"):
        exact_recursion(TWO_GAUSSIANS, right, 1.0, 0.5, 2, cells=(32,), steps=12, tolerance=1e-5)


def test_mass_that_leaves_the_grid_asks_for_wider_bounds():
    with pytest.raises(UserError, match=r"(widen|wider) bounds"):
        exact_recursion(STANDARD_NORMAL, lambda x: x[:, 0], 0.0, 3.0, 4)


@pytest.mark.parametrize("setting", [(-1.0, 0.5, 6), (1.0, math.inf, 6), (1.0, 0.5, 0)])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError):
        exact_recursion(TWO_GAUSSIANS, right, *setting)


def test_ten_rounds_in_1d_take_seconds(stopwatch):
    exact_recursion(TWO_GAUSSIANS, right, 1.0, 0.5, 10)
    assert stopwatch() < 10


@pytest.mark.soak
def test_five_rounds_on_a_96_by_96_grid_take_under_a_minute_and_four_gib(stopwatch):
    torch.set_num_threads(2)
    angle = torch.arange(8) * math.pi / 4
    ring = GaussianMixture([1] * 8, 2 * torch.stack([angle.cos(), angle.sin()], 1), [0.2] * 8)
    found = exact_recursion(ring, right, 1.0, 0.5, 5)
    assert stopwatch() < 60
    assert found.error["reward"] < 0.005 and abs(found.rounds[-1].mass - 1) < 1e-3
    held = peak_bytes(torch.device("cpu"))  # by this process so far
    print(f"{held / 2**30:.2f} GiB")
    assert held < 4 * 2**30


@pytest.mark.parametrize("dim", [1, 2])
def test_a_density_refitted_on_samples_gives_the_recursion_of_the_true_one(dim):
    true = GaussianMixture([0.3, 0.7], [[-1.5] * dim, [1.5] * dim], 0.4)
    g = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        mode = (torch.rand(100_000, 1, generator=g) < 0.7).double()
        batches.append(3 * mode - 1.5 + 0.4 * torch.randn(100_000, dim, generator=g).double())
    rounds = 3 if dim == 1 else 1
    found, expected = (
        exact_recursion(d, lambda x: (x[:, 0] > 0).double(), 0.3, 0.5, rounds, check=False).rounds[-1]
        for d in (refit(batches), true)
    )
    assert abs(found.reward - expected.reward) < 0.003
    assert abs(found.w2 - expected.w2) < 0.02


@pytest.mark.parametrize("samples", [[], [torch.zeros(4, 3)], [torch.full((4, 1), math.nan)]])
def test_refitting_refuses_what_is_no_sample_of_a_density(samples):
    with pytest.raises(UserError, match="density"):
        refit(samples)
