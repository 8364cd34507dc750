"""The trainer that users run, held to the exact recursion from the pretrained network's own density.

Each mutation at the end breaks the loop in one way and must be seen by the same judgement.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from orwcfm_fast.method import coupling, minibatches, noise
from orwcfm_fast.method.coupling import Batch, couple
from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.method.pretrain import pretrain
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.policy import Policy, make_policy
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.settings import Finetune, Pretrain
from orwcfm_fast.theory import GridDensity, exact_recursion, refit

pytestmark = pytest.mark.slow

LOOP = dict(
    method="orw",
    rollout=8192,
    batch=512,
    steps_per_round=200,
    lr=2e-3,
    warmup=10,
    cooldown=0.5,
    probe=16,
    tau=0.5,
)
CLOSE = 0.02


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def right(x):
    return (x[:, 0] > 0).float()


def smooth(x):
    return torch.sigmoid(2 * x[:, 0]).float()


def density_of(policy, parts=4) -> GridDensity:
    """The policy's own density, refitted on 10⁶ of its samples (4 parts)."""
    noise_of = (start_noise(policy, 250_000, 5, first=part * 250_000) for part in range(parts))
    return refit(sample(policy, x0, Finetune(), 50_000) for x0 in noise_of)


@pytest.fixture(scope="module")
def base(two_gaussians_weights):
    policy = make_policy("mlp", "two-gaussians", (1,), torch.device("cpu"))
    policy.network.load_state_dict(two_gaussians_weights)
    return policy, density_of(policy)


@pytest.fixture(scope="module")
def lopsided():
    """0.3·N(−1, 0.2²) + 0.7·N(1.2, 0.5²), pretrained as any other data."""
    g = torch.Generator().manual_seed(0)
    left = torch.rand(50_000, 1, generator=g) < 0.3
    normal = torch.randn(50_000, 1, generator=g)
    data = torch.where(left, 0.2 * normal - 1.0, 0.5 * normal + 1.2)
    policy = make_policy("mlp", "two-gaussians", (1,), torch.device("cpu"))
    settings = Pretrain(data="two-gaussians", model="mlp", steps=800, batch=512)
    policy = pretrain(policy, data, settings, lambda step, loss: None).averaged()
    return policy, density_of(policy, parts=1)


def run(base, reward=right, **settings):
    """Train a copy of the base; what it samples [20,000, 1], and the exact recursion."""
    policy = base[0].trainable_copy()
    s = Finetune(**LOOP | settings)
    loop = build_trainer(policy, reward, s)
    for _ in loop.train(s.rounds):
        pass
    x = sample(policy, start_noise(policy, 20_000, 9), s, 20_000)
    exact = exact_recursion(
        base[1],
        reward,
        s.alpha,
        s.tau,
        s.rounds,
        method=s.method,
        normalize=s.normalize_weights,
        check=False,
    )
    return x, exact


def miss(x, exact, reward=right) -> float:
    """Distance from theory: the larger of |E[r] − exact| and what is off inside the modes.

    The deviation of a mode that holds a tenth of the mass may be 15 % off before it counts.
    """
    far = abs(float(reward(x).mean()) - exact.rounds[-1].reward)
    draws = exact.sample(exact.rounds[-1].round, 50_000)
    for side in (-1, 1):
        mine, theirs = x[side * x > 0.2], draws[side * draws > 0.2]
        if len(theirs) > 5000:
            ratio = float(mine.std() / theirs.std()) if len(mine) > 1 else 0.0
            far = max(far, CLOSE * abs(ratio - 1) / 0.15)
    return far


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_six_rounds_land_on_the_exact_recursion(base, alpha):
    x, exact = run(base, alpha=alpha, rounds=6)
    print(f"α={alpha}: E[r] {float(right(x).mean()):.4f}, exact {exact.rounds[-1].reward:.4f}")
    assert abs(float(right(x).mean()) - exact.rounds[-1].reward) <= CLOSE
    assert miss(x, exact) <= CLOSE
    between, among, allowed = w2_draws(x, exact)
    print(f"  W2 {between:.4f}, exact against exact {among:.4f}, ΔE[r] = 0.02 allows {allowed:.4f}")
    assert between <= among + allowed


