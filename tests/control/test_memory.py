"""Memory that runs out halves the sizes, and the run goes on to the same end."""

import json
from pathlib import Path

import pytest
import torch

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.checkpoints import retention
from orwcfm_fast.device import out_of_memory
from orwcfm_fast.errors import RewardError, WorkError
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.models import VelocityMLP
from orwcfm_fast.rewards import combine, make_reward, score
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.finetune_run import Finetuning
from orwcfm_fast.settings import Finetune

FORWARD = VelocityMLP.forward
CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"


def test_the_real_allocators_error_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55)
    assert out_of_memory(error.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and out_of_memory(MemoryError())
    for of_a_gpu in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: out of memory",
    ):
        assert out_of_memory(RuntimeError(of_a_gpu))
    assert not out_of_memory(RuntimeError("shapes differ"))
    assert not out_of_memory(RewardError("its worker was gone (out of memory)"))


def test_halving_ends_at_one_and_lets_other_errors_through():
    sizes = []

    def work(size):
        sizes.append(size)
        raise RuntimeError(CPU)

    with pytest.raises(WorkError, match="out of memory even with a chunk of 1"):
        BatchSizes(8, 6).fit("chunk", work, 64)
    assert sizes == [6, 3, 1]
    with pytest.raises(RuntimeError, match="shapes"):
        BatchSizes(8, 6).fit("chunk", lambda size: (_ for _ in ()).throw(RuntimeError("shapes")), 6)


def limited(training: int, sampling: int):
    """The MLP on a device that holds only so many samples at once, with and without gradients."""

    def forward(self, t, x):
        if len(x) > (training if self.net[0].weight.requires_grad and torch.is_grad_enabled() else sampling):
            raise torch.OutOfMemoryError(CPU)
        return FORWARD(self, t, x)

    return forward


SMALL = dict(
    rounds=3, rollout=64, batch=32, steps_per_round=4, probe=40, eval_n=64, chunk=48, reward=["right"]
)


