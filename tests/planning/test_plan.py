"""Memory and time that `orwcfm doctor --plan` predicts are those that a run then takes."""

import json
import subprocess
import sys
import time
from itertools import accumulate

import pytest
import torch

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.data.datasets import source
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.planning.allocations import AllocationProfile, record_allocations
from orwcfm_fast.planning.network import make_plan, plan_run
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.trainer_state import trainer_contents
from orwcfm_fast.settings import Finetune

CPU = torch.device("cpu")
SHORT = dict(steps_per_round=2, nfe=4, probe=8)


def made(model: str, data: str, **settings):
    s = Finetune(**SHORT | settings)
    policy = make_policy(model, data, source(data)[0].shape, CPU, settings.get("precision", "fp32"))
    return policy, make_reward([source(data)[0].reward], s), s


def measured(model: str, data: str, **settings) -> int:
    """Peak of torch's own accounting of CPU memory over two whole rounds, the first one's checkpoint being written."""
    policy, reward, s = made(model, data, **settings)
    weights = sum(x.numel() * x.element_size() for x in policy.network.state_dict().values())

    def rounds():
        loop = build_trainer(policy, reward, s)
        loop.one_round()
        copied = checkpoint.copied(trainer_contents(loop, {})[1])
        loop.one_round()
        del copied

    return weights + max(accumulate(record_allocations(rounds, CPU)))


def predicted(model: str, data: str, **settings):
    return make_plan(*made(model, data, **settings))


def of_rounds(plan) -> int:
    return max(bytes for phase, bytes in plan.phases.items() if phase != "evaluation")


def test_a_profile_extrapolates_the_peak_even_where_it_moves():
    """Fixed 100, then 10 a sample: the peak is first at the fixed part, later at the growing one."""

    def changes(size):
        return [100, -100, 10 * size, -10 * size]

    profile = AllocationProfile((1, 2), (changes(1), changes(2)), (0.1, 0.2))
    assert [profile.peak(n) for n in (2, 10, 11, 50)] == [100, 100, 110, 500]
    assert profile.time(4) == pytest.approx(0.4)


CASES = [
    *[("mlp", "moons", dict(batch=b, rollout=b, chunk=512)) for b in (1024, 4096, 16384)],
    *[("unet-digits", "digits", dict(batch=b, rollout=64, chunk=32)) for b in (16, 32, 64)],
    *[("unet-digits", "digits", dict(batch=8, rollout=32, chunk=8, precision="bf16", lora=r)) for r in (0, 4)],
    *[
        pytest.param("unet-mnist", "mnist", dict(batch=b, rollout=16, chunk=8), marks=pytest.mark.soak)
        for b in (6, 8, 16)
    ],
]  # fmt: skip


@pytest.mark.parametrize(("model", "data", "sizes"), CASES, ids=str)
def test_predicted_memory_is_what_torch_then_allocates(model, data, sizes):
    ours, theirs = of_rounds(predicted(model, data, **sizes)), measured(model, data, **sizes)
    print(f"{model} {sizes}: predicted {ours / 2**20:.1f} MiB, measured {theirs / 2**20:.1f} MiB")
    assert abs(ours / theirs - 1) <= 0.15


@pytest.mark.parametrize("method", ["orw-centred", "nft"])
def test_anchors_of_a_rounds_draws_are_in_the_plan(method):
    """Counted in the run itself, between two of its steps: their peak is a small part of a process's memory."""
    seen = []

    class Count(Callback):
        def on_boundary(self, trainer):
            if trainer.current and trainer.current.anchors:
                seen.extend(v.nbytes for found in trainer.current.anchors.steps.values() for v in found)
                raise KeyboardInterrupt

    sizes = dict(batch=32, rollout=32, chunk=32, steps_per_round=24, method=method)
    policy, reward, s = made("unet-digits", "digits", **sizes)
    with pytest.raises(KeyboardInterrupt):
        build_trainer(policy, reward, s, callbacks=[Count()]).one_round()
    assert predicted("unet-digits", "digits", **sizes).held["stored anchors"] == sum(seen)


def test_what_does_not_fit_is_halved_until_it_does_and_then_holds(monkeypatch):
    monkeypatch.setattr("orwcfm_fast.planning.network.resident_bytes", lambda: 0)  # torch's own share alone
    settings = dict(batch=4096, rollout=512, chunk=512)
    whole = predicted("mlp", "moons", **settings)
    limit = int((sum(whole.held.values()) + 0.4 * sum(whole.step.values())) / 0.9)
    plan = make_plan(*made("mlp", "moons", **settings), limit=limit)
    assert of_rounds(plan) <= 0.9 * limit and plan.micro_batch in (1024, 2048) and plan.chunk <= 512
    then = measured("mlp", "moons", **settings | {"micro_batch": plan.micro_batch, "chunk": plan.chunk})
    assert abs(of_rounds(plan) / then - 1) <= 0.15
    assert not make_plan(*made("mlp", "moons", **settings), limit=1).fits


