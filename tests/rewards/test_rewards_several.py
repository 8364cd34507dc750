"""Several rewards at once, each shown by itself, and rewards held out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.rewards import decode_and_score, make_holdout, make_reward
from orwcfm_fast.settings import Finetune, RewardsWithHoldout

SMALL = ("--rounds", 2, "--rollout", 64, "--batch", 32, "--steps-per-round", 3, "--eval-n", 64, "--probe", 16)
SMALL += ("--checkpoint", "base")
TWO = ("--reward", "right=0.7", "--reward", "coordinate=3")


def test_standardised_rewards_count_by_weight_whatever_their_unit():
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    metres, millimetres = (
        make_reward(["right=0.3", "coordinate:1=0.7"]).scores(x * torch.tensor([1.0, unit])).standardized()
        for unit in (1.0, 1000.0)
    )  # fmt: skip
    assert torch.allclose(metres, millimetres, atol=1e-4)
    side, height = (x[:, 0] > 0).float(), x[:, 1]
    expected = 0.3 * (side - side.mean()) / side.std(correction=0)
    expected += 0.7 * (height - height.mean()) / height.std(correction=0)
    assert torch.allclose(metres, expected, atol=1e-5)
    constant = make_reward(lambda x: torch.ones(len(x))).scores(x).standardized()
    assert torch.equal(constant, torch.zeros(256))


def test_a_failing_one_of_several_is_named():
    total = make_reward(["right", "coordinate:7"])
    with pytest.raises(RewardError, match="reward coordinate:7, round 2: IndexError"):
        total.scores(torch.zeros(4, 2), "round 2")


def test_named_twice_or_held_out_and_trained_on_is_refused():
    with pytest.raises(UserError, match="'right': named twice"):
        make_reward(["right", "right=2"])
    with pytest.raises(UserError, match="holdout-reward 'right': is trained on as well"):
        make_holdout(RewardsWithHoldout(reward=["right=2"], holdout_reward=["right"]))


def test_each_reward_is_logged_measured_and_timed(run_cli, tiny_run):
    holdout = ("--holdout-reward", "radius")
    made = run_cli("finetune", *SMALL, *TWO, *holdout, "--out", "two")
    assert made.code == 0, made.err
    rewards = {"right", "coordinate"}
    for line in map(json.loads, Path("two/metrics.jsonl").read_text().splitlines()):
        assert set(line["rewards"]) == rewards and set(line["seconds_rewards"]) == {*rewards, "radius"}
        weighed = 0.7 * line["rewards"]["right"] + 3 * line["rewards"]["coordinate"]
        assert line["reward_mean"] == pytest.approx(weighed, rel=1e-4) and line["holdout_mean"] < 0
        assert 0 < sum(line["seconds_rewards"].values()) <= line["seconds_reward"]
    summary = json.loads(Path("two/summary.json").read_text())
    assert set(summary["before"]["rewards"]) == rewards and set(summary["after"]["holdout"]) == {"radius"}
    assert set(summary["seconds_by_reward"]) == {*rewards, "radius"}
    for word in ("of it, rewards: right", "holdout radius", "  coordinate", "  holdout -"):
        assert word in made.out
    shown = run_cli("evaluate", "two", "-n", 32)
    assert "holdout radius" in shown.out and "  right" in shown.out, "evaluate takes them from the run"


def test_a_holdout_reward_changes_nothing_that_is_trained(run_cli, tiny_run):
    for name, more in (("a", ()), ("b", ("--holdout-reward", "radius")), ("c", ("--standardize-rewards",))):
        made = run_cli("finetune", *SMALL, *TWO, *more, "--out", name)
        assert made.code == 0, made.err
    a, b, c = (Path(run, "checkpoints/step_6/model.safetensors").read_bytes() for run in "abc")
    assert a == b and a != c
    assert "no forecast: its rewards are standardised" in made.out
    refused = run_cli("predict", "--versus", "c")
    assert refused.code == 2 and "standardised anew" in refused.err


def test_bad_holdouts_are_one_line_and_nothing_is_written(run_cli):
    for holdout, message in (("radious", "did you mean 'radius'"), ("right", "trained on as well")):
        result = run_cli("finetune", "--reward", "right", "--holdout-reward", holdout)
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1
        assert not Path("runs").exists()


def test_a_constant_reward_standardised_adds_nothing():
    from orwcfm_fast.rewards.combine import Scores

    values = {"flat": torch.full((1536,), 0.9), "real": torch.linspace(-1, 1, 1536)}
    scores = Scores(values, {"flat": 1.0, "real": 1.0}, {"flat": 0.0, "real": 0.0})
    alone = Scores({"real": values["real"]}, {"real": 1.0}, {"real": 0.0})
    assert torch.equal(scores.standardized(), alone.standardized())
    assert abs(float(alone.standardized().std(correction=0)) - 1) < 1e-5


class Latents:
    """A policy of a pipeline, as far as scoring knows one: latents of 1 number decode to images of 4."""

    pipeline = True

    def decode(self, x, rows=None):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.expand(-1, 4)

    def prompts_of(self, rows):
        return [Prompt(f"p{int(row)}") for row in rows]


def test_latents_are_decoded_and_scored_a_chunk_at_a_time_and_fewer_where_memory_runs_out():
    policy, seen, asked = Latents(), [], []

    def by_prompt(images, prompts):
        seen.append(len(images))
        asked.extend(prompts)
        return images.sum(1)

    trained, held_out = make_reward(by_prompt), make_reward(lambda images: images[:, 0])
    trained.sizes = held_out.sizes = BatchSizes(chunk=5)
    x1, rows = torch.arange(7.0)[:, None], torch.arange(7)
    first, second = decode_and_score(policy, x1, rows, [trained, held_out], "round 1", 3)
    assert first.total.tolist() == [4.0 * k for k in range(7)] and second.total.tolist() == [*range(7)]
    assert seen == [2, 2, 2, 1] and asked == [f"p{k}" for k in range(7)] and trained.sizes.chunk == 2


def test_a_rollout_that_is_no_multiple_of_its_group_is_refused(two_gaussians):
    prompted = replace(two_gaussians, conditions=[Prompt("a"), Prompt("b")])
    with pytest.raises(UserError, match=r"--rollout 50: is no multiple of --group 4, .*; use 48"):
        Trainer(prompted, "right", Finetune(rollout=50, group=4, batch=8))
