"""Which layers are adapted: attention and feed-forward of any family's blocks, or those that are named."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES, build

from orwcfm_fast.errors import UserError
from orwcfm_fast.networks import lora
from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.networks.lora_targets import targets
from orwcfm_fast.networks.models import build_network
from orwcfm_fast.settings import Finetune, read_toml, to_toml

DIFFUSERS_SCRIPT = {  # the default of train_dreambooth_lora_flux.py
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
}  # fmt: skip
OTHER = re.compile(r"norm|embed|mod|time|guidance|pooler|refine|proj_out|proj_in")


def field_of(name):
    pipe, _ = build(name)
    return PipelineVelocity(pipe, {})


def ends(names):
    """Names without the blocks that they are of."""
    return {re.sub(r"^.*?\.\d+\.", "", name) for name in names}


def test_of_flux_they_are_those_of_diffusers_training_script():
    found = targets(field_of("FLUX.1"), Finetune(lora=2))["transformer."]
    assert ends(found) == DIFFUSERS_SCRIPT
    script = tuple(f".{name}" for name in DIFFUSERS_SCRIPT)
    named = dict(field_of("FLUX.1").transformer.named_modules())
    assert {*found} == {name for name in named if name.endswith(script)}


@pytest.mark.parametrize("name", FAMILIES)
def test_of_any_family_they_are_attention_and_feed_forward_alone(name):
    field = field_of(name)
    found = targets(field, Finetune(lora=2))
    for prefix, part in lora.parts(field).items():
        linears = {key for key, layer in part.named_modules() if isinstance(layer, torch.nn.Linear)}
        names = ends(found[prefix])
        assert {*found[prefix]} < linears and not any(OTHER.search(key) for key in names), names
        queries = {
            key for key in linears if key.endswith(("to_q", "to_qkv_mlp_proj")) and "pooler" not in key
        }
        assert queries and queries <= {*found[prefix]}


def test_names_are_the_ends_of_layers_names_given_with_commas_or_one_by_one():
    field = field_of("sd3")
    both = targets(field, Finetune(lora=2, lora_targets=["to_q, to_k", "proj_out"]))["transformer."]
    assert ends(both) == {"attn.to_q", "attn.to_k", "attn2.to_q", "attn2.to_k", "proj_out"}
    lora.add_lora(field, Finetune(lora=2, lora_targets=["to_q,to_k", "proj_out"]))
    assert {key.partition(".lora_")[0] for key in lora.lora_state(field)} == {
        f"transformer.{n}" for n in both
    }


def test_all_is_every_linear_layer_and_convolution_above_the_rank():
    field = field_of("sd3")
    found = targets(field, Finetune(lora=2, lora_targets=["all"]))["transformer."]
    layers = {
        key
        for key, layer in field.transformer.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        and min(len(layer.weight), layer.weight[0].numel()) > 2
    }
    assert {*found} == layers and {"pos_embed.proj", "context_embedder"} <= layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_targets": ["to_qq"]}, r"^--lora-targets: unknown layer 'to_qq'; did you mean 'to_q'\?$"),
        ({"lora_targets": ["to_q,"]}, r"^--lora-targets: unknown layer ''"),
        ({"lora": 1000}, r"^--lora 1000: no attention or feed-forward layer .* use a lower rank"),
    ],
    ids=str,
)
def test_targets_that_are_not_there_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        targets(field_of("sd3"), Finetune(**{"lora": 4} | change))


def test_dora_leaves_out_the_convolutions_over_positions_of_a_unet():
    network = build_network("unet-digits", (1, 8, 8))
    plain, dora = (targets(network, Finetune(lora=4, lora_kind=kind))[""] for kind in ("plain", "dora"))
    left_out = {*plain} - {*dora}
    assert {*dora} < {*plain} and all(isinstance(network.get_submodule(k), torch.nn.Conv1d) for k in left_out)


def test_a_run_from_before_targets_were_recorded_resumes_with_the_layers_it_had(
    run_cli, pipeline_folder, prompts_file
):
    run = (
        "finetune", "--model", f"diffusers:{pipeline_folder('sd3')}", "--prompts", prompts_file, "--lora", 2,
        "--image-size", 8, "--prompt-tokens", 6, "--solver", "euler", "--grid", "own", "--nfe", 2, "--quiet",
        "--reward", "brightness", "--steps-per-round", 1, "--rollout", 8, "--batch", 8, "--probe", 2, "--eval-n", 4,
        "--precision", "fp32",
    )  # fmt: skip
    for name, rounds in (("whole", 2), ("old", 1)):
        made = run_cli(*run, "--lora-targets", "all", "--rounds", rounds, "--out", name)
        assert made.code == 0, made.err
    config = Path("old/config.toml")
    head, own = config.read_text().partition("\n")[0], read_toml(config)
    kept = {key: value for key, value in own.items() if not key.startswith("lora_")}
    assert len(own) - len(kept) == 3  # alpha is the rank where it is not there
    config.write_text(f"{head}\n{to_toml(kept)}")
    again = run_cli("finetune", "--resume", "old", "--rounds", 2, "--quiet")
    assert again.code == 0, again.err
    whole, old = (
        load_file(f"{name}/checkpoints/step_2/pytorch_lora_weights.safetensors") for name in ("whole", "old")
    )
    assert whole.keys() == old.keys() and all(torch.equal(whole[key], old[key]) for key in whole)
