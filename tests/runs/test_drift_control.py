"""What a run of a method that drifts reports of itself with τ = 0."""

import json
from pathlib import Path

import pytest
import torch

from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.drift_control import trained_at_rest
from orwcfm_fast.settings import Finetune

SMALL = dict(rollout=64, chunk=64, batch=32, steps_per_round=4, nfe=6, probe=8, rounds=2, lr=1e-2, warmup=0)
FLAGS = [word for key, value in SMALL.items() for word in (f"--{key.replace('_', '-')}", value)]


def run_of(run_cli, *args) -> dict:
    made = run_cli("finetune", "--checkpoint", "base", *FLAGS, "--eval-n", 64, "--out", "run", *args)
    assert made.code == 0, made.err
    return json.loads(Path("run/summary.json").read_text()) | {"out": made.out}


def test_the_papers_method_is_shown_beside_itself_with_nothing_to_learn(base, run_cli):
    found = run_of(run_cli, "--method", "orw", "--tau", 3)
    (still,) = found["at_rest"]
    assert "after, with τ = 0" in found["out"] and "after, with τ = 0" in Path("run/report.html").read_text()
    assert 0 < still["w2_coupled"]["mean"] < found["after"]["w2_coupled"]["mean"]
    again = run_cli("finetune", "--checkpoint", "base", *FLAGS, "--eval-n", 64, "--out", "still",
                    "--method", "orw", "--tau", 0)  # fmt: skip
    assert again.code == 0, again.err
    own = json.loads(Path("still/summary.json").read_text())
    assert own["at_rest"] == [] and own["after"]["w2_coupled"] == still["w2_coupled"]


@pytest.mark.parametrize("args", [("--method", "orw-centred"), ("--method", "orw", "--no-drift-control")])
def test_nothing_is_trained_twice_where_the_method_rests_or_the_user_declines(base, run_cli, args):
    assert run_of(run_cli, *args)["at_rest"] == []


@pytest.mark.parametrize("lora", [0, 2])
def test_the_trained_policy_is_there_again_afterwards(two_gaussians, lora):
    s = Finetune(method="orw", tau=3.0, lora=lora, **SMALL)
    trainer = build_trainer(two_gaussians, make_reward(lambda x: x[:, 0]), s)
    for _ in trainer.train(s.rounds):
        pass
    trained = {key: value.clone() for key, value in trainer.policy.network.state_dict().items()}
    with trained_at_rest(trainer) as policy:
        state = policy.network.state_dict()
        assert any(not torch.equal(state[key], value) for key, value in trained.items())
    for key, value in trainer.policy.network.state_dict().items():
        assert torch.equal(value, trained[key])
    assert (trainer.round, trainer.tau) == (2, 3.0)
