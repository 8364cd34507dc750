"""Tiny random pipelines of many families, built from diffusers' own classes; tokenizers know letters and digits.

Sizes follow what each class asks for. `FAMILIES[name](Parts())` gives a pipeline and what it is called with.
"""

import functools
import string
from collections.abc import Callable
from typing import Any

import diffusers as d
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

Made = tuple[Any, dict[str, Any]]
FAMILIES: dict[str, Callable[["Parts"], Made]] = {}
VIDEO, SOUND, EDIT = set(), set(), set()
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
HEADS = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32)


def family(name: str, *kinds: set[str]) -> Callable[[Callable[["Parts"], Made]], Callable[["Parts"], Made]]:
    def register(make: Callable[["Parts"], Made]) -> Callable[["Parts"], Made]:
        FAMILIES[name] = make
        for kind in kinds:
            kind.add(name)
        return make

    return register


def picture(seed: int = 0, size: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy()).convert(mode)


def build(name: str) -> Made:
    """A pipeline of that family, its weights drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe, call = FAMILIES[name](Parts())
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            for p in part.parameters():
                p.data = torch.where(p.isfinite() & (p.abs() < 10), p, 0.02)  # some are left uninitialised
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


class Parts:
    """Text encoders, tokenizers and autoencoders that families share."""

    letters = (*string.ascii_letters, *string.digits, *" .,:;!?-_'\"<>|/[]{}()=#*\n")

    @functools.cached_property
    def t5_words(self) -> Any:
        pieces = [
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            ("▁", -2.0),
            *((c, -3.0) for c in self.letters),
        ]
        return t.T5Tokenizer(pieces, extra_ids=0, model_max_length=64)

    def t5(self, kind: str = "T5") -> Any:
        config = getattr(t, f"{kind}Config")(
            vocab_size=len(self.t5_words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        )
        return getattr(t, f"{kind}EncoderModel")(config).eval()

    @functools.cached_property
    def words(self) -> Any:
        """A byte-level tokenizer with a chat template."""
        special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>", "<|vision_start|>",
                   "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        base = Tokenizer(models.BPE({word: i for i, word in enumerate([*special, *alphabet])}, []))
        base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        base.decoder = decoders.ByteLevel()
        base.add_special_tokens(special)
        base.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        found = t.PreTrainedTokenizerFast(
            tokenizer_object=base, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
            model_max_length=512,
        )  # fmt: skip
        found.chat_template = CHAT
        return found

    @functools.cached_property
    def clip_words(self) -> Any:
        words = [*self.letters, *(f"{c}</w>" for c in self.letters), "<|startoftext|>", "<|endoftext|>"]
        return t.CLIPTokenizer({w: i for i, w in enumerate(words)}, [], model_max_length=12)

    def clip(self, projection: bool = False) -> Any:
        words = self.clip_words
        config = t.CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=24, projection_dim=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=12, bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )  # fmt: skip
        return (t.CLIPTextModelWithProjection if projection else t.CLIPTextModel)(config).eval()

    def decoder_only(self, kind: str, of: str, width: int = 16, **more: Any) -> Any:
        config = getattr(t, f"{kind}Config")(
            vocab_size=len(self.words), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
        )  # fmt: skip
        return getattr(t, of)(config).eval()

    def vae(self, channels: int = 4, **more: Any) -> Any:
        return d.AutoencoderKL(
            3, 3, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 8), latent_channels=channels,
            norm_num_groups=4, **{"shift_factor": 0.06, "scaling_factor": 1.5} | more,
        )  # fmt: skip

    def wan_vae(self) -> Any:
        return d.AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        )

    def ltx_vae(self) -> Any:
        four = (8, 8, 8, 8)
        vae = d.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=four, decoder_block_out_channels=four,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False,
            patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
        )  # fmt: skip
        vae.use_framewise_encoding = vae.use_framewise_decoding = False
        return vae

    def flow(self, **more: Any) -> Any:
        return d.FlowMatchEulerDiscreteScheduler(**more)

    def unipc(self) -> Any:
        return d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )


def _sd3(parts: Parts, kind: str, *more: Any, **named: Any) -> Made:
    network = d.SD3Transformer2DModel(
        8, 1, 4, 2, **HEADS, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    words, long = parts.clip_words, parts.t5_words
    pipe = getattr(d, kind)(
        network, parts.flow(shift=3.0), parts.vae(), parts.clip(True), words, parts.clip(True), words, parts.t5(),
        long, *more,
    )  # fmt: skip
    return pipe, dict(height=16, width=16, max_sequence_length=24) | named


@family("sd3")
def sd3(parts: Parts) -> Made:
    return _sd3(parts, "StableDiffusion3Pipeline")


@family("sd3 image-to-image", EDIT)
def sd3_img2img(parts: Parts) -> Made:
    return _sd3(parts, "StableDiffusion3Img2ImgPipeline", image=picture(), strength=0.9)


@family("sd3 ControlNet")
def sd3_controlnet(parts: Parts) -> Made:
    control = d.SD3ControlNetModel(
        8, 1, 4, 1, **HEADS, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    for p in (p for block in control.controlnet_blocks for p in block.parameters()):
        torch.nn.init.normal_(p, std=0.1)
    return _sd3(parts, "StableDiffusion3ControlNetPipeline", control, control_image=picture())


def _flux(parts: Parts, kind: str, channels: int = 16, call: dict | None = None, **more: Any) -> Made:
    network = d.FluxTransformer2DModel(
        1,
        channels,
        16,
        1,
        1,
        **HEADS,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = getattr(d, kind)(
        scheduler=parts.flow(use_dynamic_shifting=True), vae=parts.vae(), text_encoder=parts.clip(),
        tokenizer=parts.clip_words, text_encoder_2=parts.t5(), tokenizer_2=parts.t5_words, transformer=network,
        **more,
    )  # fmt: skip
    return pipe, dict(height=16, width=16, max_sequence_length=24) | (call or {})


@family("FLUX.1")
def flux(parts: Parts) -> Made:
    return _flux(parts, "FluxPipeline")


@family("FLUX.1 image-to-image", EDIT)
def flux_img2img(parts: Parts) -> Made:
    return _flux(parts, "FluxImg2ImgPipeline", call=dict(image=picture(), strength=0.9))


@family("FLUX.1 inpainting", EDIT)
def flux_inpaint(parts: Parts) -> Made:
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    return _flux(parts, "FluxInpaintPipeline", call=dict(image=picture(), mask_image=mask, strength=1.0))


@family("FLUX.1 Kontext", EDIT)
def flux_kontext(parts: Parts) -> Made:
    return _flux(parts, "FluxKontextPipeline", call=dict(image=picture(), max_area=256, _auto_resize=False))


@family("FLUX.1 Fill", EDIT)
def flux_fill(parts: Parts) -> Made:
    call = dict(image=picture(), mask_image=picture(1, mode="L"))
    return _flux(parts, "FluxFillPipeline", 48, call)


@family("FLUX.1 Control")
def flux_control(parts: Parts) -> Made:
    return _flux(parts, "FluxControlPipeline", 32, dict(control_image=picture()))


@family("FLUX.1 ControlNet")
def flux_controlnet(parts: Parts) -> Made:
    control = d.FluxControlNetModel(
        1, 16, 1, 1, **HEADS, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8)
    )
    for p in (p for block in control.controlnet_blocks for p in block.parameters()):
        torch.nn.init.normal_(p, std=0.1)
    return _flux(parts, "FluxControlNetPipeline", call=dict(control_image=picture()), controlnet=control)


def _chroma(parts: Parts, kind: str, **call: Any) -> Made:
    network = d.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, **HEADS, axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16,
    )  # fmt: skip
    pipe = getattr(d, kind)(
        scheduler=parts.flow(), vae=parts.vae(), text_encoder=parts.t5(), tokenizer=parts.t5_words,
        transformer=network,
    )  # fmt: skip
    return pipe, dict(height=16, width=16, max_sequence_length=24, negative_prompt="bad") | call


@family("Chroma")
def chroma(parts: Parts) -> Made:
    return _chroma(parts, "ChromaPipeline")


@family("Chroma image-to-image", EDIT)
def chroma_img2img(parts: Parts) -> Made:
    return _chroma(parts, "ChromaImg2ImgPipeline", image=picture(), strength=0.9)


@family("AuraFlow")
def aura_flow(parts: Parts) -> Made:
    network = d.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        out_channels=4, pos_embed_max_size=256,
    )  # fmt: skip
    pipe = d.AuraFlowPipeline(parts.t5_words, parts.t5("UMT5"), parts.vae(), network, parts.flow())
    return pipe, dict(height=16, width=16, max_sequence_length=24)


@family("Bria")
def bria(parts: Parts) -> Made:
    network = d.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    pipe = d.BriaPipeline(network, parts.flow(), parts.vae(shift_factor=0), parts.t5(), parts.t5_words)
    return pipe, dict(height=16, width=16, max_sequence_length=24, negative_prompt="bad")


@family("Z-Image")
def z_image(parts: Parts) -> Made:
    network = d.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=1, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    encoder = parts.decoder_only("Qwen3", "Qwen3Model", head_dim=8)
    pipe = d.ZImagePipeline(parts.flow(), parts.vae(16), encoder, parts.words, network)
    return pipe, dict(height=16, width=16, max_sequence_length=64)


@family("Lumina 2")
def lumina2(parts: Parts) -> Made:
    network = d.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=1, num_attention_heads=1,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=[4, 2, 2], cap_feat_dim=16,
    )  # fmt: skip
    encoder = parts.decoder_only("Gemma2", "Gemma2Model", head_dim=8)
    pipe = d.Lumina2Pipeline(network, parts.flow(), parts.vae(), encoder, parts.words)
    return pipe, dict(height=16, width=16, max_sequence_length=64)


@family("Sana")
def sana(parts: Parts) -> Made:
    network = d.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
        sample_size=32,
    )  # fmt: skip
    two = dict(
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
    )  # fmt: skip
    vae = d.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, downsample_block_type="conv",
        upsample_block_type="interpolate", **two,
    )  # fmt: skip
    encoder = parts.decoder_only("Gemma2", "Gemma2Model", head_dim=8)
    pipe = d.SanaPipeline(parts.words, encoder, vae, network, parts.flow(shift=7.0))
    return pipe, dict(height=32, width=32, max_sequence_length=16, complex_human_instruction=None)


def _qwen_vl(parts: Parts) -> Any:
    ids = parts.words.convert_tokens_to_ids
    config = t.Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=len(parts.words), max_position_embeddings=512,
            rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        ),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16),
        vision_end_token_id=ids("<|vision_end|>"), vision_start_token_id=ids("<|vision_start|>"),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
    )  # fmt: skip
    return t.Qwen2_5_VLForConditionalGeneration(config).eval()


@family("Qwen-Image")
def qwen_image(parts: Parts) -> Made:
    network = d.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = d.QwenImagePipeline(parts.flow(), vae, _qwen_vl(parts), parts.words, network)
    return pipe, dict(height=16, width=16, max_sequence_length=64, negative_prompt="bad")


def _flux2_vae() -> Any:
    return d.AutoencoderKLFlux2(
        sample_size=32, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,), layers_per_block=1, latent_channels=1, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def _klein(parts: Parts, **call: Any) -> Made:
    network = d.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False,
    )  # fmt: skip
    encoder = parts.decoder_only("Qwen3", "Qwen3ForCausalLM", head_dim=8)
    pipe = d.Flux2KleinPipeline(parts.flow(), _flux2_vae(), encoder, parts.words, network)
    return pipe, dict(height=8, width=8, max_sequence_length=64, text_encoder_out_layers=(1,)) | call


@family("FLUX.2 klein")
def klein(parts: Parts) -> Made:
    return _klein(parts)


@family("FLUX.2 klein with a reference", EDIT)
def klein_edit(parts: Parts) -> Made:
    return _klein(parts, image=picture(size=64))


@family("CogView4")
def cogview4(parts: Parts) -> Made:
    network = d.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    flow = parts.flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True,
        time_shift_type="linear",
    )  # fmt: skip
    encoder = parts.decoder_only("Glm", "GlmForCausalLM", head_dim=8)
    pipe = d.CogView4Pipeline(parts.words, encoder, parts.vae(), network, flow)
    return pipe, dict(height=16, width=16, max_sequence_length=64)


WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, out_channels=16, text_dim=32, freq_dim=64,
    ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip
WAN_CALL = dict(height=16, width=16, num_frames=5, max_sequence_length=24, negative_prompt="bad")


def _wan(
    parts: Parts, kind: str, network: Any, scheduler: Any, call: dict | None = None, **more: Any
) -> Made:
    pipe = getattr(d, kind)(
        tokenizer=parts.t5_words, text_encoder=parts.t5(), vae=parts.wan_vae(), scheduler=scheduler,
        transformer=network, **more,
    )  # fmt: skip
    return pipe, WAN_CALL | (call or {})


@family("Wan 2.1", VIDEO)
def wan(parts: Parts) -> Made:
    return _wan(parts, "WanPipeline", d.WanTransformer3DModel(in_channels=16, **WAN), parts.flow(shift=7.0))


@family("Wan 2.2, two experts", VIDEO)
def wan22(parts: Parts) -> Made:
    first, second = (d.WanTransformer3DModel(in_channels=16, **WAN) for _ in range(2))
    return _wan(parts, "WanPipeline", first, parts.unipc(), transformer_2=second, boundary_ratio=0.875)


@family("Wan 2.2 image-to-video", VIDEO, EDIT)
def wan22_i2v(parts: Parts) -> Made:
    first, second = (d.WanTransformer3DModel(in_channels=36, **WAN) for _ in range(2))
    return _wan(
        parts, "WanImageToVideoPipeline", first, parts.unipc(), dict(image=picture()), transformer_2=second,
        boundary_ratio=0.875,
    )  # fmt: skip


@family("Wan VACE", VIDEO, EDIT)
def wan_vace(parts: Parts) -> Made:
    network = d.WanVACETransformer3DModel(in_channels=16, vace_layers=[0], vace_in_channels=96, **WAN)
    call = dict(video=[picture(i) for i in range(5)], mask=[Image.new("L", (16, 16), 255)] * 5)
    return _wan(parts, "WanVACEPipeline", network, parts.flow(shift=7.0), call)


@family("SkyReels 2", VIDEO)
def skyreels(parts: Parts) -> Made:
    network = d.SkyReelsV2Transformer3DModel(in_channels=16, **WAN)
    return _wan(parts, "SkyReelsV2Pipeline", network, parts.unipc())


LTX_CALL = dict(height=32, width=32, num_frames=9, max_sequence_length=24, negative_prompt="bad")


def _ltx(parts: Parts, kind: str, **call: Any) -> Made:
    network = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=32,
    )  # fmt: skip
    pipe = getattr(d, kind)(parts.flow(), parts.ltx_vae(), parts.t5(), parts.t5_words, network)
    return pipe, LTX_CALL | call


@family("LTX", VIDEO)
def ltx(parts: Parts) -> Made:
    return _ltx(parts, "LTXPipeline")


@family("LTX image-to-video", VIDEO, EDIT)
def ltx_i2v(parts: Parts) -> Made:
    return _ltx(parts, "LTXImageToVideoPipeline", image=picture(size=32))


@family("Mochi", VIDEO)
def mochi(parts: Parts) -> Made:
    network = d.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=1, pooled_projection_dim=16,
        in_channels=12, qk_norm="rms_norm", text_embed_dim=32, time_embed_dim=4, max_sequence_length=24,
    )  # fmt: skip
    vae = d.AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    flow = parts.flow(invert_sigmas=True)
    pipe = d.MochiPipeline(flow, vae, parts.t5(), parts.t5_words, network)
    return pipe, dict(height=16, width=16, num_frames=7, max_sequence_length=24)


@family("LongCat-AudioDiT", SOUND)
def longcat_audio(parts: Parts) -> Made:
    network = d.LongCatAudioDiTTransformer(
        dit_dim=64, dit_depth=1, dit_heads=4, dit_text_dim=32, latent_dim=8, text_conv=False
    )
    for p in (p for p in network.parameters() if not p.any()):
        torch.nn.init.normal_(p, std=0.1)  # its last layers begin at zero
    vae = d.LongCatAudioDiTVae(
        in_channels=1, channels=16, c_mults=[1, 2], strides=[2], latent_dim=8, encoder_latent_dim=16,
        downsampling_ratio=2, sample_rate=2400,
    )  # fmt: skip
    pipe = d.LongCatAudioDiTPipeline(vae, parts.t5("UMT5"), parts.t5_words, network)
    return pipe, dict(audio_duration_s=0.02)


@family("ACE-Step", SOUND)
def ace_step(parts: Parts) -> Made:
    heads = dict(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        sliding_window=16,
    )  # fmt: skip
    network = d.AceStepTransformer1DModel(
        num_hidden_layers=1, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, **heads
    )
    from diffusers.pipelines.ace_step import (
        AceStepAudioTokenDetokenizer,
        AceStepAudioTokenizer,
        AceStepConditionEncoder,
    )

    encoder = AceStepConditionEncoder(
        text_hidden_dim=16, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1, **heads,
    )  # fmt: skip
    pool = dict(
        audio_acoustic_hidden_dim=8, pool_window_size=2, num_attention_pooler_hidden_layers=1, **heads
    )
    vae = d.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=8,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    pipe = d.AceStepPipeline(
        vae=vae, text_encoder=parts.decoder_only("Qwen3", "Qwen3Model", head_dim=8), tokenizer=parts.words,
        transformer=network, condition_encoder=encoder,
        scheduler=parts.flow(num_train_timesteps=1, shift=1.0),
        audio_tokenizer=AceStepAudioTokenizer(
            fsq_dim=32, fsq_input_levels=[4, 4, 4], fsq_input_num_quantizers=1, **pool
        ),
        audio_token_detokenizer=AceStepAudioTokenDetokenizer(**pool),
    )  # fmt: skip
    return pipe, dict(lyrics="la la", audio_duration=0.4, max_text_length=32)
