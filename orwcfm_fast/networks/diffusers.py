"""Text-to-image pipelines of diffusers, SD3, SD3.5 and FLUX, as policies.

diffusers has x_σ = σ·noise + (1 − σ)·data with σ from 1 to 0, and its network gives dx/dσ = noise − data. Here
t = 1 − σ runs from 0 to 1, x_t = (1 − t)·x0 + t·x1, and

    v(t, x | prompt) = dx/dt = data − noise = −output(σ = 1 − t, x, prompt)

The network is told 1000·σ by SD3, and σ by FLUX, which multiplies itself. A pipeline's shifted schedule σ_0 … σ_n is
the time grid 1 − σ_i (`--grid own`). FLUX sees latents [C, H, W] as H/2·W/2 tokens of 4·C values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orwcfm_fast.errors import UserError

PREFIX = "diffusers:"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


class SD3Velocity(nn.Module):
    """v(t, x, embeds, pooled) of an SD3Transformer2DModel; x latents [B, C, H, W], t [B]."""

    kind: ClassVar = "StableDiffusion3Pipeline"
    transformer_kind: ClassVar = "SD3Transformer2DModel"
    own_tokens: ClassVar = 256
    clip_tokens: ClassVar = True  # beside T5's
    by_difference: ClassVar = True  # takes classifier-free guidance

    def __init__(self, transformer: nn.Module, guidance: float = 1.0) -> None:
        super().__init__()
        self.transformer, self.guidance = transformer, guidance

    def forward(self, t: Tensor, x: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        like = next(self.transformer.parameters()).dtype
        return -self.transformer(
            hidden_states=x.to(like), timestep=1000 * (1 - t), encoder_hidden_states=embeds.to(like),
            pooled_projections=pooled.to(like), return_dict=False,
        )[0]  # fmt: skip

    @staticmethod
    def channels(config: Any) -> int:
        """Of the latents."""
        return config["in_channels"]

    @staticmethod
    def patch(config: Any) -> int:
        """Latents, along one side, that make a token."""
        return config["patch_size"]

    @staticmethod
    def own_side(config: Any) -> int:
        """Of the latents, where no image size is asked for."""
        return config["sample_size"]

    @staticmethod
    def embeds_guidance(config: Any) -> bool:
        return False

    @staticmethod
    def first_sigmas(steps: int) -> Sequence[float] | None:
        """Before the scheduler shifts them; None: its own."""
        return None

    @staticmethod
    def encode(pipeline: Any, texts: list[str], tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings [P, tokens + CLIP's, …] and pooled [P, …] by the pipeline's text encoders."""
        found = pipeline.encode_prompt(
            texts, None, None, device, do_classifier_free_guidance=False, max_sequence_length=tokens
        )
        return found[0], found[2]


class FluxVelocity(nn.Module):
    """v(t, x, embeds, pooled) of a FluxTransformer2DModel; x latents [B, C, H, W], t [B].

    Args:
        guidance: embedded, where the transformer was distilled with guidance (FLUX.1-dev).
    """

    kind: ClassVar = "FluxPipeline"
    transformer_kind: ClassVar = "FluxTransformer2DModel"
    own_tokens: ClassVar = 512
    clip_tokens: ClassVar = False
    by_difference: ClassVar = False  # distilled

    def __init__(self, transformer: nn.Module, guidance: float = 1.0) -> None:
        super().__init__()
        self.transformer, self.guidance = transformer, guidance
        self.embedded = self.embeds_guidance(transformer.config)

    def forward(self, t: Tensor, x: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        like = next(self.transformer.parameters()).dtype
        packed = F.pixel_unshuffle(x.to(like), 2)
        rows, columns = (torch.arange(n, device=x.device, dtype=torch.float32) for n in packed.shape[2:])
        places = torch.cartesian_prod(rows, columns)
        out = self.transformer(
            hidden_states=packed.flatten(2).transpose(1, 2), timestep=1 - t,
            guidance=torch.full_like(t, self.guidance) if self.embedded else None,
            encoder_hidden_states=embeds.to(like), pooled_projections=pooled.to(like),
            txt_ids=places.new_zeros(embeds.shape[1], 3), img_ids=F.pad(places, (1, 0)), return_dict=False,
        )[0]  # fmt: skip
        return -F.pixel_shuffle(out.transpose(1, 2).unflatten(2, packed.shape[2:]), 2)

    @staticmethod
    def channels(config: Any) -> int:
        return config["in_channels"] // 4

    @staticmethod
    def patch(config: Any) -> int:
        return 2

    @staticmethod
    def own_side(config: Any) -> int:
        return 128

    @staticmethod
    def embeds_guidance(config: Any) -> bool:
        return bool(config["guidance_embeds"])

    @staticmethod
    def first_sigmas(steps: int) -> Sequence[float] | None:
        return [1 - i / steps for i in range(steps)]

    @staticmethod
    def encode(pipeline: Any, texts: list[str], tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        embeds, pooled, _ = pipeline.encode_prompt(texts, None, device, max_sequence_length=tokens)
        return embeds, pooled


def embedding_widths(config: Any) -> tuple[int, int]:
    """Of embeddings and of pooled ones."""
    return config["joint_attention_dim"], config["pooled_projection_dim"]


Family = type[SD3Velocity] | type[FluxVelocity]
FAMILIES: dict[str, Family] = {f.kind: f for f in (SD3Velocity, FluxVelocity)}


@dataclass(frozen=True)
class Pipeline:
    """What stands around a pipeline's network: the schedule before it, the VAE behind it.

    Attributes:
        family: of the network; patches: tokens of an image.
        options: how it was asked to be, for checkpoints: guidance, image_size, prompt_tokens.
    """

    family: Family
    vae: Any
    scheduler: Any
    patches: int
    vae_chunk: int
    precision: torch.dtype
    options: dict[str, Any]

    def times(self, steps: int) -> list[float]:
        """The pipeline's own grid: `steps` + 1 times from 0 to 1."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        of, more = self.scheduler.config, {}
        if of.use_dynamic_shifting:
            more["mu"] = calculate_shift(
                self.patches, of.base_image_seq_len, of.max_image_seq_len, of.base_shift, of.max_shift
            )
        scheduler.set_timesteps(steps, sigmas=self.family.first_sigmas(steps), **more)
        return [1 - sigma for sigma in scheduler.sigmas.tolist()]

    def decode(self, x1: Tensor) -> Tensor:
        """Images [B, 3, 8·H, 8·W] in [-1, 1] of latents [B, C, H, W], a chunk at a time."""
        config = self.vae.config
        parts = []
        with torch.no_grad(), torch.autocast(x1.device.type, self.precision, self.precision != torch.float32):
            for part in x1.split(self.vae_chunk):
                part = part / config.scaling_factor + (config.shift_factor or 0.0)
                parts.append(self.vae.decode(part, return_dict=False)[0].float().clamp_(-1, 1))
        return torch.cat(parts)


def is_pipeline(model: str) -> bool:
    return model.startswith(PREFIX)


def library() -> Any:
    """diffusers, and quiet.

    Raises:
        UserError: the extra is missing; says how to install it.
    """
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise UserError(
            f"model diffusers:…: {error.name or error} is missing: pip install 'orwcfm-fast[diffusers]'"
        ) from None
    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return diffusers
