"""Where samples are written: names of folders and files as users choose them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orwcfm_fast.errors import UserError
from orwcfm_fast.reporting.output import check_target, write_samples

IMAGES = torch.zeros(3, 1, 8, 8)


@pytest.mark.parametrize("name", ["samples-t0.5", "digits-even-digits-a1-t0.5-001", "plain", "a.0"])
def test_a_dot_in_a_folders_name_is_no_file_ending(name, tmp_path):
    check_target(tmp_path / name, overwrite=False)
    write_samples(IMAGES, tmp_path / name)
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("name", ["A.PNG", "a.Npz"])
def test_a_files_ending_may_be_in_capitals(name, tmp_path):
    check_target(tmp_path / name, overwrite=False)
    write_samples(IMAGES, tmp_path / name)
    magic = (tmp_path / name).read_bytes()[:4]
    assert magic == (b"\x89PNG" if name == "A.PNG" else b"PK\x03\x04")
    if name != "A.PNG":
        assert np.load(tmp_path / name)["samples"].shape == (3, 1, 8, 8)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "a.npy", "a.pt"])
def test_other_files_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"should end in \.png or \.npz, or be a folder"):
        check_target(tmp_path / name, overwrite=False)


def test_evaluate_prints_where_the_terminal_knows_ascii_alone(tiny_run):
    done = subprocess.run(
        [sys.executable, "-m", "orwcfm_fast.cli", "evaluate", "base", "--reward", "right", "-n", "64"],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert done.stdout.isascii() and b"?" in done.stdout and Path("base").exists()