@pytest.mark.soak  # of a machine with nothing else to do
def test_predicted_seconds_are_those_of_a_round():
    settings = dict(batch=512, rollout=4096, steps_per_round=40, nfe=14, probe=128)
    plan = predicted("mlp", "moons", **settings)
    policy, reward, s = made("mlp", "moons", **settings)
    loop = build_trainer(policy, reward, s)
    loop.one_round()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        loop.one_round()
        seconds.append(time.perf_counter() - began)
    print(
        f"predicted {sum(plan.seconds.values()):.2f} s, measured {min(seconds):.2f} to {max(seconds):.2f} s"
    )
    assert min(seconds) / 2 <= sum(plan.seconds.values()) <= 2 * max(seconds)  # other work on the machine


def test_a_small_reward_batch_is_planned_for(monkeypatch):
    def reward(x):
        return x.new_ones(len(x), 2**17).mean(1)  # half a MiB a sample

    policy, _, s = made("mlp", "moons", rollout=64)
    whole, few = (
        make_plan(policy, make_reward(reward), s.model_copy(update={"reward_batch": n})).reward["scoring"]
        for n in (0, 8)
    )
    assert 0.1 <= few / whole <= 0.16
    monkeypatch.setattr("orwcfm_fast.planning.network.resident_bytes", lambda: 0)
    limit = int((sum(make_plan(policy, make_reward(reward), s).held.values()) + 0.4 * whole) / 0.9)
    assert make_plan(policy, make_reward(reward), s, limit=limit).reward_batch == 16, (
        "as the run itself would"
    )


def test_a_ranks_plan_holds_the_buckets_of_the_exchange():
    s = Finetune(**SHORT | dict(model="mlp", data="moons", batch=8, rollout=64))
    many, alone = plan_run(s, ranks=8), plan_run(s.model_copy(update={"batch": 1}))
    assert many.held["buckets of the gradient exchange"] == alone.step["gradients"]
    assert many.step == alone.step


def test_doctor_plans_with_the_settings_of_a_run(run_cli):
    flags = ("--model", "mlp", "--data", "moons", "--batch", 64, "--rollout", 64, "--steps-per-round", 2)
    table = run_cli("doctor", "--plan", *flags)
    assert table.code == 0, table.err
    for word in ("weights", "reference", "optimizer", "step: activations, micro-batch 64", "rollout: sampling",
                 "Python, torch", "peak", "a round takes about", "fits with --micro-batch 64 --chunk 64"):  # fmt: skip
        assert word in table.out, word
    found = json.loads(run_cli("doctor", "--plan", "--json", *flags).out)
    assert found["fits"] and found["peak"] > found["held"]["weights"] and found["seconds"]["steps"] > 0
    assert run_cli("doctor", "--batch", 64).code == 2
    refused = run_cli("doctor", "--plan", "--model", "mlp")
    assert refused.code == 2 and "--data" in refused.err and refused.err.count("\n") == 1


TRAIN = """
import sys, torch
from pathlib import Path
from orwcfm_fast.data.datasets import source
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.settings import Finetune
from orwcfm_fast.runs.build import build_trainer

s = Finetune(**eval(sys.argv[1]))
policy = make_policy(s.model, s.data, source(s.data)[0].shape, torch.device("cpu"), "fp32")
loop = build_trainer(policy, make_reward([source(s.data)[0].reward], s), s)
for _ in range(2):
    loop.one_round()
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.soak
@pytest.mark.parametrize("model", ["mlp", "unet-digits", "unet-cifar10"])
def test_predicted_memory_is_the_peak_of_a_real_process(model, tmp_path):
    """VmHWM of a process that trains two rounds, Python and torch included, for three batch sizes."""
    data, batches, rollout = {
        "mlp": ("moons", (4096, 16384, 65536), 4096),
        "unet-digits": ("digits", (64, 128, 256), 128),
        "unet-cifar10": ("cifar10", (2, 4, 8), 4),
    }[model]
    for batch in batches:
        settings = SHORT | dict(model=model, data=data, batch=batch, rollout=rollout, precision="fp32")
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
        plan = ["-c", "from orwcfm_fast.cli import main; main()", "doctor", "--plan", "--json", *flags]
        said, taken = (
            subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, check=True, cwd=tmp_path
            ).stdout
            for command in (plan, ["-c", TRAIN, repr(settings)])
        )
        ours, theirs = json.loads(said)["peak"], int(taken) * 1024
        print(f"{model} batch {batch}: predicted {ours / 2**20:.0f} MiB, measured {theirs / 2**20:.0f} MiB")
        assert abs(ours / theirs - 1) <= 0.15
