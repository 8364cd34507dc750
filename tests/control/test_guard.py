"""The guard speaks of what goes wrong, stops or takes back, and every action can be read afterwards."""

import json
import math
from pathlib import Path

import pytest
import torch

from orwcfm_fast.checkpoints import checkpoint, retention
from orwcfm_fast.control.guard import MAX_ROLLBACKS, Guard
from orwcfm_fast.control.values import read_values
from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.evaluation.probe import Probe
from orwcfm_fast.method.rollout import sample
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.settings import Finetune

HEALTHY = dict(
    loss_fm=1.0, loss_w2=0.1, grad_norm_max=1.0, velocity_gap=0.1, w2_coupled=0.4, reward_mean=0.5,
    diversity_share=0.98,
)  # fmt: skip


def guard(**settings) -> Guard:
    return Guard(Finetune(rollout=100, **settings), spread=2.0, dimension=64)


def said(changes, **settings) -> list[str]:
    """What is said of three healthy rounds and then of one with these changes."""
    g = guard(**settings)
    for _ in range(3):
        assert g.after_round(dict(HEALTHY)) == []
    return [f.text for f in g.after_round(HEALTHY | changes)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w2_coupled": 1.42}, "coupled W2 1.42 is above 1.41"),
        (
            {"velocity_norm": [1.0, None, 1.12, 1.0]},
            "norm is 1.120 times the reference's at t from 0.5 to 0.75",
        ),
        ({"diversity_share": 0.84}, "diversity is 84% of the reference's, below 85%"),
        ({"grad_norm_max": 10.1}, "gradient norm 10.1, 10 times"),
        ({"grad_norm_max": math.inf}, "the gradient is not finite"),
        ({"loss_w2": math.nan}, "the loss is not finite"),
        ({"velocity_gap": math.nan}, "the velocity is not finite"),
        ({"reward_mean": math.nan}, "the reward is not finite"),
    ],
)
def test_it_speaks_of_each_sign(changes, words):
    (text,) = said(changes)
    assert words in text


def test_it_is_silent_where_nothing_is_wrong_and_off_only_where_something_is_not_finite():
    assert said({"w2_coupled": 1.41, "grad_norm_max": 9.9, "diversity_share": 0.86}) == []
    assert said({"velocity_norm": [None, 1.04]}) == said({"velocity_norm": [1.3]}, guard_velocity=1.4) == []
    assert Guard(Finetune(), dimension=2).norm_ceiling == math.inf, "a reward moves few dimensions by as much"
    assert said({"w2_coupled": 1.5}, guard="off") == []
    assert said({"w2_coupled": 1.5}, guard_w2=2.0) == []
    assert guard(guard="off").before_steps(1.0) == [] and guard().before_steps(20.0) == []
    (found,) = guard().before_steps(19.0)
    assert "ESS 19 of 100 is below 20%" in found.text
    assert "loss" in said({"loss_fm": math.nan}, guard="off")[0]


def test_it_speaks_when_the_hold_out_reward_falls_three_times_while_the_trained_one_rises():
    g = guard()
    for k, held in enumerate((0.5, 0.6, 0.55, 0.5)):
        assert g.after_round(HEALTHY | {"reward_mean": 0.1 * k, "holdout_mean": held}) == []
    (found,) = g.after_round(HEALTHY | {"reward_mean": 0.5, "holdout_mean": 0.4})
    assert "hold-out reward fell 3 rounds in a row to 0.4" in found.text
    assert g.after_round(HEALTHY | {"reward_mean": 0.4, "holdout_mean": 0.3}) == [], (
        "the trained one fell too"
    )


def right(x):
    return (x[:, 0] > 0).float()


COLLAPSE = dict(
    method="orw",
    rollout=256,
    batch=64,
    steps_per_round=60,
    lr=3e-3,
    warmup=5,
    probe=64,
    alpha=0.0,
    tau=20.0,
    seed=1,
)


def test_non_finite_values_stop_the_run_under_every_choice_but_rollback(two_gaussians):
    for choice in ("warn", "off", "stop"):
        policy = two_gaussians.frozen_copy()
        s = Finetune(**COLLAPSE | {"lr": 1e30, "warmup": 0, "guard": choice})
        with pytest.raises(WorkError, match=r"round 1: .*is not finite"):
            build_trainer(policy, right, s).one_round()


def finetune(run_cli, out: str, *more, base="base", **settings):
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in (COLLAPSE | {"eval_n": 256} | settings).items()
        if v is not None
    ]
    return run_cli("finetune", "--checkpoint", base, "--reward", "right", "--out", out, *flags, *more)


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_warn_speaks_on_the_screen_and_in_metrics_and_lets_the_run_go_on(base, run_cli):
    result = finetune(run_cli, "run", rounds=2)
    assert result.code == 0, result.err
    first, last = records("run")
    assert any("diversity" in text for text in last["guard"])
    for text in first["guard"] + last["guard"]:
        assert f"guard: {text}" in result.out
    assert last["alpha"] == 0.0 and last["tau"] == 20.0


