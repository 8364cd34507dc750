"""JSON lines hold whatever a pipeline's call takes; what it does not take, or cannot make, is one line."""

import json

import pytest
import torch
from PIL import Image
from tiny_pipelines import build

from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.flow.inputs import arguments_of, common_arguments, embedded_guidance, read_files
from orwcfm_fast.networks.prompts import read_prompts
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Sample

CPU = torch.device("cpu")


@pytest.fixture
def prompts(tmp_path):
    """prompts(**values) → a file with one JSON line of them."""

    def write(**values):
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps({"prompt": "a cat", **values}))
        return path

    return write


def test_a_key_that_the_call_does_not_take_is_named_with_the_nearest(prompts):
    import diffusers

    takes = arguments_of(diffusers.FluxKontextPipeline)
    assert {"image", "height", "negative_prompt", "true_cfg_scale"} <= {*takes}
    assert not {"latents", "num_inference_steps", "output_type"} & {*takes}
    with pytest.raises(UserError, match=r"line 1: .*'heigth'; did you mean 'height'"):
        read_prompts(prompts(heigth=16), takes)
    with pytest.raises(UserError, match="not 'num_inference_steps'"):
        read_prompts(prompts(num_inference_steps=3), takes)
    with pytest.raises(UserError, match=r"line 1: no file .*absent\.png"):
        read_prompts(prompts(image="absent.png"), takes)


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(UserError, match=r"image .*x\.png: no picture"):
        read_files({"image": str(tmp_path / "x.png")})
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    found = read_files({"video": str(tmp_path / "x.webp"), "prompt": "x.png"})
    assert [f.getpixel((0, 0))[0] for f in found["video"]] == [0, 40, 80] and found["prompt"] == "x.png"


def test_a_setting_that_the_call_has_no_argument_for_is_named():
    import diffusers

    with pytest.raises(UserError, match="--image-size 16: LongCatAudioDiTPipeline takes no height"):
        common_arguments(diffusers.LongCatAudioDiTPipeline, 1.0, 16, 0)
    found = common_arguments(diffusers.FluxPipeline, 3.5, 16, 24)
    assert found == {"height": 16, "width": 16, "max_sequence_length": 24, "guidance_scale": 3.5}


def test_guidance_that_a_transformer_embeds_is_by_default_the_pipelines_own():
    import diffusers

    embeds, not_embeds = {"guidance_embeds": True}, {"guidance_embeds": False}
    assert embedded_guidance(diffusers.FluxPipeline, [embeds]) == 3.5
    assert embedded_guidance(diffusers.FluxPipeline, [not_embeds]) == 1.0, "schnell"
    assert embedded_guidance(diffusers.StableDiffusion3Pipeline, [{}]) == 1.0, "classifier-free: on request"


@pytest.mark.slow
def test_sizes_that_a_pipeline_cannot_make_are_one_line_and_memory_that_runs_out_is_seen(tmp_path, prompts):
    pipe, call = build("Wan 2.1")
    pipe.save_pretrained(tmp_path / "pipeline")

    def load(**more):
        how = Sample(prompts=str(prompts(**call | more)))
        return Loader(CPU, "fp32", how=how).load(f"diffusers:{tmp_path / 'pipeline'}").policy

    with pytest.raises(UserError, match=r"num_frames 6: .* multiples of 4 plus 1 frames; use 5 or 9"):
        load(num_frames=6)
    policy = load()

    def full(*args, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    policy.pipeline.pipe.vae.decode = full
    rows = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(torch.OutOfMemoryError):  # the loop then decodes fewer at once
        policy.decode(torch.zeros(1, *policy.shape), rows)
