"""The benchmarks measure what they say, against a baseline that learns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orwcfm_fast.benchmarks import loop, pretraining, ways
from orwcfm_fast.benchmarks.plain_loop import PlainLoop, torchcfm_network


def test_plain_loop_follows_the_same_gradient_as_the_learner():
    """Same samples, noise and times: one step of the baseline and of ours move the weights alike."""
    from orwcfm_fast.method import noise
    from orwcfm_fast.method.coupling import couple
    from orwcfm_fast.method.step import PolicyOptimizer
    from orwcfm_fast.settings import Finetune

    policy = ways.bench_policy("digits", "fp32")
    plain = PlainLoop(
        torchcfm_network("unet-digits", policy.network.state_dict()), None, (1, 8, 8), 1.0, 0.0, 8
    )
    x1 = torch.randn(8, 1, 8, 8)
    seed = torch.tensor(0)
    batch = couple(x1, torch.ones(8), 1.0, seed, noise.indices(0, 8, "cpu"))
    x0 = noise.normal((1, 8, 8), seed, batch.index, noise.X0)
    plain.reward = lambda x: torch.zeros(len(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda n, **_: batch.t)
        patch.setattr(torch, "randn_like", lambda x: x0)
        plain.gradient_step(x1)
    ours = {}
    for name, p in policy.network.named_parameters():
        p.register_hook(lambda g, name=name: ours.__setitem__(name, g.flatten().clone()))
    PolicyOptimizer(policy, Finetune()).step(batch, seed)
    plains = {name: p.grad.flatten() for name, p in plain.network.named_parameters()}
    both = [torch.cat([found[name] for name in plains]) for found in (plains, ours)]
    assert float(torch.nn.functional.cosine_similarity(*both, dim=0)) > 0.99999


@pytest.mark.slow
def test_bench_loop_climbs_every_rung_on_digits():
    found = {r.way: r for r in loop.measure("digits", 8, 1, 0.03)}
    assert [*found] == [rung.way for rung in loop.LADDER if not rung.step.endswith(("graph", "compiled"))], (
        "those need a GPU"
    )
    plain = found.pop("plain")
    assert plain.rollout_ratio == plain.step_ratio == plain.loop_ratio == 1
    assert all(min(r.rollout, r.step, r.loop) > 0 for r in found.values())
    assert found["+ solver"].rollout_ratio > 3, "99 Euler steps against a dozen and two"
    assert found["+ rollout reuse"].loop_ratio > 2
    assert all(0 < r.rollout_share < 1 for r in found.values())
    assert plain.rollout_share > 0.8, "the plain loop samples, and little else"


def test_the_pretraining_baseline_trains_all_weights_and_averages_them():
    policy = ways.bench_policy("digits", "fp32")
    start = {k: v.clone() for k, v in policy.network.state_dict().items()}
    data = torch.randn(8, 1, 8, 8)
    plain = pretraining.PlainPretraining(torchcfm_network("unet-digits", start), data, 8)
    plain.step()
    assert plain.schedule.last_epoch == 1 and plain.optimizer.param_groups[0]["lr"] == 2e-4 / 5000
    plain.step()
    now = plain.network.state_dict()
    moved = [k for k in start if not torch.equal(start[k], now[k])]
    assert len(moved) == len(start)
    average = plain.average.state_dict()
    for key in moved:  # two steps, the first at rate 0
        expected = start[key] * pretraining.DECAY + now[key] * (1 - pretraining.DECAY)
        torch.testing.assert_close(average[key], expected, rtol=0, atol=1e-7)


def test_bench_refuses_what_it_does_not_know(run_cli):
    result = run_cli("bench", "kernel")
    assert result.code == 2 and "did you mean 'kernels'" in result.err


@pytest.mark.slow
def test_bench_loop_prints_json(run_cli, monkeypatch):
    monkeypatch.setattr(
        loop, "measure", lambda data, *a: [loop.Row(data, "plain", 3, 2, 1, 1, 1, 1, 0.4, 0.5)]
    )
    found = json.loads(run_cli("bench", "loop", "--json").out)["loop"]
    assert found["rows"][0]["rollout"] == 3 and "torch" in found["versions"]
    shown = run_cli("bench", "loop", "--out", "kept").out
    assert "of matrix rate" in shown
    (kept,) = Path("kept").glob("loop-*.json")
    assert json.loads(kept.read_text())["rows"] == found["rows"] and kept.with_suffix(".png").exists()


def test_the_full_form_tells_pretraining_and_memory():
    found = {
        "pretraining": [{"way": "bf16", "batch": 8, "images_per_s": 12.34, "ratio": 2.5}],
        "memory": [{"way": "lora", "peak": 2**30, "peak_ratio": 0.5, "held": 2**29, "held_ratio": 0.25}],
    }
    assert loop.extra_lines(found) == [
        "pretraining, bf16: 12.3 images/s, 2.50×",
        "peak memory, lora: 1.00 GiB, 0.50×; weights, gradients, optimiser and copies 0.50 GiB, 0.25×",
    ]
    assert loop.extra_lines({}) == []


def test_peak_memory_is_a_processes_own_and_not_its_parents():
    ballast = torch.ones(2**28)  # a GiB that the child never sees
    code = "import torch; from orwcfm_fast.benchmarks.memory import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    peak = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert peak < ballast.nbytes