def test_stop_ends_with_one_line_and_keeps_the_good_checkpoint(base, run_cli):
    """τ = 0.3 lets a few rounds pass before diversity is under its floor."""
    result = finetune(run_cli, "run", "--quiet", rounds=12, tau=0.3, guard="stop")
    assert (
        result.code == 1 and result.err.count("\n") == 1 and "stopped, the last good checkpoint" in result.err
    )
    found = records("run")
    assert len(found) > 1 and all(r["guard"] == [] for r in found[:-1])
    assert any("diversity" in text for text in found[-1]["guard"])
    newest = retention.steps(Path("run/checkpoints"))[0]
    assert json.loads((newest / "state.json").read_text())["round"] == len(found) - 1


def test_rollback_lowers_tau_raises_alpha_and_a_resumed_run_carries_both_on(base, run_cli):
    result = finetune(run_cli, "whole", rounds=4, guard="rollback", guard_ess=0.7)
    assert result.code == 0, result.err
    found = records("whole")
    assert [r["round"] for r in found] == [1, 2, 3, 4]
    texts = [text for r in found for text in r["guard"]]
    assert any("is rolled back" in text for text in texts) and any("τ 20 → 10" in text for text in texts)
    assert found[-1]["tau"] < 20 and found[-1]["alpha"] > 0
    assert all(r["diversity_share"] >= 0.85 and r["w2_coupled"] < 1.4 for r in found)
    for text in texts:
        assert f"guard: {text}" in result.out
    part = finetune(run_cli, "part", rounds=2, guard="rollback", guard_ess=0.7)
    assert part.code == 0
    resumed = run_cli("finetune", "--resume", "part", "--rounds", 4)
    assert resumed.code == 0, resumed.err
    timeless = [{k: v for k, v in r.items() if "second" not in k and "per_s" not in k} for r in found]
    again = [{k: v for k, v in r.items() if "second" not in k and "per_s" not in k} for r in records("part")]
    assert timeless == again
    ends = [
        checkpoint.load(retention.steps(Path(p) / "checkpoints")[0]).tensors["model"]
        for p in ("whole", "part")
    ]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_round_that_is_not_finite_is_taken_back_to_the_last_good_checkpoint(base, run_cli, monkeypatch):
    """Weights are poisoned once, in round 3; the run ends as if it had gone on with half of τ from round 2."""
    one_round = Trainer.one_round
    poisoned = []

    def poison(self):
        if self.round == 2 and not poisoned:
            poisoned.append(True)
            with torch.no_grad():
                next(iter(self.policy.network.parameters())).view(-1)[0] = math.nan
        return one_round(self)

    monkeypatch.setattr(Trainer, "one_round", poison)
    result = finetune(run_cli, "run", rounds=3, alpha=1.0, tau=0.5, guard="rollback")
    assert result.code == 0, result.err
    found = records("run")
    assert [r["round"] for r in found] == [1, 2, 3] and found[1]["guard"] == []
    assert found[2]["guard"] == [
        "the loss is not finite; lower --lr or raise --alpha",
        "round 3 is rolled back to the end of round 2",
        "continues with τ 0.5 → 0.25",
    ]
    assert found[2]["tau"] == 0.25 and math.isfinite(found[2]["loss_fm"])


@pytest.mark.parametrize("lora", [0, 4])
def test_taken_back_to_the_start_the_policy_is_its_reference_and_trains_as_at_first(two_gaussians, lora):
    settings = Finetune(**COLLAPSE | {"lora": lora, "steps_per_round": 5})
    loop = build_trainer(two_gaussians, right, settings)
    first = loop.one_round()
    assert first["w2_coupled"] > 0
    loop.reset()
    probe = loop.find(Probe)
    assert torch.equal(sample(loop.policy, probe.noise, settings, 64), probe.of_reference)
    again = loop.one_round()
    assert {k: again[k] for k in ("loss_fm", "loss_w2", "w2_coupled", "ess")} == {
        k: first[k] for k in ("loss_fm", "loss_w2", "w2_coupled", "ess")
    }


def test_it_gives_up_after_a_number_of_rollbacks_and_says_what_it_tried(base, run_cli):
    result = finetune(
        run_cli,
        "run",
        "--quiet",
        rounds=2,
        steps_per_round=2,
        guard="rollback",
        guard_diversity=9,
        guard_ess=0,
    )
    assert result.code == 1 and "stopped, no round was good yet" in result.err
    (last,) = records("run")
    assert sum("continues with α" in text for text in last["guard"]) == MAX_ROLLBACKS


def test_linear_weights_have_no_tau_to_halve(base, run_cli):
    result = finetune(run_cli, "run", rounds=1, weights="linear", tau=None, guard="rollback", guard_ess=0.9, guard_w2=9,
                      guard_diversity=0)  # fmt: skip
    assert result.code == 0, result.err
    (only,) = records("run")
    assert len(only["guard"]) == 1 and "ESS" in only["guard"][0] and only["tau"] == 0.5


def test_a_damaged_control_in_state_json_is_refused():
    for bad in ({"alpha": -1, "tau": 1, "micro_batch": 1, "chunk": 1}, {"alpha": 1}, [], "x",
                {"alpha": math.nan, "tau": 1, "micro_batch": 1, "chunk": 1},
                {"alpha": 1, "tau": 1, "micro_batch": 1, "chunk": 1, "reward_batch": -1},
                {"alpha": 1, "tau": 1, "micro_batch": 0, "chunk": 1}):  # fmt: skip
        with pytest.raises(UserError, match=r"state\.json: control"):
            read_values(bad, Finetune(), "here")
