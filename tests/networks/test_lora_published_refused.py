"""Published adapters that cannot be continued: one line each."""

import json

import pytest
import torch
from published_loras import by_diffusers, by_peft, name_of, start
from safetensors.torch import load_file, save_file

from orwcfm_fast.errors import UserError


def foreign(folder, out):
    save_file({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}, out / "f.safetensors")
    return out / "f.safetensors"


def of_another_width(folder, out):
    file = by_diffusers(folder, out)
    save_file({k: torch.zeros(8, 7) if "lora_A" in k else torch.zeros(5, 8) for k in load_file(file)}, file)
    return file


def no_safetensors(folder, out):
    (out / "f.safetensors").write_text("nothing of the kind")
    return out / "f.safetensors"


def weights_of_a_vae(folder, out):
    save_file({"encoder.conv_in.weight": torch.zeros(3, 3)}, out / "f.safetensors")
    return out / "f.safetensors"


def with_a_wrong_alpha(folder, out):
    file = by_peft(folder, out)
    beside = out / "adapter_config.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"lora_alpha": "much"}))
    return file


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_a_wrong_alpha, "no LoRA of"),
        (foreign, "adapters of another network or rank"),
        (of_another_width, "adapters of another network or rank"),
        (no_safetensors, "its header"),
        (weights_of_a_vae, "holds no low-rank adapter"),
        (lambda folder, out: out / "missing.safetensors", "No such file"),
    ],
    ids=name_of,
)
def test_a_wrong_file_is_one_line(make, message, pipeline_folder, prompts_file, tmp_path):
    folder = pipeline_folder("sd3")
    with pytest.raises(UserError, match=message) as error:
        start(folder, prompts_file, make(folder, tmp_path))
    assert str(error.value).startswith("--lora-init ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": 8}, r"^--lora 8: the published adapter has 4; leave --lora out$"),
        ({"lora_alpha": 4.0}, r"^--lora-alpha 4.0: the published adapter has 6"),
        ({"lora_kind": "dora"}, r"^--lora-kind dora: the published adapter has plain"),
    ],
    ids=str,
)
def test_a_setting_that_the_file_contradicts_is_one_line(
    change, message, pipeline_folder, prompts_file, tmp_path
):
    folder = pipeline_folder("sd3")
    file = by_diffusers(folder, tmp_path)
    with pytest.raises(UserError, match=message):
        start(folder, prompts_file, file, **change)
    s, _ = start(folder, prompts_file, file, lora=4)
    assert (s.lora, s.lora_alpha, s.lora_kind) == (4, 6.0, "plain")


def test_more_files_than_transformers_are_refused(pipeline_folder, prompts_file, tmp_path):
    folder = pipeline_folder("sd3")
    file = str(by_diffusers(folder, tmp_path))
    with pytest.raises(UserError, match="2 files, but the pipeline has 1 transformer"):
        start(folder, prompts_file, file, lora_init=[file, file])
