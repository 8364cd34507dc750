"""Tiny random pipelines that make sound, built from diffusers' own classes."""

import diffusers as d
import torch
from tiny_parts import SOUND, Made, Parts, family


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
