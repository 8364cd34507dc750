"""A user's code runs only where the user names it: never from a run, or a config that happens to lie there."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def canary(tmp_path):
    """Code that was not named would leave a file `canary` in the working directory."""
    yield
    assert not (tmp_path / "canary").exists(), "code that was not named was run"


SINGS = "import os\nos.system('touch canary')\ndef f(x):\n    return x[:, 0]\n"


@pytest.fixture
def stranger(run_cli, tiny_run):
    """A run as one might be sent: its config names a reward that is code, and the code lies beside."""
    Path("song.py").write_text(SINGS)
    config = (tiny_run / "config.toml").read_text()
    assert '"right"' in config
    (tiny_run / "config.toml").write_text(config.replace('"right"', '"song.py:f"'))
    return tiny_run


@pytest.mark.parametrize("spec", ["song.py:f=0.5", "song:f", "right=0.5"])
def test_a_runs_code_runs_only_when_the_user_names_it_too(run_cli, stranger, spec, monkeypatch):
    monkeypatch.setattr("orwcfm_fast.theory.prediction.REFITTED", 20_000)
    config = stranger / "config.toml"
    config.write_text(config.read_text().replace('"song.py:f"', f'"{spec}"'))
    code = spec.startswith("song")
    for args in (
        ("finetune", "--resume", stranger, "--rounds", 3, "--quiet"),
        ("evaluate", stranger, "-n", 16),
        ("predict", stranger, "-n", 16, "--rounds", 1),
        ("predict", "--versus", stranger, "-n", 16),
    ):
        result = run_cli(*args)
        assert result.code == (2 if code else 0), result.out + result.err
        if code:
            assert f"is used only if you name it too: add --reward {spec}" in result.err
            assert result.err.count("\n") == 1
    assert run_cli("sample", stranger, "-n", 4).code == 0, "samples need no reward"
    assert not Path("canary").exists()
    if code:
        named = run_cli("finetune", "--resume", stranger, "--rounds", 3, "--quiet", "--reward", spec)
        assert named.code == 0, named.err
        assert Path("canary").exists(), "named, it runs"
        Path("canary").unlink()
        other = run_cli("finetune", "--resume", stranger, "--rounds", 4, "--reward", "right")
        assert other.code == 2 and "--reward cannot change" in other.err


def test_code_in_other_places_of_a_runs_config_is_held_back_too(run_cli, stranger):
    config = stranger / "config.toml"
    text = config.read_text().replace('"song.py:f"', '"right"')
    config.write_text(text.replace("holdout_reward = []", 'holdout_reward = ["song.py:f"]'))
    for args in (("finetune", "--resume", stranger, "--rounds", 3), ("evaluate", stranger, "-n", 16)):
        result = run_cli(*args)
        assert result.code == 2 and "add --holdout-reward song.py:f" in result.err
    worker = f"process:{sys.executable}:song.py:f"
    config.write_text(text.replace('"right"', f'"{worker}"'))
    result = run_cli("finetune", "--resume", stranger, "--rounds", 3)
    assert result.code == 2 and f"add --reward {worker}" in result.err
    small = (
        "--rollout",
        32,
        "--batch",
        16,
        "--steps-per-round",
        2,
        "--eval-n",
        16,
        "--probe",
        8,
        "--rounds",
        1,
    )
    assert run_cli("sweep", "--checkpoint", "base", *small, "--alpha", 1, "--quiet", "--out", "s").code == 0
    own = Path("s/config.toml")
    own.write_text(own.read_text().replace('"right"', '"song.py:f"'))
    result = run_cli("sweep", "--out", "s", "--alpha", 2)
    assert result.code == 2 and "add --reward song.py:f" in result.err
    text = own.read_text().replace('"song.py:f"', '"right"')
    own.write_text(text.replace("set = []", 'set = ["reward=song.py:f"]', 1))
    assert 'set = ["reward' in own.read_text()
    result = run_cli("sweep", "--out", "s")
    assert result.code == 2 and "add --reward song.py:f" in result.err


def test_an_interrupted_sweep_says_the_command_that_goes_on_with_its_code(run_cli, tiny_run, monkeypatch):
    from orwcfm_fast.runs.finetune_run import Finetuning

    Path("quiet.py").write_text("def f(x):\n    return x[:, 0]\n")

    def stopped(self, *rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Finetuning, "train", stopped)
        small = ("--rollout", 32, "--batch", 16, "--steps-per-round", 2, "--eval-n", 16, "--probe", 8)
        once = ("--rounds", 1, "--alpha", 1, "--reward", "quiet.py:f", "--out", "s", "--quiet")
        result = run_cli("sweep", "--checkpoint", "base", *small, *once)
    assert result.code == 130 and "orwcfm sweep --out s --reward quiet.py:f goes on" in result.err
    assert run_cli("sweep", "--out", "s", "--reward", "quiet.py:f", "--quiet").code == 0


def test_no_config_in_the_working_directory_is_ever_read_unnamed(run_cli, tiny_run):
    Path("song.py").write_text(SINGS)
    for name in ("config.toml", "orwcfm.toml", "pyproject.toml", "orwcfm_fast.toml", ".orwcfm.toml"):
        Path(name).write_text('reward = ["song.py:f"]\n')
    assert run_cli("evaluate", "base", "-n", 16, "--quiet").code == 0
    assert run_cli("list", "rewards").code == 0
    assert not Path("canary").exists()
