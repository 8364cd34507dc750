"""Tiny random pipelines that make videos, built from diffusers' own classes."""

from typing import Any

import diffusers as d
from PIL import Image
from tiny_parts import EDIT, VIDEO, Made, Parts, family, picture

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