def test_fourteen_rounds_of_the_default_method_stay_where_theory_has_them(base):
    """With the mean weight alone as its centre, a sixth of the samples lay up to 2,000 off by now."""
    x, exact = run(base, method="orw-centred", alpha=0.1, tau=1.0, rounds=14)
    print(
        f"E[r] {float(right(x).mean()):.4f}, exact {exact.rounds[-1].reward:.4f}, farthest {float(x.abs().max()):.1f}"
    )
    assert float(x.abs().max()) < 6
    assert abs(float(right(x).mean()) - exact.rounds[-1].reward) <= 1.5 * CLOSE


def w2_line(a, b) -> float:
    return float((a.flatten().sort().values - b.flatten().sort().values).square().mean().sqrt())


def w2_draws(x, exact, n=5000, draws=20) -> tuple[float, float, float]:
    """Mean W2 of policy against exact, exact against exact, and what |ΔE[r]| = 0.02 implies."""
    last = exact.rounds[-1].round
    pool = exact.sample(last, 2 * n * draws, seed=1).view(draws, 2, n)
    g = torch.Generator().manual_seed(2)
    mine = [x[torch.randperm(len(x), generator=g)[:n]] for _ in range(draws)]
    between = sum(w2_line(m, p[0]) for m, p in zip(mine, pool, strict=True)) / draws
    among = sum(w2_line(p[0], p[1]) for p in pool) / draws
    whole = exact.sample(last, 100_000, seed=3).flatten()
    left, right_ = whole[whole <= 0], whole[whole > 0]
    move = 2000 if len(left) > 2000 else len(left)
    shifted = torch.cat([left[move:], right_, right_[:move]])
    return between, among, w2_line(whole, shifted)


@pytest.mark.parametrize("alpha", [0.1, 3.0])
def test_other_alphas(base, alpha):
    x, exact = run(base, alpha=alpha, rounds=4)
    assert miss(x, exact) <= CLOSE


def test_raw_weights(base):
    x, exact = run(base, alpha=1.0, rounds=4, normalize_weights=False)
    assert miss(x, exact) <= CLOSE


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_optimal_transport_coupling(base, alpha):
    """α = 0: the same law. α > 0: the anchor was trained on independent pairs, whose velocity is another one
    than the plan's, and no exact recursion is known: the reward rises as far and somewhat farther."""
    x, exact = run(base, alpha=alpha, rounds=4, coupling="ot", batch=128, steps_per_round=300, lr=1e-3)
    print(f"OT α={alpha}: E[r] {float(right(x).mean()):.4f}, exact {exact.rounds[-1].reward:.4f}")
    assert abs(float(right(x).mean()) - exact.rounds[-1].reward) <= (0.04 if alpha == 0 else 0.08)


def test_negative_temperature_goes_the_other_way(base):
    x, exact = run(base, alpha=0.3, rounds=4, tau=-0.5)
    assert exact.rounds[-1].reward < 0.35
    assert miss(x, exact) <= CLOSE


def test_lopsided_mixture(lopsided):
    x, exact = run(lopsided, alpha=0.3, rounds=4, tau=-1.0)
    assert abs(float(right(x).mean()) - exact.rounds[-1].reward) <= CLOSE


def test_smooth_reward(base):
    x, exact = run(base, smooth, alpha=0.3, rounds=4, tau=1.0)
    assert miss(x, exact, smooth) <= CLOSE


def test_at_rest_it_stays_at_rest(base):
    x, exact = run(base, alpha=1.0, rounds=10, tau=0.0)
    start = exact.rounds[0].reward
    print(f"at rest, α=1: E[r] {start:.4f} → {float(right(x).mean()):.4f}")
    assert abs(float(right(x).mean()) - start) <= 2 * (0.25 / len(x)) ** 0.5


# mutations: each must be seen


def plain_ot(weights_follow):
    def couple_by_plan(x1, w, alpha, seed, index, kind, late):
        pick = coupling.weighted_plan_draw(x1, torch.ones_like(w), seed, index)
        kept = couple(x1[pick], w[pick] if weights_follow else w, alpha, seed, index, late=late)
        return kept

    return couple_by_plan


@pytest.mark.parametrize("follow", [False, True], ids=["left-behind", "on-the-loss"])
def test_seen_ot_with_weights(base, monkeypatch, follow):
    monkeypatch.setattr(minibatches, "couple", plain_ot(follow))
    x, exact = run(base, alpha=0.0, rounds=3, batch=128, steps_per_round=200)
    assert miss(x, exact) > 4 * CLOSE


