"""Every method's gradient is that of its published formula, and at τ = 0 all but three leave the policy alone."""

import pytest
import torch
from published import ALPHA, PUBLISHED, SETTINGS, TAU, advantage, squared, weights

from orwcfm_fast.errors import UserError
from orwcfm_fast.method.anchors import blend, compute_anchors
from orwcfm_fast.method.average import PolicyAverage
from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.method.objectives import METHODS, Point, check_bounded, signal_of
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.method.weighting import GROWTH, SHRINKING, centre, mean_weight_at
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.settings import Finetune

B, D = 24, 6
RESTING = ("orw-centred", "adrpo", "ram", "nft", "awm")


def drawn():
    """Samples, velocities and rewards of a round in float64; v requires grad."""
    torch.manual_seed(0)
    x = {name: torch.randn(B, D, dtype=torch.float64) for name in ("u", "v", "v_old", "v_ref")}
    x["v"] = (x["v_old"] + 0.3 * x["v"]).requires_grad_(True)
    return x | {"r": torch.rand(B, dtype=torch.float64), "s": torch.rand(B, dtype=torch.float64)}


def our_gradient(name, x):
    """2/D · [w(v − u) + (a + b)(v − anchor)] of each sample, as the op computes it, in float64."""
    row, v = METHODS.get(name), x["v"].detach()
    rollout = Rollout(x["u"], torch.arange(B), x["r"])
    signal = signal_of(row.signal, rollout, TAU, SETTINGS).double()
    if row.signal != "best":  # made in float32: the formula's own, to hold the rest to 1e-10
        exact = {"weight": weights, "reward": lambda r: r, "advantage": advantage}[row.signal](x["r"])
        assert torch.allclose(signal, exact, rtol=1e-6, atol=1e-6)
        signal = exact
    errors = [(x["v_old"] + k * 0.4 * (v - x["v_old"]) - x["u"]).abs().mean(1) for k in (1, -1)]
    at = Point(
        signal,
        signal.mean(),
        centre(signal, signal.mean(), ALPHA, torch.ones((), dtype=torch.float64))[0],
        x["s"],
        ALPHA,
        SETTINGS,
        squared(v, x["u"]),
        (errors[0], errors[1]),
    )
    w, b, a = row.coefficients(at)
    if not row.old:
        assert not b.any()
    if not row.reference:
        assert not a.any()
    pull = (b[:, None] * (v - x["v_old"])) + a[:, None] * (v - x["v_ref"])
    return 2 / D * (w[:, None] * (v - x["u"]) + pull), (b, a)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_gradient_of_every_method_is_that_of_its_published_formula(name):
    x = drawn()
    PUBLISHED[name](x).sum().backward()
    ours, _ = our_gradient(name, x)
    assert (ours - x["v"].grad).abs().max() <= 1e-10


def test_every_method_that_is_listed_is_held_to_a_formula():
    assert sorted(METHODS.names()) == sorted(PUBLISHED)
    assert tuple(name for name in METHODS.names() if METHODS.get(name).rests) == tuple(
        name for name in METHODS.names() if name in RESTING
    )


def test_one_anchor_stands_for_both_velocities():
    x = drawn()
    b, a = torch.rand(B) - 0.3, torch.rand(B) + 0.4
    anchor = blend(x["v_old"], x["v_ref"], b, a)
    v = x["v"].detach()
    one = (a + b)[:, None] * (v - anchor)
    two = b[:, None] * (v - x["v_old"]) + a[:, None] * (v - x["v_ref"])
    assert torch.allclose(one, two, atol=1e-5)
    same = torch.randn(B, D)
    assert torch.equal(blend(same, same.clone(), b, a), same), (
        "equal velocities are their own blend, bit for bit"
    )
    nothing = blend(x["v_old"], x["v_ref"], -a, a)
    assert torch.allclose(1e-6 * nothing.double(), a[:, None] * (x["v_ref"] - x["v_old"]), atol=1e-5)


def test_a_loss_without_a_lower_bound_is_refused_with_what_it_lacks():
    w = torch.tensor([-0.4, 1.0])
    check_bounded("orw-centred", (w, torch.zeros(2), torch.full((2,), 0.5)))
    with pytest.raises(UserError, match=r"--alpha higher by at least 0\.1"):
        check_bounded("orw-centred", (w, torch.zeros(2), torch.full((2,), 0.3)))
    with pytest.raises(UserError, match=r"needs --adrpo-beta0 higher by at least 0\.1"):
        check_bounded("adrpo", (w, torch.zeros(2), torch.full((2,), 0.3)))


