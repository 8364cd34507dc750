"""Whole runs of a diffusers pipeline: they learn, export, resume bit for bit, and refuse what cannot be."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.method.rollout import sample, start_conditions, start_noise
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Sample

CPU = torch.device("cpu")
EULER = ("--solver", "euler", "--grid", "own", "--nfe", 3)
SIZES = ("--image-size", 8, "--prompt-tokens", 6, "--precision", "fp32", "--lora", 4, *EULER)
LEARN = ("--reward", "brightness", "--rounds", 30, "--steps-per-round", 3, "--rollout", 64, "--batch", 64,
         "--lr", 0.003, "--warmup", 0, "--alpha", 0, "--weights", "advantage", "--group", 8, "--probe", 4,
         "--eval-n", 128, "--quiet", "--out", "run")  # fmt: skip
SHORT = ("--rounds", 3, "--steps-per-round", 3, "--rollout", 16, "--batch", 8, "--lr", 0.01, "--warmup", 0,
         "--probe", 4, "--eval-n", 8, "--quiet")  # fmt: skip
TIMED = ("seconds", "images_per_s")


@pytest.fixture
def of_pipeline(pipeline_folder, prompts_file):
    """Flags of a run of a tiny pipeline."""

    def flags(kind, calm=False):
        return ("--model", f"diffusers:{pipeline_folder(kind, calm)}", "--prompts", prompts_file, *SIZES)

    return flags


def images_of(policy, how, n):
    return policy.decode(sample(policy, start_noise(policy, n, how.seed), how, how.chunk))


def learned(kind, tau, run_cli, of_pipeline):
    made = run_cli("finetune", *of_pipeline(kind, True), *LEARN, "--tau", tau)
    assert made.code == 0, made.err
    found = json.loads(Path("run/summary.json").read_text())
    before, after = found["before"]["reward"], found["after"]["reward"]
    print(f"{kind} at τ={tau}: brightness {before} before, {after} after")
    return before, after


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_without_the_rewards_weights_brightness_does_not_rise(kind, run_cli, of_pipeline):
    before, after = learned(kind, 0.0, run_cli, of_pipeline)
    assert after["mean"] < before["high"]


@pytest.mark.parametrize("kind", ["sd3", pytest.param("flux", marks=pytest.mark.soak)])
def test_thirty_rounds_raise_brightness_and_the_export_makes_our_images(
    kind, run_cli, of_pipeline, pipeline_folder
):
    before, after = learned(kind, 1.0, run_cli, of_pipeline)
    assert after["low"] > before["high"]
    check_export(kind, pipeline_folder(kind, True), Path("run/checkpoints/step_90"))


def check_export(kind, folder, exported):
    """The pipeline itself, with the adapters of the run's checkpoint, makes the run's images; without, others."""
    import diffusers

    how = Sample(solver="euler", grid="own", nfe=3)
    policy = Loader(CPU, "fp32", how=how).load("run").policy
    ours = images_of(policy, how, 6)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    x0, guidance = start_noise(policy, 6, 0), 3.5 if kind == "flux" else 1.0  # FLUX.1-dev's own; none

    def own_images():
        return 2 * theirs(
            [p.text for p in policy.prompts_of(start_conditions(policy, 6, how))], height=8, width=8,
            num_inference_steps=3, guidance_scale=guidance, max_sequence_length=6, output_type="pt",
            latents=x0,
        ).images - 1  # fmt: skip

    untuned = own_images()
    theirs.load_lora_weights(exported)
    assert (ours - own_images()).abs().max() <= 1e-3 < (ours - untuned).abs().mean()


@pytest.mark.soak
def test_a_compiled_pipeline_runs_as_it_does_without(run_cli, of_pipeline):
    found = []
    for more in ((), ("--compile",)):
        made = run_cli(
            "finetune",
            *of_pipeline("sd3"),
            "--reward",
            "brightness",
            *SHORT,
            "--out",
            f"run{len(found)}",
            *more,
        )
        assert made.code == 0, made.err
        lines = Path(f"run{len(found)}/metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["reward_mean"] for line in lines])
    assert found[1] == pytest.approx(found[0], abs=1e-3)


REWARD = """
import os, signal
from pathlib import Path

