"""Published adapters as other tools write them, and runs that start from one."""

import diffusers
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from orwcfm_fast.networks import lora
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.runs.resolve import resolved
from orwcfm_fast.settings import Finetune

CPU = torch.device("cpu")
HOW = dict(solver="euler", grid="own", nfe=3, prompt_tokens=6, chunk=4, image_size=16)
SMALL = dict(rollout=12, batch=6, steps_per_round=2, probe=4, rounds=2, lr=1e-2, warmup=0)
WEIGHTS = "pytorch_lora_weights.safetensors"


def randomised(network):
    """Every adapter of it with random A and B."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, p in network.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                p.normal_(std=0.3, generator=generator)


def plain(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_diffusers(folder, out, **config):
    """`add_adapter` and `save_lora_weights`, as a user of diffusers does."""
    from diffusers.training_utils import _collate_lora_metadata

    pipe = plain(folder)
    wanted = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v", "ff.net.2"]} | config
    pipe.transformer.add_adapter(LoraConfig(**wanted))
    randomised(pipe.transformer)
    layers = lora.peft().get_peft_model_state_dict(pipe.transformer)
    header = _collate_lora_metadata({"transformer": pipe.transformer})
    type(pipe).save_lora_weights(out, transformer_lora_layers=layers, **header)
    return out / WEIGHTS


def by_peft(folder, out):
    """PeftModel.save_pretrained: keys "base_model.model.…", and its settings in a file beside."""
    model = get_peft_model(
        plain(folder).transformer, LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["to_k"])
    )
    randomised(model)
    model.save_pretrained(out)
    return out / "adapter_model.safetensors"


def by_kohya(folder, out):
    """Keys of kohya's scripts for FLUX, with an alpha that is not the rank."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for block, width in (("double_blocks_0_img_attn_proj", 32), ("double_blocks_0_txt_attn_proj", 32)):
        key = f"lora_unet_{block}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=generator) * 0.5
        tensors[f"{key}.lora_up.weight"] = torch.randn(32, 4, generator=generator) * 0.5
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    out.mkdir(exist_ok=True)
    save_file(tensors, out / "kohya.safetensors")
    return out / "kohya.safetensors"


def start(folder, prompts_file, file, **more):
    named = dict(prompts=str(prompts_file), lora_init=[str(file)], reward=["brightness"])
    s = Finetune(**named | HOW | SMALL | more)
    loaded = Loader(CPU, "fp32", f"diffusers:{folder}", how=s).load()
    return resolved(s, loaded), loaded.policy


def name_of(value):
    return getattr(value, "__name__", str(value))
