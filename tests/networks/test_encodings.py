"""Encodings of prompts are read from the cache when they are used."""

import os
import subprocess
import sys

import pytest
import torch

from orwcfm_fast.errors import WorkError
from orwcfm_fast.networks.flow import encodings
from orwcfm_fast.networks.flow.call import Condition

PROMPTS = [{"prompt": str(k)} for k in range(encodings.OPEN + 8)]


def encode(inputs):
    for each in inputs:
        value = float(each["prompt"])
        yield Condition(each, [(torch.full((2, 3), value), torch.tensor([1], dtype=torch.uint8))])


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("ORWCFM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pipeline").mkdir()
    return encodings.encoded(tmp_path / "pipeline", {}, PROMPTS, encode)


def test_every_row_has_the_encodings_of_its_prompt_in_any_order(cached):
    for row in [*range(len(PROMPTS)), 0, len(PROMPTS) - 1, 3]:
        assert cached[row].inputs == PROMPTS[row]
        assert torch.equal(cached[row].encodings[0][0], torch.full((2, 3), float(row)))
    with pytest.raises(IndexError):
        cached[len(PROMPTS)]


def test_a_rounds_files_are_read_ahead_once_each(cached, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *how: asked.append((os.fstat(fd).st_ino, how)))
    cached.read_ahead([5, 2, 5, 5])
    wanted = [cached._files[row].stat().st_ino for row in (5, 2)]
    assert asked == [(n, (0, 0, os.POSIX_FADV_WILLNEED)) for n in wanted]


def test_a_file_that_is_gone_is_named(cached):
    cached._files[7].unlink()
    with pytest.raises(WorkError, match=f"{cached._files[7].name}: gone or damaged"):
        cached[7]


PEAK = """
import sys, torch
from pathlib import Path
from orwcfm_fast.networks.flow import encodings
from orwcfm_fast.networks.flow.call import Condition

def status(key):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024

def encode(inputs):
    for each in inputs:
        yield Condition(each, [(torch.full((1 << 18,), 1.0), torch.zeros(1))])  # 1 MiB

torch.set_num_threads(1)
Path("pipeline").mkdir()
found = {}
for n in (encodings.OPEN, 5 * encodings.OPEN):
    prompts = [{"prompt": str(k)} for k in range(n)]
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    cached = encodings.encoded(Path("pipeline"), {}, prompts, encode)
    for _ in range(2):
        assert sum(float(cached[k].encodings[0][0].sum()) for k in range(n)) == n << 18
    found[n] = status("VmHWM")
few, many = found.values()
print(many - few)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_number_of_prompts(tmp_path):
    """128 more prompts of 1 MiB, encoded and then used twice over."""
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    environment = os.environ | {"ORWCFM_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, script]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 16, "MiB"
