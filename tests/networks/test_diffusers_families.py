"""Tiny random pipelines of many families: our velocities and pictures are those of the pipeline itself."""

import json
from pathlib import Path

import pytest
import torch
from recording import recorded
from tiny_pipelines import EDIT, FAMILIES, SOUND, VIDEO, build

from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.networks.flow.learning import NotAFlow

STEPS = 4
RESULTS = Path(__file__).parents[2] / "benchmarks/results/families.json"
PROMPTS = ("a cat", "dog 3 by the blue sea")
IN_EVERY_RUN = ("Wan 2.1", "FLUX.1 Kontext", "ACE-Step")
TAKING_TURNS = [
    name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
]


def kind_of(name):
    kind = "video" if name in VIDEO else "sound" if name in SOUND else "image"
    return f"{kind}, from inputs" if name in EDIT else kind


def guidances(pipe, call):
    """Off, and on by whatever argument this pipeline has for it."""
    import inspect

    takes = inspect.signature(pipe.__call__).parameters
    for name in ("true_cfg_scale", "guidance_scale"):
        if name in takes and (name != "true_cfg_scale" or "negative_prompt" in call):
            return {name: 1.0}, {name: 3.0}
    return {}, {}


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for float32 there
@pytest.mark.parametrize("name", TAKING_TURNS)
def test_velocities_and_pictures_are_the_pipelines_own(name, results):
    pipe, call = build(name)
    worst, picture = 0.0, 0.0
    for guidance in guidances(pipe, call):
        theirs = [recorded(pipe, STEPS, prompt=prompt, **call | guidance) for prompt in PROMPTS]
        field = PipelineVelocity(pipe, call | guidance)
        with torch.no_grad():
            for prompt in PROMPTS:
                field.add(prompt=prompt)
            traits = field.traits
            points = []
            for row, (seen, output) in enumerate(theirs):
                for k in range(0, len(seen), traits.streams):
                    part = seen[k : k + traits.streams]
                    sigma = field.sigma_of(part[0].time)  # of the time that the model is told; some round it
                    t = sigma if traits.ascending else 1 - sigma
                    x = field.join([s.x for s in part])
                    v = field.join([sign * s.v for sign, s in zip(traits.signs, part, strict=True)])
                    points.append((t, x, v, row))
                last = field.join([s.after for s in seen[-traits.streams :]])
                ours = field.decode(last.float(), torch.tensor([row]))
                picture = max(picture, float((ours - field.decoded(output)).abs().max()))
            t = torch.tensor([p[0] for p in points], dtype=torch.float64)
            rows = torch.tensor([p[3] for p in points])
            ours = field(t, torch.cat([p[1] for p in points]).float(), rows)
            v = torch.cat([p[2] for p in points])
            assert v.std() > 1e-3, "a velocity that says something"
            worst = max(worst, float((ours - v).abs().max() / v.abs().max()))
    print(f"{name}: velocity {worst:.1e}, picture {picture:.1e}, rows share calls: {traits.shares}")
    results[name] = {
        "pipeline": type(pipe).__name__, "kind": kind_of(name), "velocity": worst, "picture": picture,
        "rows_share": traits.shares, "left_out": traits.shape != tuple(traits.shapes[0]), "streams": traits.streams,
    }  # fmt: skip
    assert worst <= 1e-5 and picture <= 1e-3


def test_there_are_families_of_every_kind():
    assert len(FAMILIES) >= 25 and len(VIDEO) >= 5 and len(SOUND) >= 2 and len(EDIT) >= 4


def test_a_pipeline_whose_scheduler_is_no_flows_is_refused():
    import diffusers

    pipe, call = build("sd3")
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    field = PipelineVelocity(pipe, call)
    field.add(prompt="a cat")
    with pytest.raises((NotAFlow, ValueError)):
        field.traits  # noqa: B018


def test_the_result_file_is_of_families_that_are_tested():
    assert json.loads(RESULTS.read_text()).keys() <= FAMILIES.keys()
