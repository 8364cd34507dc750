"""The forecast on an empirical measure: against the exact recursion, its reach, and the α it names."""

import math

import pytest
import torch

from orwcfm_fast.data.datasets import load_data
from orwcfm_fast.errors import UserError
from orwcfm_fast.theory import GaussianMixture, exact_recursion
from orwcfm_fast.theory.alpha_search import alpha_for
from orwcfm_fast.theory.empirical import Empirical, EmpiricalVelocity, Stage
from orwcfm_fast.theory.forecast import REACH, forecast, forecast_many

TWO_GAUSSIANS = GaussianMixture([0.5, 0.5], [-1.5, 1.5], [0.3, 0.3])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def right(x):
    return (x[:, 0] > 0).double()


@pytest.fixture(scope="module")
def two_gaussians():
    """600 samples, as many left as right: the empirical start is the exact one."""
    side = torch.arange(600) % 2
    x = (3.0 * side - 1.5)[:, None] + 0.3 * torch.randn(600, 1, generator=torch.Generator().manual_seed(0))
    return x, right(x)


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's digits in [−1, 1] and a classifier's probability of an even one."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    found = load_digits()
    images = found.data / 8 - 1
    classifier = LogisticRegression(C=10.0, tol=0.01, max_iter=500).fit(images, found.target)
    even = classifier.predict_proba(images)[:, ::2].sum(1)
    return torch.as_tensor(images, dtype=torch.float32), torch.as_tensor(even)


@pytest.mark.parametrize("alpha, method", [(0.0, "orw-centred"), (0.3, "orw-centred"), (0.3, "orw")])
def test_forecast_meets_the_exact_recursion(two_gaussians, alpha, method):
    exact = exact_recursion(
        TWO_GAUSSIANS, right, alpha, 0.5, 3, method=method, cells=(96,), steps=32, check=False
    )
    found = forecast(*two_gaussians, alpha, 0.5, 3, method=method)
    for mine, theirs in zip(found.rounds[1:], exact.rounds[1:], strict=True):
        assert mine.reward == pytest.approx(theirs.reward, abs=0.02)
        assert abs(mine.reward - theirs.reward) <= 2 * mine.reward_error
        assert abs(mine.w2_coupled - theirs.w2) <= 2 * mine.w2_error
        assert mine.w2_least <= mine.w2_coupled
    assert found.final.w2 == pytest.approx(exact.rounds[-1].w2, abs=0.08)


@pytest.mark.parametrize("method", ["orw-centred", "orw"])
@pytest.mark.parametrize("dim", [1, 64])
def test_without_temperature_nothing_is_forecast_to_move(method, dim):
    x = torch.randn(300, dim, generator=torch.Generator().manual_seed(0))
    for alpha in (0.0, 0.3):
        found = forecast(x, right(x), alpha, 0.0, 3, method=method, exact_w2=False)
        assert found.final.w2_coupled < 0.01
        assert found.final.reward == pytest.approx(found.rounds[0].reward, abs=1e-3)
        assert found.final.ess > 295


def test_forecast_of_a_method_without_a_recursion_is_refused(two_gaussians):
    with pytest.raises(UserError, match="method 'nft' has no forecast"):
        forecast(*two_gaussians, 1.0, 0.5, method="nft")


