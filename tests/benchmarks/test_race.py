"""The race: what is read off a run, and that everybody starts and is tried alike."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from orwcfm_fast.benchmarks import entrants, race, race_report
from orwcfm_fast.benchmarks.entrants import COMMON, TRIALS, Look, Looks
from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Finetune

CPU = torch.device("cpu")


def looks(*points):
    """Looks from (seconds, reward, W2, diversity)."""
    return [Look(s, int(10 * s), r, w2, d, 0.96) for s, r, w2, d in points]


RUN = looks(
    (0, 0.5, 0, 50),
    (1, 0.66, 1, 49),
    (2, 0.6, 1.5, 48),
    (4, 0.7, 2, 46),
    (5, 0.8, 2.2, 45),
    (6, 0.9, 2.5, 44),
)


def test_a_reward_is_reached_at_the_first_of_three_looks_in_a_row():
    assert entrants.seconds_to(RUN, 0.65) == 4  # not at the single look after one second
    assert entrants.seconds_to(RUN, 0.8) is None  # two looks are not three


def test_rewards_at_equal_seconds_drift_and_diversity_lie_on_lines_between_looks():
    assert entrants.reward_after(RUN, 3) == pytest.approx(0.65)
    assert entrants.reward_after(RUN, 60) == 0.9
    assert entrants.reward_at_w2(RUN, 0.5) == pytest.approx(0.58)
    assert entrants.reward_at_w2(RUN, 9) == 0.9  # never that far
    assert entrants.reward_at_diversity(RUN, 0.94) == pytest.approx(0.65)
    assert entrants.mean_reward(looks((0, 0.4, 0, 1), (3, 0.8, 0, 1)), 4) == pytest.approx(0.5)


def test_a_run_that_breaks_off_has_no_reward_from_there_on():
    clock = Looks.__new__(Looks)
    clock.seen, clock.running = [*RUN], 7.0
    clock.broke_off("not finite")
    assert entrants.reward_after(clock.seen, 60) == 0
    assert entrants.reward_at_w2(clock.seen, 9) == entrants.reward_at_diversity(clock.seen, 0.5) == 0
    assert entrants.mean_reward(clock.seen, 14) < entrants.mean_reward(RUN, 14) / 1.9


def test_every_method_and_the_plain_loop_have_equally_many_trials_that_their_settings_allow():
    assert {entrants.method_of(name) for name in TRIALS} == {*METHODS.names(), "plain"}
    for name, trials in TRIALS.items():
        assert len({repr(trial) for trial in trials}) == len(trials) == 12
        for trial in trials if name != "plain" else ():
            Finetune(**COMMON | {"method": entrants.method_of(name)} | trial)
    assert not {*race.TUNED_ON} & {*race.RUN_ON}


def test_drift_is_read_at_the_common_limit_and_seconds_from_the_whole_run():
    patient = [*RUN, *looks((20, 0.95, 4, 30))]
    found = race.measures([patient, RUN], limit=6)
    assert found["w2"] == [2.5, 0] and found["reward_after"].keys() == {"3"}
    assert found["seconds_to"] == {"0.65": 4, "0.8": None}, "only one of two has three looks at 0.8"
    assert race.measures([patient], limit=6)["seconds_to"]["0.8"] == 5
    assert found["diversity"][0] == pytest.approx(44 / 50)


def test_seconds_stand_with_their_range_and_a_run_that_broke_off_with_its_reason():
    slower = [*looks((0, 0.5, 0, 50)), *looks((9, 0.9, 3, 40), (10, 0.9, 3, 40), (11, 0.9, 3, 40))]
    clock = Looks.__new__(Looks)
    clock.seen, clock.running = [*RUN], 7.0
    clock.broke_off("its samples are not finite")
    row = {
        "name": "raft",
        "goal": "soon",
        "trial": {"lr": 0.1},
        **race.measures([slower, clock.seen], limit=11),
    }
    row["runs"] = [[asdict(look) for look in one] for one in (slower, clock.seen)]
    assert race_report.cells(row)[1:3] == ["6.5 (4 to 9)", "– (9 to –)"]
    assert race_report.settings_of(row) == "raft: lr 0.1; broke off: its samples are not finite"


def test_settings_of_the_short_form_are_those_that_the_full_one_chose():
    kept = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("race-digits-*.json"))
    assert json.loads(kept[-1].read_text("utf-8"))["chosen"] == race.CHOSEN


def test_mnist_is_raced_in_the_short_form_alone(run_cli):
    refused = run_cli("bench", "race-mnist", "--full")
    assert refused.code == 2 and "no effect on race-mnist" in refused.err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRIALS))
def test_an_entrant_starts_from_the_same_samples_and_runs_to_the_limit(name, digits_model):
    base = Loader(CPU, "fp32").default().policy
    ticks = iter(range(1000))
    found = entrants.run(
        name, base, TRIALS[name][0], 0,
        lambda policy: Looks(policy, base, 0, limit=3, growth=1.0, clock=lambda: next(ticks), held_out=16),
    )  # fmt: skip
    again = Looks(base, base, 0, 3, 1.0, lambda: 0.0, held_out=16).seen[0]
    assert found[0] == again and again.w2 == 0
    assert [look.steps for look in found] == [0, 1, 2, 3]
    assert all(look.w2 > 0 for look in found[1:]), "the entrant did not move"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raft", "plain"])
def test_an_entrant_whose_samples_are_no_numbers_has_no_reward_from_there_on(name, digits_model):
    ticks = iter(range(1000))
    found = entrants.run(
        name, digits_model, TRIALS[name][0] | {"lr": 1e30}, 0,
        lambda policy: Looks(policy, digits_model, 0, limit=60, growth=1.0, clock=lambda: next(ticks), held_out=16),
    )  # fmt: skip
    assert found[-1].reward == 0 and found[-1].broke_off and not found[0].broke_off


@pytest.mark.slow
def test_the_full_race_chooses_on_tuning_seeds_and_prints_whoever_wins_first(
    monkeypatch, run_cli, digits_model
):
    monkeypatch.setattr(race, "TUNING_SECONDS", 0.05)
    monkeypatch.setattr(race, "SECONDS", 0.05)
    monkeypatch.setattr(race, "TRIALS", {name: TRIALS[name][:2] for name in ("raft", "plain")})
    base = Loader(CPU, "fp32").default().policy
    found = race.race(full=True, held_out=16, base=base)
    assert len(found["trials"]) == 4
    for row in found["rows"]:
        assert row["trial"] == found["chosen"][row["name"]][row["goal"]] and len(row["runs"]) == 3
        best = max((t for t in found["trials"] if t["name"] == row["name"]), key=lambda t: t[row["goal"]])
        assert best["trial"] == row["trial"]
    winners = race_report.ranked(found, "near")
    assert winners[0]["reward_at_w2"]["1.5"][0] >= winners[-1]["reward_at_w2"]["1.5"][0]

    monkeypatch.setattr(race, "race", lambda full, *more: found if full else None)
    shown = run_cli("bench", "race", "--full", "--out", "kept")
    assert shown.code == 0 and shown.out.index(winners[0]["name"]) > shown.out.index("chosen for reward soon")
    (kept,) = Path("kept").glob("race-*.json")
    assert json.loads(kept.read_text()) == found and kept.with_suffix(".png").exists()


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_process(digits_model):
    jobs = [race.Job("raft", TRIALS["raft"][0], seed, 1e-6, 1.3, "cpu", "digits", 16) for seed in (0, 1)]
    told = []
    (first, _), (second, _) = race.run_all(jobs, None, told.append)
    assert first.reward != second.reward and told == ["1 of 2: raft", "2 of 2: raft"]
    own = Looks(digits_model, digits_model, 0, 1, 1.0, lambda: 0.0, held_out=16).seen[0]
    assert first.reward == pytest.approx(own.reward, abs=1e-4)
