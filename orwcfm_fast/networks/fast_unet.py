"""torchcfm's UNet (guided-diffusion, Dhariwal & Nichol 2021) with the same weights and a faster body.

Same constructor arguments, same state-dict keys and the same initial weights from the same seed as
`torchcfm.models.unet.UNetModelWrapper` 1.0.7. Activations are channels_last throughout; attention is
scaled_dot_product_attention on tokens that are views of them; nothing is cast to float32 and back.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orwcfm_fast.networks.group_norm import GroupNorm
from orwcfm_fast.networks.unet_blocks import AttentionBlock, Block, Downsample, ResBlock, Upsample, zeroed

CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
    28: (1, 2, 2),
}


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """[cos, sin] of t · 10000^(−i/half), i < half = dim // 2; t [B] → float32 [B, dim]."""
    half = dim // 2
    frequency = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half)
    )
    angle = t.float()[:, None] * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, dim % 2))


class FastUNet(nn.Module):
    """Velocity network v(t, x[, y]); a drop-in for torchcfm's UNetModelWrapper.

    Args:
        dim: (C, H, W) of a sample.
        num_channels: width; times `channel_mult` (by image size where None), each level's is a multiple of 32.
        num_res_blocks: residual blocks a level.
        learn_sigma: twice the output channels.
        class_cond, num_classes: labels as a third argument.
        use_checkpoint: recompute each block in backward: less memory, a third more time.
        attention_resolutions: "16,8": attention where the image has that height.
        num_heads, num_head_channels, num_heads_upsample: attention heads; num_head_channels wins if not −1.
        use_scale_shift_norm, resblock_updown, use_new_attention_order: as in guided-diffusion.
        dropout: in train mode only.
        use_fp16: refused; use autocast, or `.to(torch.bfloat16)` for a network that is not trained.

    Raises:
        ValueError: no channel_mult known for the image size; heads that do not divide; use_fp16.
    """

    leaves_casts_to_autocast = True

    def __init__(
        self,
        dim: Sequence[int],
        num_channels: int,
        num_res_blocks: int,
        channel_mult: Sequence[float] | None = None,
        learn_sigma: bool = False,
        class_cond: bool = False,
        num_classes: int = 1000,
        use_checkpoint: bool = False,
        attention_resolutions: str = "16",
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        dropout: float = 0.0,
        resblock_updown: bool = False,
        use_fp16: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        if use_fp16:
            raise ValueError("use_fp16: FastUNet runs in half precision by autocast or .to(torch.bfloat16)")
        size = dim[-1]
        if channel_mult is None and size not in CHANNEL_MULT:
            raise ValueError(f"channel_mult: no default for image size {size}; give one, e.g. (1, 2, 2)")
        mult = [int(m * num_channels) for m in channel_mult or CHANNEL_MULT[size]]
        attention = {size // int(resolution) for resolution in attention_resolutions.split(",")}
        emb_channels = 4 * num_channels
        self.num_channels, self.use_checkpoint = num_channels, use_checkpoint
        self.num_classes = num_classes if class_cond else None

        def res(channels: int, out: int, resample: nn.Module | None = None) -> ResBlock:
            return ResBlock(channels, emb_channels, dropout, out, use_scale_shift_norm, resample)

        def attend(channels: int, heads: int) -> AttentionBlock:
            return AttentionBlock(channels, heads, num_head_channels, use_new_attention_order)

        self.time_embed = nn.Sequential(
            nn.Linear(num_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if self.num_classes is not None:
            self.label_emb = nn.Embedding(self.num_classes, emb_channels)

        channels, factor = mult[0], 1
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(dim[0], channels, 3, padding=1))])
        skips = [channels]
        for level, out in enumerate(mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(channels, out)]
                channels = out
                if factor in attention:
                    layers.append(attend(channels, num_heads))
                self.input_blocks.append(Block(*layers))
                skips.append(channels)
            if level < len(mult) - 1:
                down = (
                    res(channels, channels, nn.AvgPool2d(2))
                    if resblock_updown
                    else Downsample(channels, True)
                )
                self.input_blocks.append(Block(down))
                skips.append(channels)
                factor *= 2
        self.middle_block = Block(
            res(channels, channels), attend(channels, num_heads), res(channels, channels)
        )
        self.output_blocks = nn.ModuleList()
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        for level, out in reversed(list(enumerate(mult))):
            for i in range(num_res_blocks + 1):
                layers = [res(channels + skips.pop(), out)]
                channels = out
                if factor in attention:
                    layers.append(attend(channels, heads_up))
                if level and i == num_res_blocks:
                    up = nn.Upsample(scale_factor=2)
                    layers.append(
                        res(channels, channels, up) if resblock_updown else Upsample(channels, True)
                    )
                    factor //= 2
                self.output_blocks.append(Block(*layers))
        out_channels = 2 * dim[0] if learn_sigma else dim[0]
        self.out = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), zeroed(nn.Conv2d(mult[0], out_channels, 3, padding=1))
        )

    def forward(self, t: Tensor | float, x: Tensor, y: Tensor | None = None) -> Tensor:
        """t [B] or a number in [0, 1]; x [B, C, H, W]; labels y [B] if class-conditional → velocity like x.

        One t for the whole batch (a number, 0-d or expanded) is cheaper than B equal ones. The output has x's memory
        format, and the dtype of the computation: autocast's, else that of the weights.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError("y: labels are needed if, and only if, the model is class-conditional")
        dtype = cast(Tensor, self.time_embed[0].weight).dtype
        t = torch.as_tensor(t, device=x.device)
        one_time = t.dim() == 0 or t.stride(0) == 0
        t = t.reshape(-1)[:1] if one_time else t.reshape(t.shape[0], -1)[:, 0]
        emb = self.time_embed(timestep_embedding(t, self.num_channels).to(dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        emb = F.silu(emb)
        h = x.to(dtype).contiguous(memory_format=torch.channels_last)
        skips = []
        for block in self.input_blocks:
            h = self._run(block, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb)
        h = self.out[2](self.out[0](h, silu=True))
        return h if x.is_contiguous(memory_format=torch.channels_last) else h.contiguous()

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, h, emb, use_reentrant=False))
        return cast(Tensor, block(h, emb))


class PatchUNet(FastUNet):
    """A FastUNet that sees each patch of p×p pixels as one pixel of p² times the channels.

    Args:
        dim: (C, H, W) of a sample; p divides H and W.
        patch: p.
        arguments: those of FastUNet, whose image is (C·p², H/p, W/p).
    """

    def __init__(self, dim: Sequence[int], patch: int, **arguments) -> None:
        channels, height, width = dim
        super().__init__((channels * patch**2, height // patch, width // patch), **arguments)
        self.patch = patch

    def forward(self, t: Tensor | float, x: Tensor, y: Tensor | None = None) -> Tensor:
        """As FastUNet's, of the whole image."""
        return F.pixel_shuffle(super().forward(t, F.pixel_unshuffle(x, self.patch), y), self.patch)
