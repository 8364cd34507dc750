"""A pipeline with prompts on two ranks does what it does on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIZES = dict(image_size=8, prompt_tokens=6, lora=2, solver="euler", grid="own", nfe=3)
LOOP = SIZES | dict(
    rollout=15, chunk=8, vae_chunk=8, batch=9, steps_per_round=3, probe=5, rounds=3, lr=1e-2, warmup=0
)
REWARD = """
import os

def score(images, prompts, metadata):
    with open(f"told_{os.environ.get('RANK', 0)}", "a") as file:
        print(*prompts, sep="\\n", file=file)
    dark = [bool(m.get("dark")) for m in metadata]
    return images.flatten(1).mean(1) + images.new_tensor([0.1 * len(p) - d for p, d in zip(prompts, dark)])
"""


@pytest.fixture
def settings(pipeline_folder, prompts_file, run_cli):
    """Of a tiny SD3 pipeline on three prompts, in groups of three; the first rank's share, 8 of 15, ends within one."""
    Path("reward.py").write_text(REWARD)
    own = {"model": f"diffusers:{pipeline_folder('sd3')}", "prompts": str(prompts_file)}
    return LOOP | own | {"reward": ["reward.py:score"], "weights": "advantage", "group": 3}


def told(rank: int) -> list[str]:
    return Path(f"told_{rank}").read_text().splitlines()


def test_prompts_rewards_weights_and_samples_are_those_of_one_rank(launch, settings):
    (one,) = launch.loop(1, **settings)
    alone = told(0)
    Path("told_0").unlink()
    many = launch.loop(2, **settings)
    assert {*torch.cat(one["row"]).tolist()} == {0, 1, 2}
    both = [told(k) for k in range(2)]
    assert [len(p) for p in both] == [24, 21]
    assert [
        p for k in range(3) for n, r in zip((8, 7), both, strict=True) for p in r[n * k : n * k + n]
    ] == alone
    for rank in many:
        for k in range(3):
            assert torch.equal(rank["row"][k], one["row"][k])
            assert torch.allclose(rank["reward"][k], one["reward"][k], rtol=0, atol=1e-4)
        assert torch.equal(rank["reward"][0], one["reward"][0])
        assert torch.equal(rank["w"][0], one["w"][0])
        assert (rank["gradient"][0] - one["gradient"][0]).norm() <= 1e-5 * one["gradient"][0].norm()
        assert (rank["samples"] - one["samples"]).abs().max() <= 1e-3
        assert torch.equal(rank["parameters"], many[0]["parameters"])


@pytest.mark.slow
def test_under_torchrun_a_pipelines_run_has_the_figures_of_one_process(settings):
    flags = []
    for key, value in (settings | {"eval_n": 11, "precision": "fp32"}).items():
        flags += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    command = ["orwcfm_fast.cli", "finetune", *flags, "--quiet", "--out"]
    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for out, before in (("one", []), ("two", ranks)):
        made = subprocess.run(
            [sys.executable, "-m", *before, *command, out], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
    one, two = (json.loads(Path(out, "summary.json").read_text()) for out in ("one", "two"))
    for when in ("before", "after"):
        for key in ("reward", "w2_coupled", "w2_exact", "diversity", "vendi"):
            assert two[when][key] == pytest.approx(one[when][key], rel=1e-3, abs=1e-3), key
        for key in ("n", "velocity_gap", "pixel_std"):
            assert two[when][key] == pytest.approx(one[when][key], rel=1e-3, abs=1e-3), key
