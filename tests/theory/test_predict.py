"""`orwcfm predict`: the forecast, the exact answer, and a run laid beside them."""

import json
from pathlib import Path

import pytest

from orwcfm_fast.errors import UserError
from orwcfm_fast.theory.density import on_grid
from orwcfm_fast.theory.prediction import forecast_line, known_density, limit_note, reached_line

SMALL = ("-n", 200, "--rounds", 2, "--nfe", 6)


def test_exact_needs_no_model_and_gives_the_recursion(run_cli):
    found = json.loads(
        run_cli("predict", "--exact", "--data", "two-gaussians", "--alpha", 1, "--rounds", 2, "--json").out
    )
    assert [round(r["reward"], 3) for r in found[0]["rounds"]] == [0.5, 0.561, 0.590]
    assert found[0]["error"]["reward"] < 1e-3
    shown = run_cli("predict", "--exact", "--data", "two-gaussians", "--alpha", 0, "--rounds", 1).out
    assert "0.622" in shown and "paper's D" in shown


def test_forecast_of_a_model_is_a_table_and_a_picture(run_cli, tiny_run):
    result = run_cli("predict", "base", *SMALL, "--alpha", 0, "--alpha", 1, "--tau", 0.5, "--tau", 2)
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == "model: base; reward right" and result.out.count("\n0 ") == 2
    with open("forecast.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    found = json.loads(run_cli("predict", "base", *SMALL, "--alpha", 0, "--alpha", 1, "--json").out)
    rewards = [f["rounds"][-1]["reward"] for f in found]
    assert rewards[0] > rewards[1] > found[0]["rounds"][0]["reward"]


def test_a_wish_is_answered_with_an_interval_or_refused(run_cli, tiny_run):
    start = json.loads(run_cli("predict", "base", *SMALL, "--json").out)[0]["rounds"][0]["reward"]
    answer = run_cli("predict", "base", *SMALL, "--want-reward", start + 0.07)
    assert answer.code == 0 and "α between" in answer.out, answer.err
    refused = run_cli("predict", "base", *SMALL, "--want-reward", 0.999)
    assert refused.code == 2 and "beyond reach" in refused.err


def test_versus_lays_a_run_beside_forecast_and_exact_answer(run_cli, tiny_run, monkeypatch):
    monkeypatch.setattr("orwcfm_fast.theory.prediction.REFITTED", 20_000)
    found = json.loads(run_cli("predict", "--versus", "run", "-n", 200, "--json").out)
    assert len(found["reached"]) == len(found["forecast"]) == len(found["exact"]) == 3
    measured = json.loads(Path("run/summary.json").read_text())["after"]["w2_coupled"]["mean"]
    assert found["verdict"].startswith("forecast 0.") and found["verdict"].endswith(f"reached {measured:.2f}")
    assert "exact" in run_cli("predict", "--versus", "run", "-n", 200).out
    refused = run_cli("predict", "--versus", "base")
    assert refused.code == 2 and "not a finished run" in refused.err


def test_finetune_forecasts_itself_from_its_first_round(run_cli, tiny_run):
    found = json.loads((tiny_run / "forecast.json").read_text())
    assert found["rounds"] == 2 and len(found["own"]["rewards"]) == 3 and found["lower_alpha"]["alpha"] == 0.3


def test_the_closing_line_compares_and_offers_a_lower_alpha():
    own = {
        "alpha": 1,
        "within_reach": True,
        "rewards": [0.5, 0.61],
        "reward_error": 0.01,
        "w2_coupled": 1.2,
        "w2_least": 0.9,
        "doubt": "",
        "ess": 300,
    }
    lower = own | {"alpha": 0.3, "rewards": [0.5, 0.78]}
    found = {"rounds": 8, "own": own, "lower_alpha": lower}
    assert reached_line(found, 0.6, 8) == "forecast 0.61, reached 0.60; α=0.3 would reach about 0.78"
    assert "forecast 0.61 after 8 rounds, reached 0.60 after 40;" in reached_line(found, 0.6, 40)
    assert forecast_line(found).endswith("0.610 ± 0.020 after 8 rounds, coupled W2 0.9 to 1.2")
    assert "few samples" in forecast_line(
        found | {"own": own | {"within_reach": False, "doubt": "few samples"}}
    )


def test_a_run_is_measured_against_the_limit_line():
    limit = {"reward": [0.5, 0.6, 0.7], "w2": [0.0, 1.0, 2.0], "w2_low": [0.0, 0.8, 1.6]}
    assert "1.20 to 1.50 times the least" in limit_note({"limit": limit}, 0.1, 1.2)
    assert limit_note({"limit": limit}, -0.1, 1.2) == "" == limit_note({"limit": None}, 0.1, 1.2)


@pytest.mark.parametrize("data", ["two-gaussians", "8gaussians", "moons", "checkerboard"])
def test_known_densities_are_those_of_the_data(data):
    """Mean and standard deviation of each coordinate, on the grid and in the 50,000 samples."""
    from orwcfm_fast.data.datasets import load_data

    x, _ = load_data(data)
    grid, values = on_grid(known_density(data), None, None, halved=False)
    mass = (values * grid.cell)[:, None]
    mean = (mass * grid.points).sum(0)
    std = (mass * (grid.points - mean) ** 2).sum(0).sqrt()
    assert mean.tolist() == pytest.approx(x.mean(0).tolist(), abs=0.03)
    assert std.tolist() == pytest.approx(x.std(0).tolist(), rel=0.02)


def test_digits_have_no_exact_answer():
    with pytest.raises(UserError, match="two-gaussians"):
        known_density("digits")
