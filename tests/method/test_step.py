"""The gradient that trains is the gradient of the written objective."""

import copy
from dataclasses import replace

import pytest
import torch

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.method import noise
from orwcfm_fast.method.anchors import velocities
from orwcfm_fast.method.coupling import couple
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.settings import Finetune

SEED = torch.tensor(3)


def gradients_of_a_step(learner, batch):
    seen = {}
    hooks = [
        p.register_hook(lambda g, name=name: seen.__setitem__(name, g.clone()))
        for name, p in learner.policy.network.named_parameters()
    ]
    learner.step(batch, SEED)
    for hook in hooks:
        hook.remove()
    return seen


def written_loss(network, reference, batch):
    """The objective of the paper, in float64 by autograd, from the stored batch."""
    double = [x.double() for x in (batch.x1, batch.t, batch.x_t, batch.w, batch.a)]
    x1, t, x_t, w, a = double
    x0 = noise.normal((2,), SEED, batch.index, noise.X0, torch.float64)
    v, v_ref = network(t, x_t), reference(t, x_t).detach()
    fm = (v - (x1 - x0)).square().mean(1)
    return (w * fm + a * (v - v_ref).square().mean(1)).mean()


def apart():
    """A fresh policy, and a reference that is not it."""
    torch.manual_seed(0)
    policy = make_policy("mlp", "moons", (2,), torch.device("cpu"))
    reference = policy.frozen_copy()
    with torch.no_grad():
        for p in reference.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return policy, reference


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_step_follows_the_gradient_of_the_objective(alpha, coupling):
    policy, reference = apart()
    w = torch.rand(64) + 0.1
    batch = couple(torch.randn(64, 2), w, alpha, SEED, noise.indices(640, 64, "cpu"), coupling)
    batch = replace(batch, anchor=velocities(reference, batch, BatchSizes(64)))
    exact = copy.deepcopy(policy.network).double()
    written_loss(exact, copy.deepcopy(reference.network).double(), batch).backward()
    ours = gradients_of_a_step(PolicyOptimizer(policy, Finetune(lr=1e-9)), batch)
    for name, p in exact.named_parameters():
        assert (ours[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name


def test_reference_never_moves_and_dropout_stays_off():
    from orwcfm_fast.networks.fast_unet import FastUNet
    from orwcfm_fast.networks.policy import Policy

    torch.manual_seed(0)
    network = FastUNet((1, 8, 8), 32, 1, channel_mult=(1,), attention_resolutions="1", dropout=0.5)
    policy = Policy(network, (1, 8, 8), "custom", "")
    reference = policy.frozen_copy()
    learner = PolicyOptimizer(policy, Finetune(batch=4))
    assert not learner.policy.network.training
    before = [p.clone() for p in reference.network.parameters()]
    batch = couple(torch.randn(4, 1, 8, 8), torch.ones(4), 1.0, SEED, noise.indices(0, 4, "cpu"))
    batch = replace(batch, anchor=velocities(reference, batch, learner.sizes))
    metrics = learner.step(batch, SEED)
    assert float(metrics[1]) == 0.0, "policy equals reference before the first step, so dropout was on"
    assert all(torch.equal(a, b) for a, b in zip(before, reference.network.parameters(), strict=True))


def test_rate_warms_up_once_and_falls_within_each_round():
    policy = make_policy("mlp", "moons", (2,), torch.device("cpu"))
    settings = Finetune(lr=1.0, warmup=4, steps_per_round=6, cooldown=0.5)
    learner = PolicyOptimizer(policy, settings)
    rates = []
    for step in range(12):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        batch = couple(torch.randn(8, 2), torch.ones(8), 1.0, SEED, noise.indices(8 * step, 8, "cpu"))
        learner.step(batch, SEED)
    fall = [1.0, 2 / 3, 1 / 3]
    assert rates == pytest.approx([0.25, 0.5, 0.75, *fall, 1.0, 1.0, 1.0, *fall])
    learner.go_on_from(10)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(coupling):
    policy, reference = apart()
    batch = couple(
        torch.randn(50, 2), torch.rand(50) + 0.1, 0.7, SEED, noise.indices(640, 50, "cpu"), coupling
    )
    batch = replace(batch, anchor=velocities(reference, batch, BatchSizes(50)))
    learner = PolicyOptimizer(policy, Finetune(batch=50))

    def gradient(micro_batch):
        losses = learner.gradient(batch, SEED, micro_batch)
        return losses, torch.cat([p.grad.flatten() for p in learner.parameters])

    losses, whole = gradient(50)
    for size in (1, 7, 25):
        mine, parts = gradient(size)
        assert torch.allclose(mine, losses, rtol=1e-5)
        assert (parts - whole).norm() <= 1e-5 * whole.norm(), size


def test_a_gradient_is_clipped_to_the_norm_that_is_asked_for():
    policy, reference = apart()
    for clip in (1e-3, 1e9):
        learner = PolicyOptimizer(policy.trainable_copy(), Finetune(batch=32, grad_clip=clip))
        batch = couple(torch.randn(32, 2), torch.ones(32), 1.0, SEED, noise.indices(0, 32, "cpu"))
        norm = float(
            learner.step(replace(batch, anchor=velocities(reference, batch, learner.sizes)), SEED)[2]
        )
        moments = torch.cat([s["exp_avg"].flatten() for s in learner.optimizer.state.values()])
        assert norm > 1e-2
        assert float(moments.norm()) == pytest.approx(0.1 * min(norm, clip), rel=1e-3)
