"""A killed and resumed run ends bit for bit as one that never was; the harness is kill_resume.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "kill_resume.py"
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "kill-resume.json"


def harness(folder: Path, *more: str) -> tuple[dict, str]:
    out = folder / "result.json"
    command = [sys.executable, HARNESS, "--folder", folder / "runs", "--out", out, *more]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.exists(), ended.stdout + ended.stderr
    return json.loads(out.read_text()), ended.stdout


@pytest.mark.slow
def test_runs_of_three_kinds_survive_kill_9(cache, tmp_path):
    found, said = harness(tmp_path)
    assert found["trials"] == found["equal"] == 3 and found["kills"] >= 3, said


@pytest.mark.soak
def test_200_of_200_runs_survive_kill_9(cache, tmp_path):
    found, said = harness(tmp_path, "--all")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    assert found["trials"] == found["equal"] == 200, said
    assert found["killed_in"].keys() >= {"rollout", "step", "checkpoint", "evaluation"}


def test_the_committed_result_is_200_of_200():
    found = json.loads(RESULT.read_text())
    assert found["trials"] == found["equal"] == sum(found["by_kind"].values()) == 200
    assert found["kills"] >= 200 and not found["failures"]
