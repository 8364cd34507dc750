"""Configurations of published pipelines, as folders that `doctor --plan` reads: no weights, no network.

Transformers and VAEs are diffusers' classes with the arguments of the published models: mostly the defaults of their
constructors, which are those sizes, otherwise what is given here (from the models' own repositories and diffusers'
conversion scripts). Text encoders have their published sizes. Tokenizers are stand-ins that know bytes: a plan needs
the length of a text alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

Parts = dict[str, Any]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
MODELS: dict[str, Callable[[], Any]] = {}
"""By recipe, the pipeline on the meta device."""


def model(recipe: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        MODELS[recipe] = make
        return make

    return register


def write(recipe: str, folder: Path) -> Path:
    """Write the configurations of a recipe's model, and nothing else."""
    with torch.device("meta"):
        pipe = MODELS[recipe]()
    pipe.save_config(folder)
    parts: dict[str, Any] = pipe.components
    for name, part in parts.items():
        if hasattr(part, "save_config"):
            part.save_config(folder / name)
        elif isinstance(part, torch.nn.Module):
            cast(Any, part).config.save_pretrained(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)
    return folder


def words(longest: int) -> Any:
    """A tokenizer of bytes, with the special tokens that chat templates use."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE({word: i for i, word in enumerate([*special, *alphabet])}, []))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.add_special_tokens(special)
    found = PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=longest,
    )  # fmt: skip
    found.chat_template = CHAT
    return found


def clip(width: int, layers: int, heads: int, projected: bool) -> Any:
    import transformers as t

    config = t.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=width, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return (t.CLIPTextModelWithProjection if projected else t.CLIPTextModel)(config)


def t5(kind: str = "T5", vocabulary: int = 32128) -> Any:
    """T5 or UMT5, version 1.1, XXL."""
    import transformers as t

    config = getattr(t, f"{kind}Config")(
        vocab_size=vocabulary, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return getattr(t, f"{kind}EncoderModel")(config)


def qwen3_4b(of: str) -> Any:
    import transformers as t

    config = t.Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    return getattr(t, of)(config)


def image_vae() -> Any:
    """That of SD3, FLUX.1 and Z-Image."""
    import diffusers as d

    blocks = (128, 256, 512, 512)
    return d.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=blocks, layers_per_block=2, latent_channels=16, sample_size=1024,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip


def flow(**more: Any) -> Any:
    import diffusers as d

    with torch.device("cpu"):
        return d.FlowMatchEulerDiscreteScheduler(**more)


@model("sd35-medium")
def _sd35_medium() -> Any:
    import diffusers as d

    network = d.SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        dual_attention_layers=(*range(13),), qk_norm="rms_norm",
    )  # fmt: skip
    return d.StableDiffusion3Pipeline(
        network, flow(shift=3.0), image_vae(), clip(768, 12, 12, True), words(77), clip(1280, 32, 20, True), words(77),
        t5(), words(512),
    )  # fmt: skip


@model("flux1-dev")
def _flux1_dev() -> Any:
    import diffusers as d

    network = d.FluxTransformer2DModel(guidance_embeds=True)
    return d.FluxPipeline(
        flow(shift=3.0, use_dynamic_shifting=True), image_vae(), clip(768, 12, 12, False), words(77), t5(), words(512),
        network,
    )  # fmt: skip


@model("flux2-klein")
def _flux2_klein() -> Any:
    import diffusers as d

    network = d.Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    encoder = qwen3_4b("Qwen3ForCausalLM")
    scheduler = flow(shift=3.0, use_dynamic_shifting=True)
    return d.Flux2KleinPipeline(scheduler, d.AutoencoderKLFlux2(), encoder, words(512), network)


@model("qwen-image")
def _qwen_image() -> Any:
    import diffusers as d
    import transformers as t

    config = t.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4,
            rope_scaling={"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        ),
        vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584),
    )  # fmt: skip
    scheduler = flow(
        base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, use_dynamic_shifting=True
    )
    encoder = t.Qwen2_5_VLForConditionalGeneration(config)
    return d.QwenImagePipeline(
        scheduler, d.AutoencoderKLQwenImage(), encoder, words(1024), d.QwenImageTransformer2DModel()
    )


@model("z-image")
def _z_image() -> Any:
    import diffusers as d

    encoder = qwen3_4b("Qwen3Model")
    return d.ZImagePipeline(flow(shift=6.0), image_vae(), encoder, words(512), d.ZImageTransformer2DModel())


@model("wan22")
def _wan22() -> Any:
    import diffusers as d

    with torch.device("cpu"):
        scheduler = d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    experts = [d.WanTransformer3DModel() for _ in range(2)]
    return d.WanPipeline(
        words(512),
        t5("UMT5", 256384),
        d.AutoencoderKLWan(),
        scheduler,
        experts[0],
        experts[1],
        boundary_ratio=0.875,
    )


@model("ltx2")
def _ltx2() -> Any:
    import diffusers as d
    import transformers as t
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    gemma = t.Gemma3Config(  # 12B
        text_config=dict(
            vocab_size=262208, hidden_size=3840, intermediate_size=15360, num_hidden_layers=48,
            num_attention_heads=16, num_key_value_heads=8, head_dim=256,
        ),
        vision_config=dict(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=896,
            patch_size=14,
        ),
    )  # fmt: skip
    vae = d.AutoencoderKLLTX2Video(
        decoder_causal=False, spatial_compression_ratio=32, temporal_compression_ratio=8
    )
    scheduler = flow(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        max_image_seq_len=4096, shift_terminal=0.1,
    )  # fmt: skip
    return d.LTX2Pipeline(
        scheduler, vae, d.AutoencoderKLLTX2Audio(), t.Gemma3ForConditionalGeneration(gemma), words(1024),
        LTX2TextConnectors(), d.LTX2VideoTransformer3DModel(), LTX2Vocoder(),
    )  # fmt: skip