def score(images, prompts):
    told = Path("kill_at")
    left = int(told.read_text()) if told.exists() else 0
    if told.exists():
        told.write_text(str(left - 1)) if left > 1 else told.unlink()
    if left == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return images.flatten(1).mean(1) + 0.01 * len(prompts[0])
"""


def outcome(run: Path):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in r.items() if not k.startswith(TIMED)} for r in records]
    found = checkpoint.load(run / "checkpoints" / "step_9")
    summary = json.loads((run / "summary.json").read_text())
    return records, found.tensors, summary["after"]


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_killed_run_ends_as_one_that_was_not(kind, run_cli, of_pipeline):
    Path("reward.py").write_text(REWARD)
    code = ("--reward", "reward.py:score")
    command = ("finetune", *of_pipeline(kind), *SHORT, *code)
    whole = run_cli(*command, "--out", "whole")
    assert whole.code == 0, whole.err
    Path("kill_at").write_text("3")
    alone = [sys.executable, "-m", "orwcfm_fast.cli", *map(str, command), "--out", "killed"]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run(alone, env=threads, timeout=300).returncode == -signal.SIGKILL
    assert not Path("kill_at").exists() and not Path("killed/summary.json").exists()
    prompts = next(Path().glob("prompts.jsonl"))
    prompts.write_text("another\n")  # the run has its own with it
    again = run_cli("finetune", "--resume", "killed", "--quiet", *code)
    assert again.code == 0, again.err
    (records, tensors, after), (r, t, a) = outcome(Path("whole")), outcome(Path("killed"))
    assert records == r and after == a
    assert tensors.keys() == t.keys() == {"optimizer", "pytorch_lora_weights"}
    for name, values in tensors.items():
        assert all(torch.equal(values[k], t[name][k]) for k in values)


def test_all_weights_can_be_trained_and_a_run_is_looked_at_by_itself(run_cli, of_pipeline, prompts_file):
    flags = [*of_pipeline("sd3")]
    flags[flags.index("--lora") + 1] = 0
    made = run_cli("finetune", *flags, *SHORT, "--rounds", 1, "--reward", "brightness", "--out", "run")
    assert made.code == 0, made.err
    prompts_file.unlink()
    drawn = run_cli("sample", "run", "-n", 3, *EULER, "--out", "x.npz")
    assert drawn.code == 0, drawn.err
    import numpy as np

    assert np.load("x.npz")["samples"].shape == (3, 3, 8, 8)
    measured = run_cli("evaluate", "run", "-n", 8, *EULER, "--json")
    assert measured.code == 0, measured.err
    reference, tuned = json.loads(measured.out)["models"]
    assert reference["w2_coupled"]["mean"] == 0 < tuned["w2_coupled"]["mean"]
    again = run_cli("finetune", "--checkpoint", "run", *SHORT, "--reward", "brightness")
    assert again.code == 2 and "--resume" in again.err and again.err.count("\n") == 1


LENGTHS = """
def score(images, prompts, metadata):
    return images.new_tensor([len(p) + 10.0 * m.get("dark", 0) for p, m in zip(prompts, metadata)])
