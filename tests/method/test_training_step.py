"""From rollout and reward to the trained parameters: two steps of every method, beside its published formula.

Theirs is written out here: the loss of `published` through autograd, clipping, and torch's AdamW on the mean loss.
"""

import pytest
import torch
from published import PUBLISHED, SETTINGS

from orwcfm_fast.method import noise
from orwcfm_fast.runs.build import build_trainer

N, STEPS, LR, CLIP = 36, 2, 1e-3, 0.5


def parameters(policy):
    return torch.cat([p.detach().flatten().double() for p in policy.network.parameters()])


def reward(x):
    return x[:, 0].abs()


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_training_steps_of_every_method_are_those_of_its_published_loss(name, two_gaussians):
    reference = two_gaussians.trainable_copy()
    with torch.no_grad():
        for p in reference.network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    ours, theirs = two_gaussians.trainable_copy(), two_gaussians.trainable_copy()
    more = dict(
        method=name, rollout=N, batch=N, steps_per_round=STEPS, probe=4, lr=LR, warmup=0, cooldown=0.0
    )
    s = SETTINGS.model_copy(update=more | {"grad_clip": CLIP, "guard": "off"})
    trainer = build_trainer(ours, reward, s, reference=reference)
    state = trainer.draw_and_score()
    drawn = [*trainer.minibatches(state.rollout, trainer.signal(state.rollout))]
    record = trainer.one_round()

    theirs.network.double()
    optimizer = torch.optim.AdamW(theirs.network.parameters(), LR, weight_decay=0.0)
    start, v_old, norms = parameters(theirs), [], []
    for batch in drawn:
        v_old.append(theirs.velocity(batch.t.double(), batch.x_t.double()).detach())
    for batch, old in zip(drawn, v_old, strict=True):
        order = (
            (batch.x1 == state.rollout.x1.T).int().argmax(0)
        )  # of the rollout, whose samples each step draws once
        u = batch.x1 - noise.normal((1,), trainer.seed, batch.index, noise.X0)
        x = {
            "u": u.double(), "v": theirs.velocity(batch.t.double(), batch.x_t.double()), "v_old": old,
            "v_ref": reference.velocity(batch.t, batch.x_t).detach().double(),
            "r": reward(batch.x1).double(), "s": 1 - batch.t.double(),
        }  # fmt: skip
        PUBLISHED[name]({key: value[order] for key, value in x.items()}).mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.network.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    assert record["grad_norm_mean"] == pytest.approx(
        sum(norms) / STEPS, rel=1e-3
    )  # AdamW does not see the scale
    moved = (parameters(theirs) - start).norm()
    assert (parameters(ours) - parameters(theirs)).norm() <= 1e-3 * moved