def test_rwr_refuses_negative_rewards_and_other_methods_on_rewards_do_not(two_gaussians):
    s = Finetune(**SMALL | {"method": "rwr"})
    with pytest.raises(UserError, match=r"method 'rwr': .* needs rewards that are not negative"):
        build_trainer(two_gaussians, lambda x: x[:, 0], s).one_round()
    rollout = Rollout(torch.zeros(2, 1), torch.arange(2), torch.tensor([1.0, -1.0]))
    assert signal_of("reward", rollout, 1.0, SETTINGS).tolist() == [1, -1]


def test_advantages_are_of_the_samples_own_prompt():
    reward, prompt = torch.tensor([1.0, 3.0, 10.0, 30.0]), torch.tensor([0, 0, 1, 1])
    rollout = Rollout(torch.zeros(4, 1), torch.arange(4), reward, prompt)
    assert signal_of("advantage", rollout, 1.0, Finetune(group=2)).tolist() == [-1, 1, -1, 1]
    assert not signal_of("advantage", rollout, 0.0, SETTINGS).any()


def test_velocities_without_a_term_are_not_computed():
    batch = Batch(
        *(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 2), torch.arange(3)), *torch.zeros(2, 3)
    )
    one = compute_anchors([batch, batch], None, lambda b: torch.ones(3, 2), True)
    assert [*one.steps] == ["anchor"] and len(one.steps["anchor"]) == 2 and one.drift is None
    both = compute_anchors([batch], lambda b: torch.zeros(3, 2), lambda b: torch.ones(3, 2), False)
    assert sorted(both.steps) == ["v_old", "v_ref"] and both.drift == 1
    assert not compute_anchors([batch], None, None, True).steps


def parameters(policy):
    return torch.cat([p.detach().flatten() for p in policy.network.parameters()])


SMALL = dict(rounds=3, rollout=64, batch=16, steps_per_round=6, probe=16, warmup=0, lr=1e-2, chunk=24)


@pytest.mark.parametrize("change", [{}, {"lora": 4}, {"micro_batch": 5}, {"alpha": 0.3}], ids=str)
@pytest.mark.parametrize("name", RESTING)
def test_at_tau_zero_nothing_moves(name, change, two_gaussians):
    policy = two_gaussians.trainable_copy()
    before = parameters(policy)
    s = Finetune(**SMALL | {"tau": 0.0, "method": name, "kl": 0.1} | change)
    trainer = build_trainer(policy, lambda x: x[:, 0], s)
    [*trainer.train(3)]
    if "lora" in change:
        before, after = (
            torch.zeros(1),
            torch.cat([p for k, p in policy.tensors()["lora"].items() if "lora_B" in k]),
        )
        assert not after.any()
    else:
        assert torch.equal(parameters(policy), before)


@pytest.mark.parametrize("name", ["orw", "rwr", "raft"])
def test_what_moves_without_a_reward_does_move(name, two_gaussians):
    policy = two_gaussians.trainable_copy()
    before = parameters(policy)
    trainer = build_trainer(policy, lambda x: x[:, 0].abs(), Finetune(**SMALL | {"tau": 0.0, "method": name}))
    trainer.one_round()
    assert not torch.equal(parameters(policy), before)


@pytest.mark.parametrize("name", [*PUBLISHED])
def test_every_method_raises_the_reward(name, two_gaussians):
    policy = two_gaussians.trainable_copy()
    s = Finetune(
        rounds=3, rollout=1024, batch=128, steps_per_round=40, probe=16, warmup=10, lr=2e-3, tau=2.0, method=name,
        alpha=0.1, ram_m=0.3, seed=1,
    )  # fmt: skip
    trainer = build_trainer(policy, lambda x: (x[:, 0] > 0).float(), s)
    records = [*trainer.train(4)]
    assert (trainer.grown > 1) == (name == "orw-centred")
    least = 0.02 if name == "awm" else 0.04  # awm divides its advantages by 5
    assert records[-1]["reward_mean"] > records[0]["reward_mean"] + least


def test_an_average_of_past_policies_is_sampled_from_kept_and_restored(two_gaussians, tmp_path):
    from orwcfm_fast.checkpoints import checkpoint
    from orwcfm_fast.runs.trainer_state import restore_trainer, save_trainer

    s = Finetune(**SMALL | {"method": "nft"})

    def trainer():
        return build_trainer(two_gaussians.trainable_copy(), lambda x: x[:, 0], s)

    whole, half, again = trainer(), trainer(), trainer()
    records = [*whole.train(3)]
    [*half.train(1)]
    first = half.average.values[0]
    assert not torch.equal(first, half.average.parameters[0]), "it lags behind"
    save_trainer(half, tmp_path / "step_6", {})
    restore_trainer(again, checkpoint.load(tmp_path / "step_6"))
    assert torch.equal(again.average.values[0], first)
    assert [*again.train(3)][-1]["reward_mean"] == records[-1]["reward_mean"]
    assert torch.equal(parameters(again.policy), parameters(whole.policy))


