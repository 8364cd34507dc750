"""Passes without gradient in bf16: weights that are held in it give autocast's velocities, and follow the policy."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))
from many_ranks import base

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.evaluation.evaluate import lipschitz
from orwcfm_fast.method.anchors import velocities
from orwcfm_fast.method.rollout import draw, start_noise
from orwcfm_fast.networks.inference import InferenceCopy
from orwcfm_fast.networks.lora import add_lora, trained_parameters
from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.planning.network import make_plan
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.runs.trainer_state import restore_trainer, save_trainer
from orwcfm_fast.settings import Finetune

CPU = torch.device("cpu")
SMALL = dict(rollout=16, batch=8, steps_per_round=2, probe=8, chunk=8, nfe=3, warmup=0, lr=1e-2)
SHAPES = {"mlp": (2,), "unet-digits": (1, 8, 8)}
ADAPTERS = [{}, {"lora": 4}, {"lora": 4, "lora_kind": "rslora"}, {"lora": 4, "lora_kind": "dora"}]


def weights(policy):
    return {k: v.clone() for k, v in policy.network.state_dict().items()}


def size(policy):
    return sum(v.nbytes for v in weights(policy).values())


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def disturbed(model="unet-digits", precision="bf16", **settings):
    """A policy whose trained weights are all non-zero."""
    policy = make_policy(model, "moons", SHAPES[model], CPU, precision)
    with torch.no_grad():
        for p in policy.network.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    if settings:
        add_lora(policy.network, Finetune(**settings))
    with torch.no_grad():
        for p in trained_parameters(policy.network):
            p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return policy


@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
@pytest.mark.parametrize("model", SHAPES)
def test_velocities_are_autocasts_to_the_last_bit(model, settings):
    policy = disturbed(model, **settings)
    inference = InferenceCopy(policy)
    copied = inference.policy is not policy
    assert copied == (settings.get("lora_kind") != "dora")  # whose norms would be another base's
    x = torch.randn(3, *policy.shape, generator=torch.Generator().manual_seed(1))
    for t in (0.3, torch.tensor([0.1, 0.5, 0.9])):
        with torch.no_grad():
            assert torch.equal(policy.velocity(t, x), inference.refresh().velocity(t, x))
    assert size(inference.policy) < 0.6 * size(policy) or not copied


def test_a_float32_policy_is_itself_and_its_reference_exact():
    policy = disturbed(precision="fp32")
    assert InferenceCopy(policy).refresh() is policy
    assert equal(weights(policy.frozen_copy()), weights(policy))


def trainer(**settings):
    policy = disturbed()
    return build_trainer(policy, lambda x: x.flatten(1).mean(1), Finetune(**SMALL | settings))


@pytest.mark.parametrize("settings", [{}, {"lora": 4}, {"method": "nft", "kl": 0.1}], ids=str)
def test_rollouts_and_anchors_are_those_of_the_policy_as_it_is(settings):
    """Of the average of past policies where the method has one."""
    loop = trainer(**settings)
    loop.one_round()
    drawn = loop.draw_and_score()
    batches = loop.minibatches(drawn.rollout, loop.signal(drawn.rollout))
    s, averaged = loop.settings, loop.method.averages is not None
    assert loop.inference.policy is not loop.policy
    with loop.without_gradient(averaged and loop.method.samples_average):
        assert torch.equal(draw(loop.policy, s.rollout, 1, s.seed, s, s.chunk).x1, drawn.rollout.x1)
    loop.method = replace(loop.method, reads_velocity=True)  # v_old and v_ref apart
    found = loop.anchors(batches)
    with loop.without_gradient(averaged):
        for name, policy in {"v_old": loop.policy, "v_ref": loop.reference}.items():
            expected = velocities(policy, batches[0], BatchSizes.of(s))
            assert torch.equal(found.steps[name][0], expected), name


@pytest.mark.parametrize("settings", [{}, {"lora": 4}], ids=str)
def test_resumed_and_reset_runs_have_the_float32_weights(settings, tmp_path):
    loop = trainer(**settings)
    start = weights(loop.policy)
    loop.one_round()
    save_trainer(loop, tmp_path / "one", {})
    loop.one_round()
    again = trainer(**settings)
    restore_trainer(again, checkpoint.load(tmp_path / "one"))
    again.one_round()
    assert equal(weights(again.policy), weights(loop.policy))
    loop.reset()
    assert equal(weights(loop.policy), start)


def test_a_run_writes_its_reference_in_float32(run_cli):
    base(run_cli, steps=20)
    small = ("--rounds", 1, "--rollout", 8, "--batch", 4, "--steps-per-round", 1, "--probe", 4, "--eval-n", 8)
    ended = run_cli(
        "finetune", "--checkpoint", "base", "--precision", "bf16", *small, "--nfe", 2, "--out", "run"
    )
    assert ended.code == 0, ended.err
    found = weights(Loader(CPU, "fp32").load("run/reference").policy)
    assert equal(found, weights(Loader(CPU, "fp32").load("base").policy))


@pytest.mark.parametrize("model", SHAPES)
def test_the_slope_of_a_reference_held_in_bf16_is_measured_in_float32(model):
    policy = disturbed(model)
    x0 = start_noise(policy, 16, 0)
    held, exact = (
        lipschitz(p, x0, Finetune()) for p in (policy.frozen_copy(), policy.frozen_copy(exact=True))
    )
    assert held == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("lora", [0, 4])
def test_the_copy_is_in_the_plan(lora):
    s = Finetune(**SMALL | {"lora": lora})
    loop = trainer(lora=lora)
    plan = make_plan(disturbed(), make_reward("even-digits"), s)
    copied, reference, start = (size(p) for p in (loop.inference.policy, loop.reference, loop.policy))
    assert plan.held["bf16 copy of the policy"] == copied
    assert plan.held["reference"] == (0 if lora else reference)
    assert plan.held["initial weights"] == (0 if lora else start)


class Plugin(torch.nn.Module):
    """Of another author: reads a weight by itself, and leaves autocast for a layer."""

    def __init__(self):
        super().__init__()
        self.time, self.body = torch.nn.Linear(1, 2), torch.nn.Linear(2, 2)

    def forward(self, t, x):
        with torch.autocast("cpu", enabled=False):
            time = self.time(t.float()[:, None])
        return self.body(x) / self.body.weight.norm() + time


def test_a_network_of_a_plugin_runs_as_it_is():
    policy = replace(make_policy("mlp", "moons", (2,), CPU, "bf16"), network=Plugin())
    assert InferenceCopy(policy).refresh() is policy
    assert policy.frozen_copy().network.time.weight.dtype == torch.float32