"""


def test_any_reward_of_a_finished_run_is_told_the_runs_own_prompts(
    run_cli, of_pipeline, prompts_file, clip_folder
):
    made = run_cli(
        "finetune", *of_pipeline("sd3"), *SHORT, "--rounds", 1, "--reward", "brightness", "--out", "run"
    )
    assert made.code == 0, made.err
    prompts_file.unlink()
    Path("lengths.py").write_text(LENGTHS)
    clip = ("--clip-model", f"local-dir:{clip_folder()}")
    look = ("-n", 8, *EULER, "--json")
    rewards = ("--reward", "lengths.py:score", "--holdout-reward", "clip")
    for model in ("run", "run/checkpoints/step_3"):
        found = run_cli("evaluate", model, *rewards, *look, *clip)
        assert found.code == 0, found.err
        (*_, tuned) = json.loads(found.out)["models"]
        policy = Loader(CPU, "fp32", how=Sample()).load("run").policy
        drawn = policy.prompts_of(start_conditions(policy, 8, Sample()))
        told = [len(p.text) + 10 * p.metadata.get("dark", 0) for p in drawn]
        assert {*told} == {5, 13} and tuned["reward"]["mean"] == pytest.approx(sum(told) / 8)
        assert -1 <= tuned["holdout"]["clip"]["mean"] <= 1
    clip_alone = run_cli("evaluate", "run", "--reward", "clip", *look, *clip)
    assert clip_alone.code == 0, clip_alone.err
    (*_, again) = json.loads(clip_alone.out)["models"]
    assert again["reward"] == tuned["holdout"]["clip"]


def test_clip_without_a_prompt_of_a_model_without_is_refused(run_cli, tiny_run, clip_folder):
    refused = run_cli("evaluate", "run", "--reward", "clip", "--clip-model", f"local-dir:{clip_folder()}")
    assert refused.code == 2 and "give it --prompt TEXT" in refused.err and refused.err.count("\n") == 1


@pytest.mark.parametrize("lora", ["plain", "dora", "rslora"])
def test_an_adapted_run_is_its_own_reference_and_is_exported(lora, run_cli, of_pipeline, pipeline_folder):
    made = run_cli(
        "finetune", *of_pipeline("flux"), *SHORT, "--rounds", 1, "--reward", "brightness", "--lora-kind", lora,
        "--lora-alpha", 24, "--out", "run",
    )  # fmt: skip
    assert made.code == 0, made.err
    measured = run_cli("evaluate", "run", "-n", 8, *EULER, "--json")
    assert measured.code == 0, measured.err
    reference, tuned = json.loads(measured.out)["models"]
    assert reference["w2_coupled"]["mean"] == 0 < tuned["w2_coupled"]["mean"]
    assert sorted(p.name for p in Path("run/reference").iterdir()) == ["state.json"]
    check_export("flux", pipeline_folder("flux"), Path("run/checkpoints/step_3"))


def test_the_manuals_commands_work(run_cli, pipeline_folder, clip_folder):
    page = (Path(__file__).parents[2] / "docs/large-models.md").read_text("utf-8")
    block = "".join(re.findall(r"```sh\n(.*?)```", page, re.S))
    Path("prompts.txt").write_text("a cat\na dog\n")
    cheap = ("--image-size", 16, "--prompt-tokens", 6)
    run = ("--rounds", 1, "--steps-per-round", 1, "--probe", 2, "--eval-n", 4, "--precision", "fp32", "--lora", 2,
           "--clip-model", f"local-dir:{clip_folder()}")  # fmt: skip
    cheap = {
        "finetune": (*cheap, *run, "--nfe", 2),
        "sample": ("--nfe", 2),
        "doctor": (*cheap, "--lora", 2),
        "list": (),
    }
    commands = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("orwcfm ")]
    # the first is that of test_diffusers_plan.py
    in_order = ["doctor", "finetune", "sample", "finetune", "finetune", "list", "doctor", "finetune"]
    assert [c[0] for c in commands] == in_order
    for command in commands[1:]:
        named = [f"diffusers:{pipeline_folder('sd3')}" if c.startswith("diffusers:") else c for c in command]
        if "--recipe" in command:
            named += ["--model", f"diffusers:{pipeline_folder('flux')}"]
        ended = run_cli(*named, *cheap[command[0]])
        assert ended.code == 0, (command, ended.err)
        if not Path("published.safetensors").exists():
            shutil.copy(
                "runs/large/checkpoints/step_1/pytorch_lora_weights.safetensors", "published.safetensors"
            )
