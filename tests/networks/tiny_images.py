"""Tiny random pipelines that make images, built from diffusers' own classes."""

from typing import Any

import diffusers as d
import torch
import transformers as t
from PIL import Image
from tiny_parts import EDIT, HEADS, Made, Parts, family, picture


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
