"""A sweep runs its grid, goes on where it stopped, and shows what came out beside the forecast."""

import csv
import json
import os
import subprocess
import sys
import time
import weakref
from itertools import pairwise
from pathlib import Path

import pytest

from orwcfm_fast.errors import UserError
from orwcfm_fast.runs.finetune_run import Finetuning
from orwcfm_fast.runs.run import Run
from orwcfm_fast.runs.sweep_grid import grid, widened
from orwcfm_fast.settings import Sweep

ORWCFM = Path(sys.executable).with_name("orwcfm")
SMALL = ("--rounds", 1, "--rollout", 32, "--batch", 16, "--steps-per-round", 2, "--eval-n", 32, "--probe", 8)


def rows(path: Path) -> list[dict[str, str]]:
    with (path / "fronts.csv").open() as file:
        return [*csv.DictReader(file)]


def test_grid_is_every_combination_under_names_that_say_it():
    runs = grid(Sweep(alpha=[0.0, 1.0], tau=[0.5, 2.0], set=["lr=1e-3,3e-4", "coupling=independent,ot"]))
    assert len(runs) == 16
    one = runs["a1-t2-lr=0.0003-coupling=ot"]
    assert (one.alpha, one.tau, one.lr, one.coupling) == (1.0, 2.0, 3e-4, "ot")
    assert (
        grid(Sweep(alpha=[1.0], set=["steps-per-round=8"]))["a1-t0.5-steps-per-round=8"].steps_per_round == 8
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set": ["lr"]}, "write KEY=V1,V2"),
        ({"set": ["lr=1e-3,"]}, "write KEY=V1,V2"),
        ({"set": ["learning=1"]}, "unknown setting 'learning'"),
        ({"set": ["alpha=1,2"]}, "give --alpha for each value"),
        ({"set": ["data=moons"]}, "the same for all runs"),
        ({"set": ["lr=1", "lr=2"]}, "name every setting once"),
        ({"set": ["lr=fast"]}, "lr = 'fast'"),
        ({"set": ["batch=1.5"]}, "batch = 1.5"),
        ({"alpha": [-1.0]}, r"alpha = -1.0"),
        ({"alpha": []}, "at least one --alpha"),
    ],
    ids=str,
)
def test_a_wrong_grid_is_one_clear_line_before_any_work(change, message):
    with pytest.raises(UserError, match=message) as error:
        grid(Sweep(**change))
    assert "\n" not in str(error.value)


def test_a_sweep_towards_one_w2_trains_one_run_for_each_temperature():
    assert [*grid(Sweep(target_w2=1.5, tau=[0.5, 1.0]))] == ["w1.5-t0.5", "w1.5-t1"]
    assert [*grid(Sweep(set=["target-w2=1.0,2.0"]))] == ["w1-t0.5-target-w2=1", "w2-t0.5-target-w2=2"]


def test_no_alpha_is_added_to_a_sweep_towards_one_w2(tmp_path):
    Run(tmp_path).write_config("sweep", Sweep(target_w2=1.5))
    assert widened(tmp_path, {"tau": [2.0]}).tau == [0.5, 2.0]
    with pytest.raises(UserError, match="--alpha has no effect"):
        widened(tmp_path, {"alpha": [3.0]})