def test_how_far_errors_can_have_grown_is_kept_and_restored_and_sets_the_centre(two_gaussians, tmp_path):
    """Where two rounds use up all growth, a third that had forgotten it would take the mean as its centre."""
    from orwcfm_fast.checkpoints import checkpoint
    from orwcfm_fast.runs.trainer_state import restore_trainer, save_trainer

    s = Finetune(**SMALL | {"alpha": 0.01, "tau": 3.0})

    def trainer():
        return build_trainer(two_gaussians.trainable_copy(), lambda x: (x[:, 0] > 0).float(), s)

    whole, half, again = trainer(), trainer(), trainer()
    [*whole.train(3)]
    [*half.train(2)]
    assert float(half.grown) == pytest.approx(GROWTH)
    save_trainer(half, tmp_path / "step", {})
    restore_trainer(again, checkpoint.load(tmp_path / "step"))
    [*again.train(3)]
    assert torch.equal(parameters(again.policy), parameters(whole.policy))
    batches = whole.minibatches(whole.last.rollout, signal := whole.signal(whole.last.rollout))
    assert (
        float(batches.centre) == pytest.approx(SHRINKING * (float(signal.min()) + 0.01))
        and batches.centre < 0.5 * batches.mean
    )
    whole.reset()
    assert whole.grown == 1


def test_the_weight_at_a_point_is_that_of_the_other_samples_near_it():
    """Three far samples in two prompts: by the kernel written out, the draw's own sample left out."""
    x1 = torch.tensor([[-2.0, 0.0], [0.5, 1.0], [0.7, 0.6], [0.6, 0.9]])
    weights, condition = torch.tensor([0.2, 1.0, 3.0, 0.6]), torch.tensor([0, 0, 0, 1])
    own, t = torch.tensor([1, 0]), torch.tensor([0.5, 0.3])
    x_t = t[:, None] * x1[own] + (1 - t)[:, None] * torch.tensor([[0.3, -0.2], [-0.1, 0.4]])
    for of in (None, condition):
        found = mean_weight_at(x_t, t, x1, weights, own, of, least=1)
        for row in range(2):
            others = [j for j in range(4) if j != own[row] and (of is None or j != 3)]
            gap = (x_t[row] - t[row] * x1[others]).square().sum(1) / (2 * (1 - t[row]) ** 2)
            assert float(found[row]) == pytest.approx(float((-gap).softmax(0) @ weights[others]), rel=1e-4)
    for few in (
        mean_weight_at(x_t, t, x1, weights, torch.tensor([3, 3]), condition, least=1),
        mean_weight_at(x_t, t, x1, weights, own, least=4),
    ):
        assert few.tolist() == [pytest.approx(1.2)] * 2, "too few other samples of its prompt: the mean"
    equal = torch.full((4,), 0.7)
    assert torch.equal(mean_weight_at(x_t, t, x1, equal, own, least=1), equal.mean().expand(2))


def test_without_alpha_what_is_subtracted_lets_no_error_grow(two_gaussians):
    """c/E[w | x_t] is at most 1: c is the mean or, where samples are worse, what they are worth there."""
    s = Finetune(**SMALL | {"alpha": 0.0, "tau": 3.0, "rollout": 128})
    trainer = build_trainer(two_gaussians.trainable_copy(), lambda x: (x[:, 0] > 0).float(), s)
    [*trainer.train(1)]
    rollout = trainer.last.rollout
    batches = trainer.minibatches(rollout, signal := trainer.signal(rollout))
    for k, batch in enumerate(batches):
        pick = batches.order[k * s.batch : (k + 1) * s.batch]
        weight_at = mean_weight_at(batch.x_t, batch.t, rollout.x1, signal, pick)
        assert torch.equal(batch.b, torch.minimum(batches.mean, weight_at))
        assert torch.allclose(batch.w + batch.b, signal[pick])
        assert 0 < int((batch.b < batches.mean).sum()) < s.batch


def test_the_average_follows_the_parameters_by_its_share():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    average = PolicyAverage([p])
    with torch.no_grad():
        p.fill_(3.0)
    average.update(0.75)
    assert average.values[0].tolist() == [1.5]
    with average.in_place():
        assert p.tolist() == [1.5]
    assert p.tolist() == [3.0]