def test_seen_alpha_on_the_wrong_term(base, monkeypatch):
    row = METHODS.get("orw")

    def swapped(at):
        w, b, a = row.coefficients(at)
        return a, b, w

    monkeypatch.setitem(METHODS._entries, "orw", replace(row, coefficients=swapped))
    x, exact = run(base, alpha=0.3, rounds=3)
    assert miss(x, exact) > 2 * CLOSE


def test_seen_reference_that_learns_with_the_policy(base, monkeypatch):
    monkeypatch.setattr(Policy, "frozen_copy", lambda self, exact: self)
    x, exact = run(base, alpha=1.0, rounds=4)
    assert miss(x, exact) > 2 * CLOSE


def test_seen_weights_rolled_by_one_sample(base, monkeypatch):
    signal = Trainer.signal
    monkeypatch.setattr(Trainer, "signal", lambda self, rollout: signal(self, rollout).roll(1))
    x, exact = run(base, alpha=0.0, rounds=3)
    assert miss(x, exact) > 2 * CLOSE


def test_seen_rollout_never_refreshed(base, monkeypatch):
    fresh = Trainer.draw_and_score

    def stale(self):
        if self.round == 0:
            self.first = fresh(self)
        with self.phases("rollout"), self.phases("reward"):
            return replace(self.first, losses=[], anchors=None)

    monkeypatch.setattr(Trainer, "draw_and_score", stale)
    x, exact = run(base, alpha=0.0, rounds=3)
    assert miss(x, exact) > 2 * CLOSE


# unclipped: clipping a gradient of four samples to a norm divides their weights by much of their mean
SMALL = dict(alpha=0.0, tau=1.0, rounds=2, batch=4, steps_per_round=2500, lr=3e-4, grad_clip=1e9)


def test_minibatches_of_four_still_land(base):
    x, exact = run(base, **SMALL)
    print(f"minibatch 4: E[r] {float(right(x).mean()):.4f}, exact {exact.rounds[-1].reward:.4f}")
    assert abs(float(right(x).mean()) - exact.rounds[-1].reward) <= 1.5 * CLOSE


def test_seen_weights_normalised_per_minibatch(base, monkeypatch):
    monkeypatch.setattr(minibatches, "couple", lambda x1, w, *rest: couple(x1, w / w.mean(), *rest))
    x, exact = run(base, **SMALL)
    print(f"  normalised by four: E[r] {float(right(x).mean()):.4f}")
    assert abs(float(right(x).mean()) - exact.rounds[-1].reward) > 2 * CLOSE


def test_seen_time_exchanged(base, monkeypatch):
    def exchanged(*args) -> Batch:
        batch = couple(*args)
        x0 = noise.normal(tuple(batch.x1.shape[1:]), args[3], batch.index, noise.X0)
        t = batch.t[:, None]
        return replace(batch, x_t=t * x0 + (1 - t) * batch.x1)

    monkeypatch.setattr(minibatches, "couple", exchanged)
    x, exact = run(base, alpha=0.3, rounds=2)
    assert miss(x, exact) > 2 * CLOSE


def with_dropout(policy):
    """The same function in eval mode; a tenth of the units dropped in train mode."""
    network = copy.deepcopy(policy.network)
    network.net = nn.Sequential(
        *[n for m in network.net for n in ([m, nn.Dropout(0.1)] if isinstance(m, nn.SiLU) else [m])]
    )
    return replace(policy, network=network.eval())


def anchor_loss_at_rest(base) -> float:
    """The anchor's loss over a round with τ = 0, which exactly stays 0."""
    policy = with_dropout(base[0])
    return build_trainer(policy, right, Finetune(**LOOP | {"tau": 0.0})).one_round()["loss_w2"]


def test_dropout_in_the_network_is_off_in_the_loop(base):
    assert anchor_loss_at_rest(base) < 0.01
    x, exact = run((with_dropout(base[0]), base[1]), alpha=0.3, rounds=2)
    assert miss(x, exact) <= CLOSE


def test_seen_dropout_left_on(base, monkeypatch):
    init = PolicyOptimizer.__init__

    def training_mode(self, policy, *others):
        init(self, policy, *others)
        policy.network.train()

    monkeypatch.setattr(PolicyOptimizer, "__init__", training_mode)
    assert anchor_loss_at_rest(base) > 0.02
