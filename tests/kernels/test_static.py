"""Held to the byte and instruction counts without a GPU; a process of its own, never interpreted."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "orwcfm_fast.kernels.static", "--json"]
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def test_every_kernel_is_compiled_for_every_target(rows):
    kernels = {(row["kernel"], row["target"]) for row in rows}
    names = ("interpolate", "anchored_residual", "sum_chunks")
    assert kernels == {(name, f"sm_{target}") for name in names for target in (80, 90, 100)}


def test_no_spills_and_no_local_memory(rows):
    assert [row for row in rows if row["stack"] or row["local"]] == []


def test_accesses_are_16_bytes_wide_for_aligned_samples(rows):
    aligned = [
        row for row in rows if row["case"] in ("bf16", "fp16", "fp32", "bf16, x1 fp32", "bf16, masked")
    ]
    assert len(aligned) >= 27
    assert [row for row in aligned if row["narrowest"] not in (16, None)] == []


@pytest.mark.parametrize(
    ("kernel", "case", "floor"),
    [
        ("interpolate", "bf16", 4),
        ("interpolate", "fp16", 4),
        ("interpolate", "fp32", 8),
        ("anchored_residual", "bf16", 8),
        ("anchored_residual", "fp16", 8),
        ("anchored_residual", "bf16, x1 fp32", 10),
        ("anchored_residual", "fp32", 16),
    ],
)
def test_moves_no_more_bytes_than_the_one_pass_floor(rows, kernel, case, floor):
    moved = [row["bytes_per_element"] for row in rows if (row["kernel"], row["case"]) == (kernel, case)]
    assert moved == [floor] * 3


def test_noise_fits_beside_the_memory_traffic(rows):
    counts = {
        (row["kernel"], row["target"]): row["instructions_per_element"]
        for row in rows
        if row["case"] == "bf16"
    }
    assert counts["anchored_residual", "sm_90"] <= 70
    assert counts["interpolate", "sm_90"] <= 50
