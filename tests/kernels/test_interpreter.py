"""Runs the tests marked interpreter in a process of their own: triton reads TRITON_INTERPRET at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run in this process already")
@pytest.mark.parametrize(
    "selected",
    [
        "interpreter and not slow and not soak",
        pytest.param("interpreter and slow", marks=pytest.mark.slow),
        pytest.param("interpreter and soak", marks=pytest.mark.soak),
    ],
)
def test_kernels_pass_in_the_interpreter(selected):
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        selected,
        "-p",
        "no:cacheprovider",
        Path(__file__).parent,
    ]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
