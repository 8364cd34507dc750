"""What users do with runs: configurations of strangers, moved and changed reward files, folders made beforehand."""

import json
from pathlib import Path

import pytest

from orwcfm_fast.settings import read_toml

SMALL = ("--checkpoint", "base", "--rounds", 2, "--rollout", 32, "--batch", 16, "--steps-per-round", 2)
SMALL += ("--eval-n", 32, "--probe", 8, "--quiet")
CODE = "from pathlib import Path\n\nPath('canary').touch()\n\n\ndef f(x):\n    return x[:, 0]\n"


@pytest.fixture
def mine(tiny_run) -> str:
    """A reward that leaves a trace where its file is imported."""
    Path("theirs").mkdir()
    Path("theirs/mine.py").write_text(CODE)
    return "theirs/mine.py:f"


@pytest.mark.parametrize(
    "command",
    [("finetune", *SMALL), ("doctor", "--plan"), ("sweep", *SMALL), ("evaluate", "base", "-n", 32),
     ("predict", "base", "-n", 64)],
    ids=lambda c: c[0],
)  # fmt: skip
@pytest.mark.parametrize("key", ["reward", "holdout_reward"])
def test_a_configuration_runs_no_code_unless_it_is_named_again(run_cli, mine, command, key):
    if command[0] == "predict" and key != "reward":
        pytest.skip("predict has no held-out rewards")
    Path("c.toml").write_text(f'{key} = ["{mine}"]\n')
    refused = run_cli(*command, "--config", "c.toml")
    assert refused.code == 2 and not Path("canary").exists()
    assert (
        f"c.toml: its {key} is code or a server, which is used only if you name it too: "
        f"add --{key.replace('_', '-')} {mine}" in refused.err
    )
    assert not Path("runs").exists()


def test_a_configuration_with_its_code_named_again_runs(run_cli, mine):
    Path("c.toml").write_text(f'reward = ["{mine}"]\n')
    made = run_cli("finetune", *SMALL, "--config", "c.toml", "--reward", mine, "--out", "o")
    assert made.code == 0 and Path("canary").exists(), made.err


def test_a_run_is_resumed_with_its_reward_by_another_path(run_cli, mine):
    assert run_cli("finetune", *SMALL, "--reward", f"{mine}=2", "--out", "o").code == 0
    absolute = f"{Path('theirs/mine.py').resolve()}:f=2"
    assert run_cli("finetune", "--resume", "o", "--reward", absolute, "--quiet").code == 0
    Path("theirs").rename("ours")
    moved = run_cli("finetune", "--resume", "o", "--reward", "ours/mine.py:f=2", "--quiet")
    assert moved.code == 0 and "warning" not in moved.err, moved.err
    for other in ("ours/mine.py:g=2", "ours/mine.py:f=3", "right"):
        refused = run_cli("finetune", "--resume", "o", "--reward", other, "--quiet")
        assert refused.code == 2 and "--reward cannot change" in refused.err


def test_a_reward_whose_code_changed_is_said_once(run_cli, mine, capfd):
    assert run_cli("finetune", *SMALL, "--reward", mine, "--out", "o").code == 0
    Path("theirs/mine.py").write_text(CODE.replace("x[:, 0]", "-x[:, 0]"))
    for said in (True, False):
        resumed = run_cli("finetune", "--resume", "o", "--reward", mine, "--quiet")
        assert resumed.code == 0, resumed.err
        assert ("its code has changed since this run began" in resumed.err + capfd.readouterr().err) == said


def test_fewer_rounds_than_done_are_refused_and_change_nothing(run_cli, tiny_run):
    before = {p: p.read_bytes() for p in tiny_run.rglob("*") if p.is_file() and p.name != ".lock"}
    refused = run_cli("finetune", "--resume", tiny_run, "--rounds", 1)
    assert refused.code == 2 and "--rounds 1: the run has done 2 already" in refused.err
    assert before == {p: p.read_bytes() for p in tiny_run.rglob("*") if p.is_file() and p.name != ".lock"}
    assert read_toml(tiny_run / "config.toml")["rounds"] == 2


@pytest.mark.parametrize("line", ["sys.exit(3)", "raise ValueError('no')"])
def test_a_reward_that_fails_at_once_leaves_what_was_there(run_cli, tiny_run, line):
    Path("bad.py").write_text(f"import sys\n\ndef f(x):\n    {line}\n")
    Path("there").mkdir()
    for out in ("there", "new"):
        failed = run_cli("finetune", *SMALL, "--reward", "bad.py:f", "--out", out)
        assert failed.code == 1 and "bad.py:f, round 1" in failed.err and failed.err.count("\n") == 1
    assert Path("there").is_dir() and not any(Path("there").iterdir()) and not Path("new").exists()


def test_a_world_size_without_a_launcher_is_nobodys_business(run_cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_cli("list", "solvers").code == 0
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    refused = run_cli("list", "solvers")
    assert refused.code == 2 and "torchrun is for finetune" in refused.err


@pytest.mark.parametrize("metric", ["reward_mean", "ess", "diversity"])
def test_the_final_policy_can_be_the_best(run_cli, tiny_run, metric):
    made = run_cli("finetune", *SMALL, "--out", "o", "--best", metric, "--keep", 4)
    assert made.code == 0, made.err
    summary = json.loads(Path("o/summary.json").read_text())
    second = json.loads(Path("o/metrics.jsonl").read_text().splitlines()[1])[
        metric
    ]  # of the policy after round 1
    after = summary["after"]
    closing = {"reward_mean": lambda: after["reward"]["mean"], "ess": lambda: 32 * after["ess_share"],
               "diversity": lambda: after["diversity"]["mean"]}[metric]()  # fmt: skip
    step = 4 if closing > second else 2
    assert summary["best"] == f"checkpoints/step_{step}"
    assert Path("o/checkpoints/best").resolve().name == f"step_{step}"
