"""The benchmarks measure what they say, against a baseline that learns."""

import json

import pytest
import torch

from orwcfm_fast.benchmarks import loop
from orwcfm_fast.benchmarks.plain_loop import PlainLoop, torchcfm_network


def test_plain_loop_follows_the_same_gradient_as_the_learner():
    """Same samples, noise and times: one step of the baseline and of ours move the weights alike."""
    from orwcfm_fast import noise
    from orwcfm_fast.coupling import couple
    from orwcfm_fast.settings import Finetune
    from orwcfm_fast.step import Learner

    policy = loop.bench_policy("digits", "fp32")
    plain = PlainLoop(
        torchcfm_network("unet-digits", policy.network.state_dict()), None, (1, 8, 8), 1.0, 0.0, 8
    )
    x1 = torch.randn(8, 1, 8, 8)
    seed = torch.tensor(0)
    batch = couple(x1, torch.ones(8), 1.0, seed, noise.indices(0, 8, "cpu"))
    x0 = noise.normal((1, 8, 8), seed, batch.index, noise.X0)
    plain.reward = lambda x: torch.zeros(len(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda n: batch.t)
        patch.setattr(torch, "randn_like", lambda x: x0)
        plain.gradient_step(x1)
    ours = {}
    for name, p in policy.network.named_parameters():
        p.register_hook(lambda g, name=name: ours.__setitem__(name, g.flatten().clone()))
    Learner(policy, policy.frozen_copy(), Finetune()).step(batch, seed)
    plains = {name: p.grad.flatten() for name, p in plain.network.named_parameters()}
    both = [torch.cat([found[name] for name in plains]) for found in (plains, ours)]
    assert float(torch.nn.functional.cosine_similarity(*both, dim=0)) > 0.99999


@pytest.mark.slow
def test_bench_loop_reports_every_phase_of_digits():
    found = loop.measure("digits", 8, 1, 0.03)
    assert {r.phase for r in found} == {"rollout", "gradient step", "one fresh batch a step"}
    assert {r.way for r in found} == {"plain", "ours fp32", "ours bf16"}
    assert all(r.images_per_s > 0 for r in found)
    fresh = {r.way: r.ratio for r in found if r.phase == "one fresh batch a step"}
    assert fresh["ours fp32"] > 3, "99 Euler steps against a dozen"


def test_bench_refuses_what_it_does_not_know(run_cli):
    result = run_cli("bench", "kernel")
    assert result.code == 2 and "did you mean 'kernels'" in result.err


@pytest.mark.slow
def test_bench_loop_prints_json(run_cli, monkeypatch):
    monkeypatch.setattr(loop, "SIZES", {"digits": loop.SIZES["digits"]})
    monkeypatch.setattr(
        loop, "measure", lambda data, *a: loop.rows(data, "rollout", {"plain": [1.0], "ours": [2.0]})
    )
    found = json.loads(run_cli("bench", "loop", "--json").out)["loop"]
    assert found["rows"][1]["ratio"] == 2.0 and "torch" in found["versions"]
