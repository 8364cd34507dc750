"""Each example of CONTRIBUTING.md adds what it says, as one new file, to the command line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
RECIPE = re.compile(r"```python\n# (orwcfm_fast/\S+)\n(.*?)```\n\n```sh\n(.*?)```", re.S)
RECIPES = RECIPE.findall(TEXT)
CHEAP = {
    "finetune": "--rounds 1 --rollout 32 --batch 16 --steps-per-round 2 --eval-n 32 --probe 8 --nfe 4",
    "pretrain": "--steps 20 --batch 16",
    "sample": "-n 4",
}
RUN_LINES = """
import shlex, sys
from typer.testing import CliRunner
from orwcfm_fast.cli import load_app
for line in sys.stdin:
    result = CliRunner().invoke(load_app(), shlex.split(line))
    print(result.output)
    assert result.exit_code == 0, (line, result.output)
"""


def test_examples_are_complete_files_of_under_25_lines():
    folders = {Path(path).parent.as_posix() for path, _, _ in RECIPES}
    assert folders == {
        "orwcfm_fast/rewards", "orwcfm_fast/method/samplers", "orwcfm_fast/data", "orwcfm_fast/method/objectives"
    }  # fmt: skip
    for path, source, _ in RECIPES:
        compile(source, path, "exec")
        assert len(source.splitlines()) < 25, path
        assert not (ROOT / path).exists(), f"{path} would be replaced"


@pytest.mark.slow
def test_each_example_dropped_into_a_copy_of_the_package_is_used_by_name(tmp_path, stand_ins):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "orwcfm_fast", copy / "orwcfm_fast")
    for folder in ("kernels", "cli", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / "orwcfm_fast" / folder)
    lines = []
    for path, source, commands in RECIPES:
        (copy / path).write_text(source)
        for words in map(str.split, commands.splitlines()):
            lines += [f"{' '.join(words[1:])} {CHEAP[words[1]]}"]
    ended = subprocess.run(
        [sys.executable, "-c", RUN_LINES],
        input="\n".join(["list", *lines]),
        env=os.environ | {"PYTHONPATH": str(copy)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    for _, source, _ in RECIPES:
        name, summary = re.search(r'@\w+\("([\w-]+)".*?"""(.*?)"""', source, re.S).groups()
        assert re.search(rf"^  {name} +{re.escape(summary)}", ended.stdout, re.M), ended.stdout
    assert "reward contrast (95 %" in ended.stdout, "the run measured the new reward"
