"""Whole runs of a tiny pipeline that a judge on a real local server scores."""

import json
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


@pytest.fixture
def finetune(run_cli, pipeline_folder, prompts_file, judge_server):
    """finetune(*args): a run that the judge scores, by what --resume or --out says; (result, the judge's name)."""
    reward = ("--reward", f"judge:{judge_server.url}#eye")
    model = ("--model", f"diffusers:{pipeline_folder('sd3', True)}", "--prompts", prompts_file)

    def run(*args):
        new = (*model, *SIZES, *STEPS, *OF_ROUND, *QUESTION) if "--resume" not in args else ("--quiet",)
        return run_cli("finetune", *new, *reward, *args)

    return run


def outcome(run: str):
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_s")
    records = [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]
    return records, checkpoint.load(Path(run) / "checkpoints" / "step_9").tensors


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
    (records, tensors), (r, t) = outcome("whole"), outcome("stopped")
    assert len(records) == 3 and records == r
    for name, values in tensors.items():
        assert all(torch.equal(values[k], t[name][k]) for k in values)


@pytest.mark.soak
def test_thirty_rounds_raise_what_the_judge_says(finetune):
    made = finetune(*LONG, "--out", "run")
    assert made.code == 0, made.err
    found = json.loads(Path("run/summary.json").read_text())
    before, after = found["before"]["reward"], found["after"]["reward"]
    print(f"P(yes): {before} before, {after} after")
    assert after["low"] > before["high"]
    assert threading.active_count() < 20
