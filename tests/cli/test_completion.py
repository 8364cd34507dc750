"""The shell completes commands, options and values, once `orwcfm --install-completion` was typed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orwcfm_fast.cli import load_app

ORWCFM = Path(sys.executable).with_name("orwcfm")


@pytest.fixture
def complete(monkeypatch, capsys):
    """complete(words): what bash offers for the last of these words."""

    def completions(words: str) -> list[str]:
        monkeypatch.setenv("_ORWCFM_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        with pytest.raises(SystemExit):
            load_app()([])
        return capsys.readouterr().out.split()

    return completions


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("orwcfm fine", ["finetune"]),
        ("orwcfm finetune --guard-", ["--guard-ess", "--guard-w2", "--guard-velocity", "--guard-diversity"]),
        ("orwcfm finetune --weights ", ["exp", "linear", "advantage"]),
        ("orwcfm finetune --solver eul", ["euler"]),
        ("orwcfm finetune --reward even", ["even-digits"]),
        ("orwcfm evaluate --holdout-reward bright", ["brightness"]),
        ("orwcfm pretrain --data 8", ["8gaussians"]),
        ("orwcfm sample --model unet-ci", ["unet-cifar10"]),
        ("orwcfm pretrain --recipe mnist", ["mnist-even", "mnist-small"]),
        ("orwcfm list sol", ["solvers"]),
        ("orwcfm bench ", ["kernels", "loop", "race", "race-mnist"]),
    ],
)
def test_the_shell_is_offered_commands_options_and_values(complete, words, offered):
    assert complete(words) == offered


def test_completion_is_installed_for_the_shell_in_use(tmp_path):
    environment = os.environ | {"HOME": str(tmp_path)}
    made = subprocess.run(  # the shell stays the parent process, by which it is recognised
        ["bash", "--norc", "-c", f"{ORWCFM} --install-completion; exit $?"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (script,) = tmp_path.rglob("orwcfm*")
    assert str(script) in made.stdout and str(script) in (tmp_path / ".bashrc").read_text()
    asked = (
        f"source {script}; COMP_WORDS=(orwcfm swe) COMP_CWORD=1; _orwcfm_completion orwcfm; echo $COMPREPLY"
    )
    path = f"{ORWCFM.parent}:{os.environ['PATH']}"
    shell = subprocess.run(
        ["bash", "--norc", "-c", asked], env=environment | {"PATH": path}, capture_output=True, text=True
    )
    assert shell.stdout.strip() == "sweep", shell.stderr
