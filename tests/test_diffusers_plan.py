"""`doctor --plan` of a pipeline: from its configurations alone, and what a run of it then takes."""

import json
import shutil
from itertools import accumulate

import pytest
import torch

from orwcfm_fast.plan import allocations
from orwcfm_fast.plan_pipeline import plan_pipeline
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Finetune
from orwcfm_fast.trainer import Trainer

CPU = torch.device("cpu")
SHORT = dict(device="cpu", precision="fp32", prompt_tokens=6, probe=4, steps_per_round=2, nfe=4, chunk=4)


def measured(s: Finetune) -> int:
    """Peak of torch's own accounting of CPU memory over two whole rounds, and what was there before."""
    policy = Loader(CPU, "fp32", how=s).load(s.model).policy
    parts = [x for m in (policy.network, policy.pipeline.vae) for x in (*m.parameters(), *m.buffers())]
    before = sum(x.nbytes for x in parts) + policy.conditions.nbytes

    def rounds():
        loop = Trainer(policy, make_reward("brightness"), s)
        for _ in range(2):
            loop.one_round()

    return before + max(accumulate(allocations(rounds, CPU)))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("sd3", dict(batch=8, rollout=8, micro_batch=4, image_size=16, guidance=2.0)),
        ("flux", dict(batch=8, rollout=4, image_size=32, gradient_checkpointing=True)),
    ],
    ids=str,
)
def test_predicted_memory_is_what_torch_then_allocates(kind, sizes, pipeline_folder, prompts_file):
    s = Finetune(
        model=f"diffusers:{pipeline_folder(kind)}", prompts=str(prompts_file), lora=8, **SHORT | sizes
    )
    plans = plan_pipeline(s)
    for plan, rank in zip(plans.values(), (0, 8), strict=True):
        ours = max(bytes for phase, bytes in plan.phases.items() if phase != "encoding")
        theirs = measured(s.model_copy(update={"lora": rank}))
        print(
            f"{kind} {sizes} rank {rank}: predicted {ours / 2**20:.2f} MiB, measured {theirs / 2**20:.2f} MiB"
        )
        assert abs(ours / theirs - 1) <= 0.15


def test_configurations_are_enough_and_what_does_not_fit_is_said(run_cli, pipeline_folder, tmp_path):
    folder = tmp_path / "bare"
    weights = shutil.ignore_patterns("*.safetensors", "tokenizer.json")
    shutil.copytree(pipeline_folder("flux"), folder, ignore=weights)
    flags = (
        "doctor",
        "--plan",
        "--model",
        f"diffusers:{folder}",
        "--image-size",
        32,
        "--batch",
        8,
        "--rollout",
        8,
    )
    found = json.loads(run_cli(*flags, "--gpu-gib", 24, "--json").out)
    whole, adapted = found["all weights"], found["adapters of rank 16"]
    assert whole["fits"] and adapted["fits"] and whole["micro_batch"] == adapted["micro_batch"] == 8
    assert whole["held"]["transformer"] == whole["held"]["reference"] == 2 * adapted["held"]["transformer"]
    assert adapted["held"]["reference"] == 0 < whole["encoding"]["text_encoder_2"]
    table = run_cli(*flags, "--gpu-gib", 0.1).out
    for word in ("training all weights", "training adapters of rank 16", "VAE", "step: activations", "encoding",
                 "there is, on a GPU of 0.1 GiB", "fits with --micro-batch"):  # fmt: skip
        assert word in table, word
    refused = run_cli("doctor", "--plan", "--model", "mlp", "--gpu-gib", 24)
    assert refused.code == 2 and "--gpu-gib" in refused.err and refused.err.count("\n") == 1
