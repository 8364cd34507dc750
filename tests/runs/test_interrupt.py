"""Ctrl-C and SIGTERM: whenever they come a checkpoint is saved, and the resumed run ends as if uninterrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from orwcfm_fast.method.trainer import PolicyOptimizer
from orwcfm_fast.runs.interrupt import SignalHandler, StopRequested

ORWCFM = Path(sys.executable).with_name("orwcfm")
SMALL = ("--rollout", 48, "--chunk", 16, "--batch", 16, "--steps-per-round", 4, "--eval-n", 16, "--probe", 16)
LOOP = ("finetune", "--checkpoint", "base", *SMALL, "--rounds", 3, "--quiet", "--out")


def base(run_cli, data: str) -> None:
    made = run_cli("pretrain", "--data", data, "--steps", 3, "--batch", 16, "--out", "base", "--quiet")
    assert made.code == 0, made.err


def same_end(a: str, b: str) -> None:
    """Two finished runs are equal: weights, optimiser, metrics, held-out samples' measures, pictures."""
    newest = max((p.name for p in Path(a, "checkpoints").glob("step_*")), key=lambda name: int(name[5:]))
    for name in ("model", "optimizer"):
        files = [Path(run, "checkpoints", newest, f"{name}.safetensors") for run in (a, b)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    timed = ("seconds", "images_per_s")
    records = [
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith(timed)}
            for line in Path(run, "metrics.jsonl").read_text().splitlines()
        ]
        for run in (a, b)
    ]
    assert records[0] == records[1]
    if Path(a, "summary.json").exists():
        ends = [json.loads(Path(run, "summary.json").read_text()) for run in (a, b)]
        assert ends[0]["after"] == ends[1]["after"]
    pictures = [{p.name: p.read_bytes() for p in Path(run, "samples").iterdir()} for run in (a, b)]
    assert pictures[0] == pictures[1]


