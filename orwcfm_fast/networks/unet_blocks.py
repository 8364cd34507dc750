"""Blocks of torchcfm's UNet, with its state-dict keys, on channels_last maps."""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orwcfm_fast.networks.group_norm import GroupNorm

M = TypeVar("M", bound=nn.Module)


def zeroed(module: M) -> M:
    """The module with all its parameters set to zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v over tokens; [B, heads, L, d]."""
    if (
        q.device.type == "cpu" and q.dtype == torch.bfloat16
    ):  # torch's CPU flash attention runs at half this speed
        return torch.matmul((q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1), v)
    return F.scaled_dot_product_attention(q, k, v)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution as one matrix product, which a channels_last map is ready for; weight [out, in]."""
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


class PositionConv(nn.Conv1d):
    """Conv1d with kernel 1 over the positions of a map [B, C, H, W], with guided-diffusion's state-dict keys."""

    def forward(self, x: Tensor) -> Tensor:
        return _pointwise(x, self.weight[..., 0], self.bias)


class PixelConv(nn.Conv2d):
    """Conv2d with kernel 1."""

    def forward(self, x: Tensor) -> Tensor:
        return _pointwise(x, self.weight[..., 0, 0], self.bias)


class Downsample(nn.Module):
    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # which would copy the map to float32 and back
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + emb))), resampled in between where `resample` is given."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        scale_shift: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample, self.scale_shift = resample, scale_shift
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, (2 if scale_shift else 1) * out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else PixelConv(channels, out_channels, 1)

    def forward(self, x: Tensor, silu_emb: Tensor) -> Tensor:
        """x [B, C, H, W], silu_emb [B or 1, E] → [B, out, H', W']."""
        norm_in, _, conv_in = cast(Any, self.in_layers)
        norm_out, _, dropout, conv_out = cast(Any, self.out_layers)
        h = norm_in(x, silu=True)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        emb = self.emb_layers[1](silu_emb)
        if self.scale_shift:
            scale, shift = emb[..., None, None].chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, norm_out(conv_in(h)), 1 + scale))
        else:
            if emb.shape[0] == 1 and isinstance(
                conv_in, nn.Conv2d
            ):  # not adapted; one time for the batch is a bias
                bias = cast(Tensor, conv_in.bias).to(emb.dtype) + emb[0]
                h = F.conv2d(h, conv_in.weight, bias, padding=1)
            else:
                h = conv_in(h).add_(emb[..., None, None])
            h = norm_out(h, silu=True)
        return conv_out(dropout(h)).add_(self.skip_connection(x))


class AttentionBlock(nn.Module):
    """x + proj(attention(norm(x))) over the H·W positions."""

    def __init__(self, channels: int, num_heads: int, num_head_channels: int, split_qkv_first: bool) -> None:
        super().__init__()
        if num_head_channels != -1 and channels % num_head_channels:
            raise ValueError(f"num_head_channels {num_head_channels} does not divide {channels} channels")
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        self.split_qkv_first = split_qkv_first
        self.norm = GroupNorm(channels)
        self.qkv = PositionConv(channels, 3 * channels, 1)
        self.proj_out = zeroed(PositionConv(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [B, HW, 3C], a view of channels_last
        if self.split_qkv_first:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = qkv.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        h = _attention(q, k, v).transpose(1, 2).reshape(b, height, width, c).permute(0, 3, 1, 2)
        return self.proj_out(h).add_(x)


class Block(nn.Sequential):
    """Layers of one level; ResBlocks see the time embedding."""

    def forward(self, h: Tensor, silu_emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            h = layer(h, silu_emb) if isinstance(layer, ResBlock) else layer(h)
        return h
