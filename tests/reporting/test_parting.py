"""Reward hacking is shown: where reward and held-out reward part, and what the reward pays for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orwcfm_fast.reporting.extremes import extreme_rows, save_extremes
from orwcfm_fast.reporting.parting import parting, parting_line

SMALL = ("--rounds", 2, "--rollout", 64, "--batch", 32, "--steps-per-round", 3, "--eval-n", 64, "--probe", 16)


def rounds(reward, holdout, spread=0.1):
    return [
        {"round": k, "reward_mean": r, "reward_std": spread, "holdout_mean": h, "holdout_std": spread}
        for k, (r, h) in enumerate(zip(reward, holdout, strict=True), 1)
    ]


HACKED = ([0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.6, 0.7, 0.6, 0.5])


def test_they_part_at_the_last_round_in_which_both_were_well():
    found = rounds(*HACKED)
    assert parting(found, 100) == 2
    line = parting_line(found, 100)
    assert "after round 3: 0.3 and 0.7 then, 0.5 and 0.5 in round 5" in line


@pytest.mark.parametrize(
    "records",
    [
        rounds([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        rounds([0.5, 0.4, 0.3], [0.5, 0.4, 0.3]),  # both fall: no hacking
        rounds(*HACKED, spread=2.0),  # standard error 0.2: within chance
        [{"round": 1, "reward_mean": 1.0, "reward_std": 1.0}] * 3,
        rounds([0.1], [0.2]),
    ],
    ids=["both rise", "both fall", "within chance", "nothing held out", "one round"],
)
def test_they_have_not_parted(records):
    assert parting(records, 100) is None and parting_line(records, 100) is None


def test_the_most_and_the_least_rewarded_are_the_two_ends_in_order():
    reward = torch.arange(40.0)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    most, least = extreme_rows(reward, image=True)
    assert reward[most].tolist() == [39, 38, 37, 36, 35, 34, 33, 32]
    assert reward[least].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [len(rows) for rows in extreme_rows(torch.zeros(5), image=True)] == [2, 2], "never one in both"
    assert len(extreme_rows(torch.zeros(1000), image=False)[0]) == 100


def test_the_picture_shows_the_most_rewarded_above(tmp_path):
    white, black = torch.ones(8, 1, 8, 8), -torch.ones(8, 1, 8, 8)
    path = save_extremes(tmp_path / "e.png", white, black, (torch.ones(8), torch.zeros(8)), 3)
    pixels = np.asarray(Image.open(path).convert("L")).astype(float)
    below = pixels[len(pixels) // 2 + 40 :]  # the header stands above both rows
    assert (below < 10).mean() > 0.5 and (pixels[: len(pixels) // 2] < 10).mean() < 0.05


def test_a_run_with_a_held_out_reward_shows_both_and_where_they_part(tiny_run, run_cli):
    how = ("--checkpoint", "base", "--reward", "right", "--holdout-reward", "radius", "--out", "h")
    made = run_cli("finetune", *how, *SMALL)
    assert made.code == 0, made.err
    lines = [json.loads(line) for line in Path("h/metrics.jsonl").read_text().splitlines()]
    assert all(line["holdout_std"] > 0 for line in lines)
    assert sorted(p.name for p in Path("h/samples").glob("extremes_*")) == [
        "extremes_001.png",
        "extremes_002.png",
    ]
    page = Path("h/report.html").read_text("utf-8")
    assert "Held-out reward against reward" in page and "they part" not in page
    assert page.count('alt="most and least rewarded samples, round') == 2
    lines[0] |= {"reward_mean": 0.1, "reward_std": 0.1, "holdout_mean": -1.0, "holdout_std": 0.1}
    lines[1] |= {"reward_mean": 0.9, "reward_std": 0.1, "holdout_mean": -2.0, "holdout_std": 0.1}
    Path("h/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = run_cli("finetune", "--resume", "h")
    assert again.code == 0, again.err
    assert "part after round 1: 0.1 and -1 then, 0.9 and -2 in round 2" in again.out
    page = Path("h/report.html").read_text("utf-8")
    assert "they part: round 1" in page and "part after round 1" in page
