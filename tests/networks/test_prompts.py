"""Prompts: read from files, drawn by their weights, told to rewards."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.method.rollout import start_conditions
from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.networks.prompts import Conditions, Prompt, read_prompts
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.settings import Finetune, Sample

CPU = torch.device("cpu")


def test_prompts_are_drawn_by_their_weights_and_a_group_shares_one():
    prompts = [Prompt("a"), Prompt("b", 2.0), Prompt("c", 0.5)]
    policy = replace(make_policy("mlp", "moons", (2,), CPU), conditions=Conditions(prompts, CPU))
    rows = start_conditions(policy, 28_000, Sample(seed=3, group=4))
    assert all(len(set(group.tolist())) == 1 for group in rows.view(-1, 4))
    share = torch.bincount(rows, minlength=3) / len(rows)
    assert torch.allclose(share, torch.tensor([2, 4, 1]) / 7, atol=0.02)


def test_a_reward_in_another_process_is_told_the_prompts(tmp_path):
    (tmp_path / "r.py").write_text(
        "def f(x, prompts, metadata):\n    return [len(p) + m.get('k', 0) for p, m in zip(prompts, metadata)]\n"
    )
    reward = make_reward(f"process:{sys.executable}:{tmp_path / 'r.py'}:f")
    prompts = [Prompt("ab"), Prompt("abc", metadata={"k": 0.5})]
    assert reward.scores(torch.zeros(2, 3, 4, 4), prompts=prompts).total.tolist() == [2.0, 3.5]
    reward.close()


def test_a_reward_that_wants_prompts_of_a_model_without_says_so():
    s = Finetune(rollout=8, batch=4, steps_per_round=1, probe=4)
    with pytest.raises(RewardError, match="prompts"):
        build_trainer(make_policy("mlp", "moons", (2,), CPU), lambda x, prompts: x[:, 0], s).one_round()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no prompt"), (" \n\n", "holds no prompt"), ('{"prompt": 3}', 'line 1: .*text "prompt"'),
        ('{"prompt": "a"}\nb', "line 2"), ('{"prompt": "a", "weight": 0}', "above 0"),
        ('{"prompt": "a", "weigth": 1}', "not 'weigth'"), ('{"prompt": "a", "metadata": 1}', "object"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_read_are_named(text, says, tmp_path):
    path = tmp_path / "prompts"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_prompts(path)
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "none")


def test_prompts_come_as_lines_or_json(tmp_path, prompts_file):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert [p.text for p in read_prompts(path)] == ["a cat", "a dog"]
    found = read_prompts(prompts_file)
    assert [p.weight for p in found] == [1.0, 2.0, 1.0] and found[2].metadata == {"dark": 1}
    assert [Prompt.of(json.loads(json.dumps(p.to_json()))) for p in found] == found
