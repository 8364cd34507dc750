"""Policy and reference in one call: the velocities and the gradients of two."""

import pytest
import torch

from orwcfm_fast.errors import UserError
from orwcfm_fast.method.rollout import start_noise
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.lora import add_lora
from orwcfm_fast.networks.paired import paired_velocities
from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.settings import Finetune

SHAPES = {"mlp": (2,), "unet-digits": (1, 8, 8)}
SMALL = dict(rollout=32, batch=16, steps_per_round=4, probe=8, rounds=2, nfe=6, warmup=0)


def policy_of(model, rank, precision="fp32"):
    policy = make_policy(model, "digits", SHAPES[model], torch.device("cpu"), precision)
    with torch.no_grad():
        for p in policy.network.parameters():
            if not p.any():
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    if rank:
        add_lora(policy.network, rank)
    reference = policy.frozen_copy()
    with torch.no_grad():  # away from its reference, as training takes it
        for name, p in policy.network.named_parameters():
            if not rank or "lora" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    return policy, reference


@pytest.mark.parametrize("micro_batch", [0, 5])
@pytest.mark.parametrize(("model", "rank"), [("mlp", 0), ("mlp", 4), ("unet-digits", 4)])
def test_losses_and_gradients_are_those_of_two_calls(model, rank, micro_batch):
    found = []
    for pair in (False, True):
        policy, reference = policy_of(model, rank)
        settings = Finetune(**SMALL, pair=pair, micro_batch=micro_batch)
        trainer = Trainer(policy, lambda x: x.flatten(1).mean(1), settings, reference=reference)
        rollout = trainer.draw_and_score(0)
        batch = next(trainer.minibatches(rollout, torch.linspace(0.5, 1.5, 32), 1.0, 0))
        losses = trainer.learner.gradient(batch, trainer.seed, trainer.learner.micro_batch)
        found.append((losses, [p.grad for p in trainer.learner.parameters]))
    (losses, gradients), (paired_losses, paired_gradients) = found
    torch.testing.assert_close(paired_losses, losses, rtol=1e-5, atol=1e-6)
    assert losses[1] > 1e-4, "policy and reference differ"
    scale = max(float(g.abs().max()) for g in gradients)
    for one, other in zip(gradients, paired_gradients, strict=True):
        assert float((one - other).abs().max()) < 2e-5 * scale


def test_the_anchor_draws_no_gradient_and_the_adapters_are_whole_again():
    policy, reference = policy_of("mlp", 4)
    x, t = start_noise(policy, 8, 0), torch.rand(8)
    v, v_ref = paired_velocities(policy, reference, t, x)
    assert v.requires_grad and not v_ref.requires_grad
    torch.testing.assert_close(policy.velocity(t, x), v)
    torch.testing.assert_close(reference.velocity(t, x), v_ref)


def test_convolutions_pair_over_a_shared_base_alone():
    policy, reference = policy_of("unet-digits", 0)
    with pytest.raises(UserError, match="needs --lora as well"):
        Trainer(policy, lambda x: x.flatten(1).mean(1), Finetune(**SMALL, pair=True), reference=reference)


def test_a_round_in_bf16_pairs_too():
    policy, reference = policy_of("unet-digits", 4, "bf16")
    trainer = Trainer(
        policy, lambda x: x.flatten(1).mean(1), Finetune(**SMALL, pair=True), reference=reference
    )
    metrics = trainer.one_round()
    assert metrics["seconds_reference"] == 0 and metrics["loss_w2"] > 0