def test_errors_know_how_far_samples_lie_apart():
    """Of 12 disjoint sets of 128, the interval of each holds what 12 times as many forecast."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(12 * 128, 8, generator=g)
    r = (x[:, 0] + 0.5 * x[:, 1] > 0.7).double()
    whole = forecast(x, r, 0.3, 1.0, 2, exact_w2=False, parts=False).final
    sets = [forecast(x[k::12], r[k::12], 0.3, 1.0, 2, exact_w2=False, draws=128).final for k in range(12)]
    assert sum(abs(f.reward - whole.reward) <= 2 * f.reward_error for f in sets) >= 10
    inside = [f.w2_least <= whole.w2_coupled <= f.w2_coupled + 2 * f.w2_error for f in sets]
    assert sum(inside) >= 10


def test_doubt_says_what_would_help():
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(1))
    beyond = forecast(x, x[:, 0], 0.0, 1.0, 3, exact_w2=False)
    assert "effective sample size falls to" in beyond.doubt and "a higher α" in beyond.doubt
    noise = forecast(x, right(-x), 3.0, 0.05, 1, exact_w2=False)
    assert "is wider than the change" in noise.doubt and "1,600 samples" in noise.doubt


def test_weights_without_anchor_are_a_power_of_the_weight_on_digits(digits):
    """α = 0: the masses after N rounds are ∝ w^N, in 64 dimensions as in one."""
    images, even = digits
    found = forecast(images, even, 0.0, 0.5, 2, exact_w2=False)
    for r in found.rounds:
        w = torch.exp(0.5 * r.round * even)
        assert r.reward == pytest.approx(float((w * even).sum() / w.sum()), abs=0.02)


@pytest.mark.parametrize("centred", [False, True], ids=["orw", "orw-centred"])
def test_empirical_velocity_is_the_formula_written_out(centred):
    """Two rounds: E[·] by plain sums over the samples, v_old from the round before."""
    samples = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.3, -0.7]])
    measure = Empirical(samples, torch.zeros(len(samples)), torch.Generator().manual_seed(0))
    start = torch.full((3,), 1 / 3).double()
    stages = [
        Stage(start, torch.tensor([1.5, 1.0, 0.5]).double(), 0.7, 1.1),
        Stage(torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([1.0, 2.0, 0.5]).double(), 0.4, 0.8),
    ]
    x, t = torch.tensor([[0.2, 0.1]]), 0.4
    kernel = torch.exp(-((x - t * measure.samples) ** 2).sum(1) / (2 * (1 - t) ** 2)).double()
    u = ((measure.samples - x) / (1 - t)).double()

    def mean(masses, of):
        return (kernel * masses / (kernel @ masses)) @ of

    v = v_ref = mean(start, u)
    for stage in stages if centred else stages[-1:]:
        w, c = stage.weights[:, None], stage.centre
        top = mean(stage.masses, (w - c) * u) + c * v if centred else mean(stage.masses, w * u)
        v = (top + stage.alpha * v_ref) / (mean(stage.masses, w) + stage.alpha)
    velocity = EmpiricalVelocity(measure, start, stages if centred else stages[-1:], centred)
    assert velocity(t, x)[0].tolist() == pytest.approx(v.tolist(), abs=1e-5)
    assert float(velocity.landing(x).sum()) == pytest.approx(1, abs=1e-6)


def test_what_masses_are_off_does_not_grow_from_round_to_round():
    """Where the weight is small, w̄ / (E[w | x_t] + α) is 4 here: in thirty rounds a difference grew by 4^30."""
    samples = torch.tensor([[-1.0], [1.0]])
    measure = Empirical(samples, torch.zeros(len(samples)), torch.Generator().manual_seed(0))
    off = [torch.tensor([0.5 + d, 0.5 - d]).double() for d in (0.02, -0.03) * 15]
    stages = [Stage(p, torch.tensor([0.2, 1.8]).double(), 0.05) for p in off]
    velocity = EmpiricalVelocity(measure, torch.full((2,), 0.5).double(), stages, centred=True)
    factors = velocity._factors(measure.kernel(0.5, torch.tensor([[-0.3], [0.0], [0.3]])))
    assert float(factors.abs().max()) < 3 * len(stages)
    assert float(velocity.mean(0.5, torch.tensor([[-0.3], [0.0], [0.3]])).abs().max()) <= 1


def test_support_cannot_extrapolate_and_the_forecast_says_so():
    """N(0, 1), r = x, α = 0: 3.0 is exact at round 6; no sample lies there."""
    x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(1))
    found = forecast(x, x[:, 0], 0.0, 0.5, 6, exact_w2=False)
    assert found.final.reward < 2.9
    assert found.final.ess < REACH and not found.within_reach
    assert found.rounds[1].within_reach


def test_same_seed_same_forecast(two_gaussians):
    a, b = (forecast(*two_gaussians, 1.0, 0.5, 2, seed=3) for _ in range(2))
    assert repr(a.rounds) == repr(b.rounds)  # NaN equals NaN
    assert a.rounds != forecast(*two_gaussians, 1.0, 0.5, 2, seed=4).rounds


def test_settings_together_equal_settings_alone(two_gaussians):
    together = forecast_many(*two_gaussians, [(0.3, 0.5), (1.0, 2.0)], 2)
    assert repr(together[1].rounds) == repr(forecast(*two_gaussians, 1.0, 2.0, 2).rounds)


def test_diversity_falls_as_one_mode_empties(two_gaussians):
    rounds = forecast(*two_gaussians, 0.0, 1.0, 4, exact_w2=False).rounds
    spread = torch.cdist(two_gaussians[0], two_gaussians[0])
    assert rounds[0].diversity == pytest.approx(float(spread.sum()) / (600 * 599), rel=1e-6)
    assert rounds[-1].diversity < 0.6 * rounds[0].diversity


def test_wanted_reward_names_an_alpha_that_reaches_it(two_gaussians):
    found = alpha_for(*two_gaussians, 0.5, 4, want_reward=0.7)
    assert 0 < found.low < found.high < 1
    inside = exact_recursion(
        TWO_GAUSSIANS, right, math.sqrt(found.low * found.high), 0.5, 4, cells=(128,), check=False
    )
    assert inside.rewards[-1] == pytest.approx(0.7, abs=0.03)


def test_wanted_w2_names_alphas_around_the_one_that_keeps_it(two_gaussians):
    found = alpha_for(*two_gaussians, 0.5, 2, want_w2=0.8, alphas=(0.1, 0.3, 1.0, 3.0))
    low, high = (
        exact_recursion(TWO_GAUSSIANS, right, alpha, 0.5, 2, cells=(96,), steps=32, check=False).rounds[-1].w2
        for alpha in (found.low, found.high)
    )
    assert low > 0.8 > high > 0.5


@pytest.mark.parametrize(
    "wish, message",
    [
        ({"want_reward": 0.99}, "beyond reach"),
        ({"want_reward": 0.4}, "before training"),
        ({"want_reward": 0.7, "want_w2": 1.0}, "give one of"),
        ({}, "give one of"),
    ],
)
def test_wish_that_cannot_be_met_is_refused(two_gaussians, wish, message):
    with pytest.raises(UserError, match=message):
        alpha_for(*two_gaussians, 0.5, 2, alphas=(0.0, 1.0), **wish)


def test_wish_on_too_few_samples_is_refused():
    x = torch.randn(300, 1, generator=torch.Generator().manual_seed(2))
    with pytest.raises(
        UserError, match=r"beyond the forecast's reach: the effective sample size falls to \d+ of 300"
    ):
        alpha_for(x, x[:, 0], 0.8, 3, want_reward=1.7, alphas=(0.0, 0.1, 1.0))


@pytest.mark.parametrize(
    "samples, rewards, alpha",
    [
        (torch.zeros(1, 2), torch.zeros(1), 1.0),
        (torch.zeros(3, 2), torch.zeros(2), 1.0),
        (torch.tensor([[0.0], [math.nan]]), torch.zeros(2), 1.0),
        (torch.randn(3, 2), torch.tensor([0.0, 1.0, math.inf]), 1.0),
        (torch.randn(3, 2), torch.zeros(3), -1.0),
    ],
    ids=["one-sample", "shapes", "nan-sample", "infinite-reward", "negative-alpha"],
)
def test_bad_input_is_refused(samples, rewards, alpha):
    with pytest.raises(UserError, match="forecast"):
        forecast(samples, rewards, alpha, 0.5)


@pytest.mark.soak
def test_twelve_settings_on_digits_take_under_a_minute(digits, stopwatch):
    settings = [(alpha, tau) for tau in (0.5, 1.0, 2.0) for alpha in (0.0, 0.3, 1.0, 3.0)]
    found = forecast_many(*digits, settings, 6)
    assert stopwatch() < 60
    reached = [[f.final.reward for f in found[k : k + 4]] for k in (0, 4, 8)]
    assert all(sorted(of_tau, reverse=True) == of_tau for of_tau in reached), (
        "less of it, the stronger the anchor"
    )


def test_more_scored_samples_correct_the_start_of_a_small_forecast():
    """256 samples that happen to hold too many good ones end where the true mean leads."""
    g = torch.Generator().manual_seed(3)
    x = torch.where(torch.rand(256, 1, generator=g) < 0.57, 1.5, -1.5) + 0.3 * torch.randn(
        256, 1, generator=g
    )
    r, many = (x[:, 0] > 0).float(), torch.tensor([0.0, 1.0]).repeat(2000)
    plain, tilted = (forecast(x, r, 1.0, 0.5, 5, scored=s) for s in (None, many))
    assert plain.rounds[0].reward > 0.54 and abs(tilted.rounds[0].reward - 0.5) < 1e-6
    assert abs(tilted.final.reward - 0.610) < 0.03 < plain.final.reward - 0.610
    assert tilted.rounds[0].reward_error < 0.3 * plain.rounds[0].reward_error


def test_where_the_reward_changes_within_a_mode_flows_are_followed_until_it_is_known():
    """Stopped as soon as they name a mode, 8gaussians under `right` was 3 standard errors below its exact answer."""
    points, _ = load_data("8gaussians")
    x, generator = points[:512], torch.Generator()
    rewards = (right(x), torch.zeros(512), torch.full((512,), 0.3), torch.full((512,), -1300.0))
    ends = [Empirical(x, r, generator.manual_seed(0)).end for r in rewards]
    assert ends[0] > 0.9 > 0.85 > ends[1] == ends[2] == ends[3]