def signal_at(monkeypatch, place: str, count: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal in the `count`-th call of a part of the loop."""
    from orwcfm_fast.method import rollout, trainer
    from orwcfm_fast.rewards import RewardSum

    where, name = {
        "chunk": (rollout, "solve"),
        "reward": (RewardSum, "scores"),
        "step": (PolicyOptimizer, "step"),
        "measure": (trainer.Trainer, "measure"),
    }[place]
    original, calls = getattr(where, name), []

    def counted(*args, **more):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return original(*args, **more)

    monkeypatch.setattr(where, name, counted)


# one chunk is the reference's probe, then three chunks a round
PLACES = [("chunk", 2), ("chunk", 6), ("reward", 2), ("step", 1), ("step", 6), ("step", 8), ("measure", 1)]


@pytest.mark.parametrize(("data", "places"), [("moons", PLACES), ("digits", PLACES[4:5])])
def test_a_run_resumed_after_a_signal_ends_as_if_it_never_came(run_cli, data, places, monkeypatch):
    base(run_cli, data)
    assert run_cli(*LOOP, "whole").code == 0
    for place, count in places:
        out = f"{place}{count}"
        with monkeypatch.context() as patch:
            signal_at(patch, place, count)
            cut = run_cli(*LOOP, out)
        assert cut.code == 130, cut.err
        assert f"saved at {out}/checkpoints/step_" in cut.err and cut.err.count("\n") == 1
        where = {"step6": "in round 2", "step8": "after round 2"}.get(out, "interrupted")
        assert where in cut.err
        assert cut.err.rstrip().endswith(f"orwcfm finetune --resume {out}")
        again = run_cli("finetune", "--resume", out, "--quiet")
        assert again.code == 0, again.err
        same_end("whole", out)


def test_a_signal_between_steps_keeps_the_scored_rollout(run_cli, tiny_run, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, "step", 6, signal.SIGTERM)
        assert run_cli(*LOOP, "cut").code == 143
    assert {p.name for p in Path("cut/checkpoints/step_6").iterdir()} >= {"partial_round.safetensors"}
    from orwcfm_fast.rewards import RewardSum

    rounds = []
    scores = RewardSum.scores

    def counted(self, samples, where="", seed=0, prompts=None):
        rounds.append(where)
        return scores(self, samples, where, seed, prompts)

    monkeypatch.setattr(RewardSum, "scores", counted)
    shown = run_cli("finetune", "--resume", "cut")
    assert "resumed after round 1 and 2 steps" in shown.out
    assert [r for r in rounds if r.startswith("round")] == ["round 3"]


def test_a_partial_round_keeps_every_reward_and_those_held_out(run_cli, tiny_run, monkeypatch):
    rewards = ("--reward", "right", "--reward", "coordinate=0.5", "--holdout-reward", "radius")
    more = (*rewards, "--standardize-rewards")
    assert run_cli(*LOOP, "whole", *more).code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, "step", 6)
        assert run_cli(*LOOP, "cut", *more).code == 130
    assert run_cli("finetune", "--resume", "cut", "--quiet").code == 0
    same_end("whole", "cut")
    assert "holdout_mean" in Path("cut/metrics.jsonl").read_text()


def test_adapters_are_resumed_in_mid_round_too(run_cli, tiny_run, monkeypatch):
    assert run_cli(*LOOP, "whole", "--lora", 2).code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, "step", 6)
        assert run_cli(*LOOP, "cut", "--lora", 2).code == 130
    assert run_cli("finetune", "--resume", "cut", "--quiet").code == 0
    same_end("whole", "cut")


def test_an_interrupted_sweep_goes_on_and_ends_as_if_it_never_was(run_cli, tiny_run, monkeypatch):
    args = (
        "sweep",
        "--checkpoint",
        "base",
        *SMALL,
        "--rounds",
        2,
        "--alpha",
        0,
        "--alpha",
        1,
        "--quiet",
        "--out",
    )
    assert run_cli(*args, "whole").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, "step", 10, signal.SIGTERM)
        cut = run_cli(*args, "cut")
    assert cut.code == 143 and "orwcfm sweep --out cut goes on" in cut.err and cut.err.count("\n") == 1
    assert run_cli("sweep", "--out", "cut", "--quiet").code == 0
    for run in ("a0-t0.5", "a1-t0.5"):
        same_end(f"whole/{run}", f"cut/{run}")


def test_a_reward_that_draws_random_numbers_draws_them_again(run_cli, tiny_run):
    Path("noisy.py").write_text("import torch\ndef f(x): return x[:, 0] + torch.randn(len(x))\n")
    for out, rounds in (("whole", 3), ("cut", 1)):
        made = run_cli(*LOOP, out, "--reward", "noisy.py:f", "--rounds", rounds)
        assert made.code == 0, made.err
    torch.manual_seed(5)  # as another process might stand
    more = run_cli("finetune", "--resume", "cut", "--reward", "noisy.py:f", "--rounds", 3, "--quiet")
    assert more.code == 0, more.err
    same_end("whole", "cut")


@pytest.mark.parametrize("data", ["moons", "digits"])
def test_pretraining_takes_a_signal_at_any_step(run_cli, data, monkeypatch):
    from orwcfm_fast.method.pretrain import Pretrainer

    step = Pretrainer.step
    args = ("pretrain", "--data", data, "--batch", 8, "--steps", 40, "--quiet", "--out")
    assert run_cli(*args, "whole").code == 0

    def at_13(self):
        if self.steps == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Pretrainer, "step", at_13)
        cut = run_cli(*args, "cut")
    assert cut.code == 143 and cut.err.count("\n") == 1, cut.err
    assert "saved at cut/checkpoints/step_14; orwcfm pretrain --resume cut" in cut.err
    assert run_cli("pretrain", "--resume", "cut", "--quiet").code == 0
    same_end("whole", "cut")
    averages = [Path(run, "checkpoints/step_40/ema.safetensors").read_bytes() for run in ("whole", "cut")]
    assert averages[0] == averages[1]


def test_handlers_come_and_go():
    before = signal.getsignal(signal.SIGTERM)
    with SignalHandler("") as signals:
        signals.raise_if_stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested):
            signals.raise_if_stopped()
        os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat themselves
        assert signals.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


STUCK = """
import ctypes, os, signal, sys, time
from orwcfm_fast.runs.interrupt import SignalHandler, StopRequested
with SignalHandler("", deadline=1.0) as signals:
    print("here", flush=True)
    if sys.argv[1] == "stuck":  # in C, where Python's own handlers do not run
        ctypes.CDLL(None).sleep(60), ctypes.CDLL(None).sleep(60)
    elif sys.argv[1] == "saves":
        while signals.signal is None:
            time.sleep(0.01)
    else:
        time.sleep(2.5)
print("left")
"""


@pytest.mark.parametrize(("what", "code"), [("saves", 0), ("waits without a signal", 0), ("stuck", 143)])
def test_a_process_that_cannot_save_after_sigterm_ends_at_its_deadline(what, code):
    """One of many ranks may wait inside an exchange for a rank that is gone."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    if what != "waits without a signal":
        process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    out, err = process.communicate(timeout=50)
    assert process.returncode == code and ("left" in out) == (code == 0)
    assert (err == "") == (code == 0)
    if code:
        assert "1 s after SIGTERM; the last checkpoint stays" in err and time.monotonic() - began < 30


FORKS = """
import multiprocessing, signal, time
from orwcfm_fast.runs.interrupt import SignalHandler
with SignalHandler("", deadline=1.0) as signals:
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    time.sleep(0.3)
    worker.terminate()  # SIGTERM, of which this process must not hear
    worker.join()
    time.sleep(2.5)
    assert worker.exitcode == -signal.SIGTERM and signals.signal is None
print("left")
"""


def test_a_signal_to_a_forked_worker_of_a_reward_is_not_this_processs():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


SLOW_REWARD = (
    "import time\ndef f(x):\n    open('scoring', 'w').close()\n    time.sleep(60)\n    return x[:, 0]\n"
)


def test_a_second_ctrl_c_leaves_at_once(tiny_run):
    Path("slow.py").write_text(SLOW_REWARD)
    command = [ORWCFM, *map(str, LOOP), "slow", "--reward", "slow.py:f"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not Path("scoring").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert process.poll() is None, "the first waits for the reward"
        process.send_signal(signal.SIGINT)
        began = time.perf_counter()
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and time.perf_counter() - began < 5
    assert error == "error: left at once; orwcfm finetune --resume slow --reward slow.py:f\n"


def test_ctrl_c_outside_training_is_one_line_too(run_cli, monkeypatch):
    from orwcfm_fast.runs import finetune_run

    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_run.Finetuning, "prepare", interrupted)
    result = run_cli("finetune")
    assert result.code == 130 and result.err == "error: interrupted\n"


def test_strides_that_do_not_fit_the_samples_are_refused():
    """1×8×8 samples of either layout are 'contiguous', so a checkpoint keeps strides; they may lie."""
    from orwcfm_fast.checkpoints.checkpoint import Checkpoint
    from orwcfm_fast.networks.policy import make_policy
    from orwcfm_fast.rewards import make_reward
    from orwcfm_fast.runs.build import build_trainer
    from orwcfm_fast.runs.partial_round import from_state
    from orwcfm_fast.settings import Finetune

    policy = make_policy("mlp", "two-gaussians", (1,), torch.device("cpu"))
    trainer = build_trainer(policy, make_reward("right"), Finetune(rollout=8, probe=4))
    for stride, fits in ((1, True), (0, False), (10**12, False), (-1, False)):
        begun = {"x1": torch.zeros(8, 1), "scores.0": torch.zeros(8), "losses": torch.zeros(1, 2)}
        state = {"x1_stride": [stride, 1], "seconds": {}, "seconds_scores": [0.0], "drift": None}
        found = Checkpoint(Path("x"), {"partial_round": state}, {"partial_round": begun})
        if fits:
            assert from_state(found, 0, trainer)[0].rollout.x1.stride() == (1, 1)
        else:
            with pytest.raises((ValueError, RuntimeError)):
                from_state(found, 0, trainer)