def run(out: str, lines: list[str] | None = None) -> list[dict]:
    task = Finetuning.prepare(Finetune(checkpoint="base", **SMALL), {}, out=Path(out))
    task.train(on_line=(lines if lines is not None else []).append)
    task.run.unlock()
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_runs_out_of_memory_goes_on_with_half_and_records_it(base, monkeypatch):
    plenty = run("plenty")
    monkeypatch.setattr(VelocityMLP, "forward", limited(training=10, sampling=30))
    lines: list[str] = []
    little = run("little", lines)
    for text in ("micro-batch of 16", "micro-batch of 8", "chunk of 20"):
        assert sum(text in line for line in lines) == 1, lines
        assert any(text in said for said in little[0]["guard"])
    assert [(r["micro_batch"], r["chunk"]) for r in little] == [(8, 20)] * 3
    assert [(r["micro_batch"], r["chunk"]) for r in plenty] == [(32, 48)] * 3
    for ours, theirs in zip(little, plenty, strict=True):
        for key in ("reward_mean", "loss_fm", "loss_w2", "w2_coupled", "grad_norm_max"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    newest = retention.steps(Path("little/checkpoints"))[0]
    control = json.loads((newest / "state.json").read_text())["control"]
    assert (control["micro_batch"], control["chunk"]) == (8, 20)


def test_a_resumed_run_starts_with_the_sizes_that_fitted(base, monkeypatch):
    monkeypatch.setattr(VelocityMLP, "forward", limited(training=10, sampling=30))
    run("little")
    monkeypatch.setattr(VelocityMLP, "forward", FORWARD)
    task = Finetuning.prepare(None, {"rounds": 4}, resume=Path("little"))
    lines: list[str] = []
    task.train(on_line=lines.append)
    last = task.run.read_metrics()[-1]
    assert last["round"] == 4 and (last["micro_batch"], last["chunk"]) == (8, 20) and lines == []


class Narrow:
    """A reward that holds 20 samples at once and draws random numbers; records the sizes of its batches."""

    def __init__(self, limit: int = 20) -> None:
        self.limit, self.sizes = limit, []

    def __call__(self, x):
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError(CPU)
        return x[:, 0] + 0.1 * torch.rand(len(x))


def trainer(two_gaussians, reward, **settings) -> Trainer:
    return build_trainer(
        two_gaussians, reward, Finetune(**{k: v for k, v in SMALL.items() if k != "reward"} | settings)
    )


def test_a_reward_that_runs_out_of_memory_is_asked_of_half_and_so_from_then_on(two_gaussians):
    reward = Narrow()
    loop = trainer(two_gaussians, reward)
    first, second = loop.train(2)
    assert reward.sizes == [64, 32, 16, 16, 16, 16] + [16] * 4
    assert [text for text in first["guard"] if "reward batch of 16" in text] and not second["guard"]
    assert first["reward_batch"] == second["reward_batch"] == 16
    noises = (loop.last.scores.total - loop.last.rollout.x1[:, 0]) / 0.1
    assert len(noises.round(decimals=3).unique()) > 40, "each part draws random numbers of its own"


def test_held_out_and_trained_rewards_go_on_with_what_both_hold(two_gaussians):
    narrow, wide = Narrow(20), Narrow(40)
    loop = build_trainer(
        two_gaussians, narrow, Finetune(**SMALL | {"reward": []}), holdout=make_reward(wide, name="wide")
    )
    [*loop.train(2)]
    assert wide.sizes == [16] * 8 and loop.sizes.reward_batch == 16


def test_a_reward_batch_beyond_the_samples_is_all_of_them_and_halves_from_there(two_gaussians):
    reward = Narrow()
    [*trainer(two_gaussians, reward, reward_batch=4096).train(1)]
    assert reward.sizes == [64, 32] + [16] * 4


def test_a_reward_is_asked_of_as_many_as_the_user_says_and_of_all_by_default(two_gaussians):
    for asked, sizes in ((0, [64]), (48, [48, 16])):
        reward = Narrow(64)
        [*trainer(two_gaussians, reward, reward_batch=asked).train(1)]
        assert reward.sizes == sizes


def test_a_reward_too_large_for_one_sample_ends_with_one_line(two_gaussians):
    with pytest.raises(
        RewardError, match="reward reward, round 1: out of memory even with a reward batch of 1: Def"
    ):
        trainer(two_gaussians, Narrow(0)).one_round()
    with pytest.raises(WorkError, match="chunk of 1: MemoryError"):
        BatchSizes(1, 1).fit("chunk", lambda size: (_ for _ in ()).throw(MemoryError), 1)


LITTLE = """
def f(x):
    if len(x) > 20:
        raise MemoryError
    return x[:, 0]
"""


def test_a_resumed_run_asks_its_reward_of_as_many_as_fitted(base, run_cli):
    Path("reward.py").write_text(LITTLE)
    small = (
        "--rounds",
        2,
        "--rollout",
        64,
        "--batch",
        32,
        "--steps-per-round",
        2,
        "--probe",
        16,
        "--eval-n",
        64,
    )
    reward = ("--reward", "reward.py:f", "--quiet")
    made = run_cli("finetune", "--checkpoint", "base", *small, *reward, "--out", "run")
    assert made.code == 0, made.err
    Path("reward.py").write_text(LITTLE.replace("MemoryError", "ValueError"))
    again = run_cli("finetune", "--resume", "run", "--rounds", 3, *reward)
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "run", "-n", 16),
        ("predict", "run", "-n", 64, "--scored", 64, "--rounds", 1, "--alpha", 1),
        ("predict", "--versus", "run", "-n", 64, "--scored", 64, "--json"),
    ],
)
def test_a_finished_runs_reward_is_asked_of_as_many_as_the_user_now_says(
    run_cli, tiny_run, monkeypatch, command
):
    monkeypatch.setattr("orwcfm_fast.theory.prediction.REFITTED", 1000)
    sizes = []

    def noted(function, samples, *rest):
        sizes.append(len(samples))
        return score(function, samples, *rest)

    monkeypatch.setattr(combine, "score", noted)
    made = run_cli(*command, "--reward-batch", 8)
    assert made.code == 0, made.err
    assert len(sizes) > 1 and max(sizes) == 8


def test_a_device_too_small_for_one_sample_ends_with_one_line(base, monkeypatch):
    monkeypatch.setattr(VelocityMLP, "forward", limited(training=0, sampling=64))
    with pytest.raises(WorkError, match="out of memory even with a micro-batch of 1"):
        run("none")
