"""The door to a pipeline costs little beside its transformer."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch

from orwcfm_fast.benchmarks import door
from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Finetune

pytestmark = pytest.mark.slow
SIZE = dict(image_size=32, prompt_tokens=6)


@pytest.fixture
def policy(pipeline_folder, prompts_file):
    model = f"diffusers:{pipeline_folder('flux')}"
    how = Finetune(model=model, device="cpu", precision="fp32", prompts=str(prompts_file), **SIZE)
    return Loader(torch.device("cpu"), "fp32", how=how).load(model).policy


def test_beside_a_transformer_of_300_million_the_door_costs_at_most_a_twentieth(policy):
    from diffusers import FluxTransformer2DModel

    own = dict(policy.pipeline.pipe.transformer.config)
    large = dict(num_attention_heads=16, attention_head_dim=64, axes_dims_rope=(16, 24, 24), num_layers=6)
    names = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "patch_size")
    kept = {key: own[key] for key in names}
    transformer = FluxTransformer2DModel(**kept, **large, num_single_layers=6).eval().requires_grad_(False)
    field = policy.pipeline
    field.pipe.register_modules(transformer=transformer)
    network = PipelineVelocity(field.pipe, field.arguments, conditions=field.conditions)
    found = door.door(replace(policy, network=network), times=5)
    print({k: round(v, 4) for k, v in found.items()})
    assert found["parameters"] >= 300e6
    assert found["door"] <= 0.05


def test_time_in_the_pipelines_own_python_is_the_doors(policy, monkeypatch):
    quick = door.door(policy, times=3)["door"]
    scheduler = type(policy.pipeline.pipe.scheduler)
    real = scheduler.set_timesteps

    def slowly(*args, **named):
        time.sleep(0.5)
        return real(*args, **named)

    monkeypatch.setattr(scheduler, "set_timesteps", slowly)
    assert door.door(policy, times=3)["door"] > max(quick, 0.9)


def test_command_writes_a_result(pipeline_folder, prompts_file, tmp_path, monkeypatch):
    out = tmp_path / "door.json"
    named = ["--prompts", str(prompts_file), "--rows", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["door", str(pipeline_folder("flux")), *named])
    door.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["rows"] == 2 and 0 < row["door"] < 1
