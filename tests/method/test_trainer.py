"""The loop raises the reward, by the right weights on the right samples."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch

from orwcfm_fast.errors import WorkError
from orwcfm_fast.kernels.interpolate import interpolate
from orwcfm_fast.method import coupling, minibatches, noise
from orwcfm_fast.method.callbacks import ReportProgress
from orwcfm_fast.method.coupling import couple
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.settings import Finetune

LOOP = dict(
    method="orw",
    alpha=0.0,
    tau=0.5,
    rounds=4,
    rollout=4096,
    batch=256,
    steps_per_round=150,
    lr=1e-3,
    warmup=10,
)


def reward_after(policy, couple_with, monkeypatch, **settings) -> float:
    monkeypatch.setattr(minibatches, "couple", couple_with)
    s = Finetune(**LOOP | settings)
    loop = build_trainer(policy, make_reward("right"), s)
    for _ in loop.train(s.rounds):
        pass
    x = sample(policy, start_noise(policy, 8192, 7), s, 8192)
    return float((x > 0).float().mean())


def plain_ot(x1, w, alpha, seed, index, weights_follow):
    """The published pairing: an unweighted plan resamples x1; the weights stay behind or follow."""
    pick = coupling.weighted_plan_draw(x1, torch.ones_like(w), seed, index)
    t = noise.uniform((1,), seed, index, noise.T)[:, 0]
    x1 = x1[pick]
    w = w[pick] if weights_follow else w
    return coupling.Batch(x1, t, interpolate(x1, t, seed, index), index, w, torch.full_like(w, alpha))


def weights_left_behind(x1, w, alpha, seed, index, kind, late):
    return plain_ot(x1, w, alpha, seed, index, False)


def weights_carried_along(x1, w, alpha, seed, index, kind, late):
    return plain_ot(x1, w, alpha, seed, index, True)


# exact after 4 rounds at α=0 from 0.5: 0.881
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["independent", "ot"])
def test_reward_rises_under_ot_coupling_as_under_independent(kind, two_gaussians, monkeypatch):
    assert reward_after(two_gaussians, couple, monkeypatch, coupling=kind) > 0.75


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [weights_left_behind, weights_carried_along])
def test_both_published_ways_of_ot_fail_that_test(wrong, two_gaussians, monkeypatch):
    assert reward_after(two_gaussians, wrong, monkeypatch) < 0.65


def test_minibatches_use_every_sample_equally_often(two_gaussians):
    s = Finetune(rollout=48, batch=32, steps_per_round=3, probe=4)
    loop = build_trainer(two_gaussians, make_reward("right"), s)
    rollout = loop.draw_and_score().rollout
    rollout.x1 = torch.arange(48.0)[:, None]
    seen = torch.cat([b.x1[:, 0] for b in loop.minibatches(rollout, torch.ones(48))]).long()
    assert torch.bincount(seen, minlength=48).tolist() == [2] * 48


def test_a_round_draws_its_whole_rollout_before_its_first_step(two_gaussians):
    s = Finetune(rollout=64, batch=32, steps_per_round=2, probe=4, rounds=1)
    stages = []
    loop = build_trainer(
        two_gaussians,
        make_reward("right"),
        s,
        callbacks=[ReportProgress(lambda p: stages.append((p.stage, p.step)))],
    )
    list(loop.train(1))
    assert stages == [("rollout", 0), ("reward", 0), ("step", 0), ("step", 1), ("measure", 2)]


def test_same_seed_same_run_other_seed_other_run(two_gaussians):
    def metrics(seed):
        policy = replace(two_gaussians, network=copy.deepcopy(two_gaussians.network))
        s = Finetune(rollout=64, batch=32, steps_per_round=2, probe=8, seed=seed)
        record = build_trainer(policy, make_reward("right"), s).one_round()
        return {k: v for k, v in record.items() if "seconds" not in k and "per_s" not in k}

    assert metrics(1) == metrics(1)
    assert metrics(1) != metrics(2)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(two_gaussians):
    s = Finetune(rollout=64, batch=32, steps_per_round=3, probe=4, lr=1e30, warmup=0)
    with pytest.raises(WorkError, match="round 1: the loss is not finite"):
        build_trainer(two_gaussians, make_reward("right"), s).one_round()


def test_a_round_that_was_left_gives_the_same_minibatches_when_it_is_continued(two_gaussians):
    s = Finetune(rollout=64, batch=16, steps_per_round=6, probe=4)
    trainer = build_trainer(two_gaussians, lambda x: x[:, 0], s)
    rollout = trainer.draw_and_score().rollout
    batches = [*trainer.minibatches(rollout, torch.ones(64))]
    counts = Counter(int(i) for batch in batches for i in batch.index)
    assert len(batches) == 6 and len(counts) == 96 and set(counts.values()) == {1}
    again = trainer.minibatches(rollout, torch.ones(64))
    late = [again[4], again[5]]
    for one, two in zip(batches[4:], late, strict=True):
        assert torch.equal(one.index, two.index) and torch.equal(one.x_t, two.x_t)
    assert trainer.one_round()["seconds_reference"] > 0


def test_every_round_and_every_seed_has_noise_of_its_own(two_gaussians):
    """x0 of the rollout, and t, x0 and order of the minibatches."""

    def drawn(number, seed):
        s = Finetune(rollout=64, batch=16, steps_per_round=4, probe=4, seed=seed)
        trainer = build_trainer(two_gaussians, lambda x: x[:, 0], s)
        trainer.round = number
        rollout = trainer.draw_and_score().rollout
        batches = [*trainer.minibatches(rollout, torch.arange(1.0, 65.0))]
        picked, t, index = (torch.cat([getattr(b, name) for b in batches]) for name in ("w", "t", "index"))
        return rollout.x1, picked, t, noise.normal((1,), trainer.seed, index, noise.X0)

    first, again = drawn(0, 0), drawn(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (drawn(1, 0), drawn(0, 1)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
