"""The command that a finished run offers next is one that runs."""

import re
import shlex
from pathlib import Path

from orwcfm_fast.runs.run import read_command

SMALL = shlex.split(
    "--rollout 32 --chunk 32 --batch 16 --steps-per-round 2 --nfe 4 --probe 8 --rounds 1 --eval-n 32"
)


def test_it_is_the_same_run_with_a_smaller_alpha(base, run_cli):
    Path("mine.py").write_text("def right(x):\n    return x[:, 0]\n")
    made = run_cli("finetune", "--checkpoint", "base", "--reward", "mine.py:right", "--out", "one", *SMALL)
    (command,) = re.findall(r"· orwcfm (finetune .*) \(more reward, more drift\)", made.out)
    assert "--reward mine.py:right" in command
    again = run_cli(*shlex.split(command), "--out", "two")
    assert again.code == 0, again.err
    one, two = (Path(run, "config.toml").read_text().splitlines() for run in ("one", "two"))
    assert [(a, b) for a, b in zip(one, two, strict=True) if a != b] == [("alpha = 1.0", "alpha = 0.3")]
    assert read_command(Path("two")) == "finetune"


def test_a_method_without_alpha_offers_none(base, run_cli):
    made = run_cli("finetune", "--checkpoint", "base", "--method", "ram", "--out", "one", *SMALL)
    assert made.code == 0 and "more drift" not in made.out