def test_sweep_keeps_what_is_done_goes_on_and_widens(run_cli, tiny_run, monkeypatch):
    """The second of two runs is interrupted in its last round; the same command ends it, the first stays as it was."""
    from orwcfm_fast.runs import sweep as module
    from orwcfm_fast.runs.finetune_run import Finetuning

    begun = []
    loads = []
    train, load = Finetuning.train, module.Loader.load

    def interrupted(self, *rest):
        begun.append(self.run.path.name)
        if self.run.path.name == "a1-t0.5" and len(begun) == 2:
            next(self.trainer.train(1))
            self.checkpoints.save(None)
            raise KeyboardInterrupt
        return train(self, *rest)

    def counted(self, spec=""):
        loads.append(spec)
        return load(self, spec)

    monkeypatch.setattr(Finetuning, "train", interrupted)
    monkeypatch.setattr(module.Loader, "load", counted)
    command = (
        "sweep",
        "--checkpoint",
        "base",
        "--alpha",
        0,
        "--alpha",
        1,
        "--out",
        "s",
        *SMALL,
        "--rounds",
        2,
    )
    stopped = run_cli(*command)
    assert stopped.code == 130 and "orwcfm sweep --out s goes on" in stopped.err
    assert loads == ["base"]
    first = Path("s/a0-t0.5/summary.json").read_text()
    assert len(rows(Path("s"))) == 2 and Path("s/report.html").is_file()

    ended = run_cli(*command)
    assert ended.code == 0 and "done before: a0-t0.5" in ended.out, ended.err
    assert begun == ["a0-t0.5", "a1-t0.5", "a1-t0.5"]
    assert Path("s/a0-t0.5/summary.json").read_text() == first
    assert [
        r["round"] for r in map(json.loads, Path("s/a1-t0.5/metrics.jsonl").read_text().splitlines())
    ] == [2]

    found = rows(Path("s"))
    assert [r["run"] for r in found] == ["reference", "a0-t0.5", "a1-t0.5"]
    after = json.loads(first)["after"]
    assert float(found[1]["reward"]) == after["reward"]["mean"]
    assert float(found[1]["diversity_low"]) == after["diversity"]["low"]
    assert float(found[1]["forecast_reward"]) > float(found[2]["forecast_reward"])
    assert Path("s/fronts.png").read_bytes().startswith(b"\x89PNG")
    page = Path("s/report.html").read_text("utf-8")
    assert page.count('<figure class="chart">') == 5 and "τ=0.5, forecast" in page

    more = run_cli("sweep", "--out", "s", "--alpha", 3, "--quiet")
    assert more.code == 0 and begun[3:] == ["a3-t0.5"], more.err
    assert [r["alpha"] for r in rows(Path("s"))[1:]] == ["0.0", "1.0", "3.0"]
    assert widened(Path("s"), {"graph": "on"}).graph == "on", "of the machine, as --device is"
    other = run_cli("sweep", "--out", "s", "--rounds", 5)
    assert other.code == 2 and "has --rounds 2, not 5" in other.err and other.err.count("\n") == 1
    taken = run_cli("sweep", "--out", "run", "--checkpoint", "base", *SMALL)
    assert taken.code == 2 and "exists and is not empty" in taken.err


def test_a_run_that_fails_leaves_the_others_whole_and_their_memory_free(run_cli, tiny_run, monkeypatch):
    """A learning rate that makes the loss infinite ends its own run alone."""
    begun = []

    def begin(settings, loaded, path, begin=Finetuning.begin):
        assert all(task() is None for task in begun), "what another run held is given back"
        task = begin(settings, loaded, path)
        begun.append(weakref.ref(task.trainer))
        return task

    monkeypatch.setattr(Finetuning, "begin", begin)
    result = run_cli(
        "sweep", "--checkpoint", "base", "--alpha", 1, "--set", "lr=1e30,1e-3", "--out", "s", *SMALL
    )
    assert result.code == 1 and "1 of 2 runs failed, first a1-t0.5-lr=1e+30" in result.err
    assert result.err.count("\n") == 1
    assert [r["run"] for r in rows(Path("s"))] == ["reference", "a1-t0.5-lr=0.001"] and len(begun) == 2


def test_a_sweep_that_comes_to_nothing_leaves_nothing_and_puts_back_what_it_replaced(run_cli, tiny_run):
    Path("bad.py").write_text("def score(x):\n    return x.sum()\n")
    before = Path("run/summary.json").read_text()
    command = ("sweep", "--checkpoint", "base", "--reward", "bad.py:score", "--alpha", 1, *SMALL)
    for out, flags in (("s", ()), ("run", ("--overwrite",))):
        result = run_cli(*command, "--out", out, *flags)
        assert result.code == 1 and "returned shape ()" in result.err and result.err.count("\n") == 1
    assert not Path("s").exists() and Path("run/summary.json").read_text() == before


@pytest.mark.soak
def test_default_sweep_within_12_minutes_reward_falls_and_diversity_rises_with_alpha(tmp_path):
    """As typed, with nothing cached, on two cores; neighbours may tie within their intervals."""
    began = time.perf_counter()
    environment = os.environ | {"ORWCFM_CACHE": str(tmp_path / "cache")}
    subprocess.run([ORWCFM, "sweep", "--out", "s", "--quiet"], cwd=tmp_path, env=environment, check=True)
    assert time.perf_counter() - began < 12 * 60
    kept = (
        "alpha",
        *(f"{k}_{end}" for k in ("reward", "w2_coupled", "diversity") for end in ("low", "high")),
    )
    found = [{key: float(r[key]) for key in kept} for r in rows(tmp_path / "s")[1:]]
    assert len(found) >= 4 and sorted(r["alpha"] for r in found) == [r["alpha"] for r in found]
    for less, more in pairwise(found):
        assert more["reward_low"] <= less["reward_high"]
        assert more["diversity_high"] >= less["diversity_low"]
        assert more["w2_coupled_low"] <= less["w2_coupled_high"]
    assert found[-1]["reward_high"] < found[0]["reward_low"]
    assert found[-1]["diversity_low"] > found[0]["diversity_high"]
