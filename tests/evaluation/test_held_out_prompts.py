"""Held-out prompts are measured after every round and never trained on."""

import json
from pathlib import Path

import pytest
import torch

from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.prompts import Conditions, Prompt

CPU = torch.device("cpu")
SHORT = ("--rounds", 2, "--steps-per-round", 2, "--rollout", 8, "--batch", 8, "--probe", 5, "--eval-n", 8,
         "--image-size", 8, "--prompt-tokens", 6, "--precision", "fp32", "--lora", 4, "--quiet",
         "--solver", "euler", "--grid", "own", "--nfe", 2)  # fmt: skip


def test_no_sample_is_drawn_for_a_held_out_prompt():
    table = Conditions(
        [Prompt("a"), Prompt("b", 2.0), Prompt("c", held_out=True), Prompt("d", held_out=True)], CPU
    )
    rows = table.at(torch.linspace(0, 1 - 2**-24, 3001))
    assert rows.unique().tolist() == [0, 1] and len(table) == 2
    assert table.held_out_rows(5).tolist() == [2, 3, 2, 3, 2]
    again = [Prompt.of(p.to_json()) for p in table.prompts]
    assert again == table.prompts, "a checkpoint brings them back"


def test_held_out_is_true_or_false():
    with pytest.raises(ValueError, match="held_out should be true or false"):
        Prompt.of({"prompt": "a", "held_out": "yes"})


def test_without_prompts_to_train_on_there_is_no_table_of_them():
    from types import SimpleNamespace

    from orwcfm_fast.networks.flow.loading import requested
    from orwcfm_fast.settings import Finetune

    found = SimpleNamespace(kind=lambda prompt: None)
    with pytest.raises(UserError, match="every prompt is held out"):
        requested(found, Finetune(), {"prompts": [{"prompt": "a", "held_out": True}]})


@pytest.mark.slow
def test_every_round_records_the_reward_of_held_out_prompts(pipeline_folder, prompts_file, run_cli):
    Path("held.txt").write_text("seventeen letters\nx\n")
    Path("lengths.py").write_text(
        "def score(images, prompts):\n    return [float(len(p)) for p in prompts]\n"
        "def picky(images, prompts):\n    assert 'x' not in prompts\n    return [0.0] * len(prompts)\n"
        "def minus(images, prompts):\n    return [-float(len(p)) for p in prompts]\n"
    )
    how = (
        "--model",
        f"diffusers:{pipeline_folder('sd3')}",
        "--prompts",
        prompts_file,
        "--eval-prompts",
        "held.txt",
    )
    rewards = ("--reward", "lengths.py:score", "--holdout-reward", "lengths.py:minus")
    made = run_cli("finetune", *how, *rewards, *SHORT, "--out", "run")
    assert made.code == 0, made.err
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for line in lines:  # of five samples three have 17 letters and two have one
        assert line["eval_reward_mean"] == pytest.approx((3 * 17 + 2) / 5)
        assert line["eval_holdout_mean"] == pytest.approx(-(3 * 17 + 2) / 5) and line["eval_reward_std"] > 0
        assert line["reward_max"] == 5.0, "the longest prompt of those that are trained on"
    assert "held-out prompts" in Path("run/report.html").read_text("utf-8")
    more = run_cli("finetune", "--resume", "run", "--rounds", 3, *rewards)
    assert more.code == 0, more.err
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["round"] == 3 and last["eval_reward_mean"] == pytest.approx((3 * 17 + 2) / 5)
    picky = ("--reward", "lengths.py:picky", "--rounds", 1, "--out", "picky")
    made = run_cli("finetune", *how, *SHORT, *picky)
    assert made.code == 0 and "held-out prompts are not scored: reward lengths.py:picky, held-out" in made.err
    assert "eval_reward_mean" not in Path("picky/metrics.jsonl").read_text()
    Path("held.txt").write_text("new words\na cat\n")
    refused = run_cli("finetune", *how, *rewards, *SHORT, "--out", "other")
    assert refused.code == 2 and "'a cat' is trained on as well" in refused.err and not Path("other").exists()
    gone = run_cli("finetune", *how[:-1], "none.txt", *rewards, *SHORT, "--out", "other")
    assert gone.code == 2 and "--eval-prompts none.txt: No such file" in gone.err
