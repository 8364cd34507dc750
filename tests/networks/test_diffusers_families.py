"""Tiny random pipelines of many families: our velocities and pictures are those of the pipeline itself."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from tiny_pipelines import EDIT, FAMILIES, SOUND, VIDEO, build

from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.networks.flow.learning import NotAFlow

STEPS = 4
RESULTS = Path(__file__).parents[2] / "benchmarks/results/families.json"
PAGE = RESULTS.parents[2] / "docs/large-models.md"
PROMPTS = ("a cat", "dog 3 by the blue sea")
IN_EVERY_RUN = ("Wan 2.1", "FLUX.1 Kontext", "ACE-Step")
TAKING_TURNS = [
    name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
]


@pytest.fixture(scope="module")
def results():
    """Figures by family; written to the file that the manual's table is of where ORWCFM_RECORD is set."""
    found = {}
    yield found
    if os.environ.get("ORWCFM_RECORD"):
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def kind_of(name):
    kind = "video" if name in VIDEO else "sound" if name in SOUND else "image"
    return f"{kind}, from inputs" if name in EDIT else kind


def recorded(pipe, call, prompt, guidance):
    """What the pipeline itself gives to its scheduler's step, [(time, x, v, x after)], and its output."""
    pipe = copy.copy(pipe)
    own = copy.deepcopy(pipe.scheduler)
    seen = []
    step, kind = type(own).step, type(own)

    def recording(v, time, sample, *more, **named):
        found = step(own, v, time, sample, *more, **named)
        after = found[0] if isinstance(found, tuple) else found.prev_sample
        seen.append((float(time), sample.clone(), v.clone(), after.clone()))
        return found

    own.step = recording
    assert isinstance(own, kind)
    pipe.__dict__["scheduler"] = own
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = pipe(
            prompt=prompt, num_inference_steps=STEPS, output_type="pt", generator=generator, **call | guidance
        )
    return seen, output


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
        theirs = [recorded(pipe, call, prompt, guidance) for prompt in PROMPTS]
        field = PipelineVelocity(pipe, call | guidance)
        with torch.no_grad():
            for prompt in PROMPTS:
                field.add(prompt=prompt)
            traits = field.traits
            points = []
            for row, (seen, output) in enumerate(theirs):
                for k in range(0, len(seen), traits.streams):
                    part = seen[k : k + traits.streams]
                    sigma = field.sigma_of(part[0][0])  # of the time that the model is told; some round it
                    t = sigma if traits.ascending else 1 - sigma
                    x, v = (field.join([s[i] for s in part]) for i in (1, 2))
                    v = field.join([sign * s[2] for sign, s in zip(traits.signs, part, strict=True)])
                    points.append((t, x, v, row))
                last = field.join([s[3] for s in seen[-traits.streams :]])
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


def test_the_manuals_table_is_that_of_the_result_file():
    found = json.loads(RESULTS.read_text())
    rows = [
        f"| {name} | {r['pipeline']} | {r['kind']} | {r['velocity']:.0e} | {r['picture']:.0e} | "
        f"{'yes' if r['rows_share'] else 'no'} |"
        for name, r in found.items()
    ]
    assert found.keys() <= FAMILIES.keys()
    assert "\n".join(rows) in PAGE.read_text("utf-8")
