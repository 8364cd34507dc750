"""Whole runs of a tiny pipeline that a judge on a real local server and a reader of quoted text score."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.rewards import judge

OF_ROUND = ("--steps-per-round", 3, "--weights", "advantage", "--group", 8, "--probe", 4, "--quiet")
SIZES = ("--image-size", 8, "--prompt-tokens", 6, "--precision", "fp32", "--lora", 4)
STEPS = ("--solver", "euler", "--grid", "own", "--nfe", 3, "--warmup", 0)
SHORT = ("--rounds", 3, "--rollout", 16, "--batch", 8, "--eval-n", 8, "--lr", 0.01)
LONG = (
    "--rounds",
    30,
    "--rollout",
    64,
    "--batch",
    64,
    "--eval-n",
    128,
    "--lr",
    0.003,
    "--alpha",
    0,
    "--tau",
    1,
)
QUESTION = ("--question", "Is this a bright {prompt}?")


READS = """
import os, re, signal
from pathlib import Path

def score(images, prompts):
    told = Path("kill_at")
    left = int(told.read_text()) if told.exists() else 0
    if left == 1:
        told.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if left:
        told.write_text(str(left - 1))
    read = 4.5 * (1 + images.flatten(1).mean(1))  # "0" in a black picture, "9" in a white one
    wanted = [float(re.search('"(.)"', prompt)[1]) for prompt in prompts]
    return 1 - (read - read.new_tensor(wanted)).abs() / 9

score.concurrent = True
"""


@pytest.fixture
def command(run_cli, pipeline_folder, judge_server):
    """command(*args): the arguments of a run that both score, new or with --resume."""
    rewards = ("--reward", f"judge:{judge_server.url}#eye", "--reward", "reads.py:score")
    Path("reads.py").write_text(READS)
    Path("prompts.txt").write_text('a sign that reads "9"\na cat with "8"\n')
    model = ("--model", f"diffusers:{pipeline_folder('sd3', True)}", "--prompts", "prompts.txt")

    def made(*args):
        new = (*model, *SIZES, *STEPS, *OF_ROUND, *QUESTION) if "--resume" not in args else ("--quiet",)
        return "finetune", *new, *rewards, *args

    return made


@pytest.fixture
def finetune(run_cli, command):
    """finetune(*args): such a run in this process."""
    return lambda *args: run_cli(*command(*args))


def outcome(run: str):
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_s")
    records = [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]
    return records, checkpoint.load(Path(run) / "checkpoints" / "step_9").tensors


def assert_equal(whole: str, other: str) -> None:
    """The records and the checkpoints of two runs of three rounds are the same."""
    (records, tensors), (r, t) = outcome(whole), outcome(other)
    assert len(records) == 3 and records == r
    for name, values in tensors.items():
        assert all(torch.equal(values[k], t[name][k]) for k in values)


@pytest.mark.slow
def test_a_server_that_dies_in_a_round_saves_the_run_which_ends_as_if_it_had_not(
    finetune, judge_server, monkeypatch
):
    whole = finetune(*SHORT, "--out", "whole")
    assert whole.code == 0, whole.err
    monkeypatch.setattr(judge, "RETRIES", 1)
    judge._client.cache_clear()
    alive, answer = len(judge_server.requests) + 8 + 16 + 5, judge_server.answer
    judge_server.answer = lambda request: (
        answer(request) if len(judge_server.requests) <= alive else (503, b'{"error": "going down"}')
    )
    stopped = finetune(*SHORT, "--out", "stopped")
    assert stopped.code == 1 and stopped.err.count("\n") == 1, stopped.err
    assert "HTTP 503 (going down)" in stopped.err and "stopped" in stopped.err
    assert len(judge_server.requests) > alive + 1, "it was asked again"
    judge_server.answer = answer
    again = finetune("--resume", "stopped")
    assert again.code == 0, again.err
    assert_equal("whole", "stopped")


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_is_scored_ends_as_one_that_was_not(finetune, command):
    whole = finetune(*SHORT, "--out", "whole")
    assert whole.code == 0, whole.err
    Path("kill_at").write_text("5")
    alone = [sys.executable, "-m", "orwcfm_fast.cli", *map(str, command(*SHORT, "--out", "killed"))]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run(alone, env=threads, timeout=300).returncode == -signal.SIGKILL
    assert not Path("kill_at").exists() and not Path("killed/summary.json").exists()
    again = finetune("--resume", "killed")
    assert again.code == 0, again.err
    assert_equal("whole", "killed")


@pytest.mark.soak
def test_thirty_rounds_raise_what_judge_and_reader_say(finetune):
    made = finetune(*LONG, "--out", "run")
    assert made.code == 0, made.err
    found = json.loads(Path("run/summary.json").read_text())
    before, after = found["before"]["reward"], found["after"]["reward"]
    print(f"P(yes) + text: {before} before, {after} after")
    assert after["low"] > before["high"]
    assert threading.active_count() < 20
