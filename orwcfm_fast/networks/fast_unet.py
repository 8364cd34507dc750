"""torchcfm's UNet (guided-diffusion, Dhariwal & Nichol 2021) with the same weights and a faster body.

Same constructor arguments, same state-dict keys and the same initial weights from the same seed as
`torchcfm.models.unet.UNetModelWrapper` 1.0.7. Activations are channels_last throughout; attention is
scaled_dot_product_attention on tokens that are views of them; nothing is cast to float32 and back.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

M = TypeVar("M", bound=nn.Module)

CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
    28: (1, 2, 2),
}


def _zeroed(module: M) -> M:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """[cos, sin] of t · 10000^(−i/half), i < half = dim // 2; t [B] → float32 [B, dim]."""
    half = dim // 2
    frequency = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half)
    )
    angle = t.float()[:, None] * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, dim % 2))


class _Float32Norm(torch.autograd.Function):
    """GroupNorm (and SiLU) of a channels_last bf16 map by float32 kernels; saves x alone.

    torch's own channels_last bf16 kernels on the CPU are 5 to 7 times slower where a group is a few channels. In
    pieces that stay in the cache: float32 copies of whole maps cost more in page faults than the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.silu = silu
        if _native_forward(x):
            h = F.group_norm(x, 32, weight, bias)
            return F.silu(h, inplace=True) if silu else h
        out = torch.empty_like(x)
        for part, to in zip(*(_pieces(a) for a in (x, out)), strict=True):
            h = F.group_norm(part.float(), 32, weight, bias)
            to.copy_(F.silu(h, inplace=True) if silu else h)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias = ctx.saved_tensors
        c, size = x.shape[1], x.shape[2] * x.shape[3]
        dx, dw, db = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
        for part, g, to in zip(*(_pieces(a) for a in (x, grad, dx)), strict=True):
            b, x32, g = len(part), part.float(), g.float().contiguous(memory_format=torch.channels_last)
            y, mean, rstd = torch.native_group_norm(x32, weight, bias, b, c, size, 32, 1e-5)
            if ctx.silu:
                g = torch.ops.aten.silu_backward(g, y)
            found = torch.ops.aten.native_group_norm_backward(
                g, x32, mean, rstd, weight, b, c, size, 32, [True, True, True]
            )
            to.copy_(found[0])
            dw.add_(found[1])
            db.add_(found[2])
        return dx, dw, db, None


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """A map in runs of samples of about half a million numbers."""
    return x.split(max(1, 2**19 // x[0].numel()))


def _native_forward(x: Tensor) -> bool:
    """Whether torch's own bf16 kernel is the faster one: on large maps."""
    return x.shape[2] * x.shape[3] > 256


class GroupNorm(nn.GroupNorm):
    """32 groups, eps 1e-5, in the dtype of x; then SiLU if asked."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        train = torch.is_grad_enabled()
        narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[1] < 512
        if narrow and (train or not _native_forward(x)):
            return cast(Tensor, _Float32Norm.apply(x, self.weight.float(), self.bias.float(), silu))
        if x.is_cuda:
            with torch.autocast("cuda", enabled=False):  # which would return float32
                h = F.group_norm(x, 32, self.weight.to(x.dtype), self.bias.to(x.dtype))
        else:
            h = F.group_norm(x, 32, self.weight, self.bias)
        return F.silu(h, inplace=not train) if silu else h


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v over tokens; [B, heads, L, d]."""
    if (
        q.device.type == "cpu" and q.dtype == torch.bfloat16
    ):  # torch's CPU flash attention runs at half this speed
        return torch.matmul((q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1), v)
    return F.scaled_dot_product_attention(q, k, v)


class Pointwise(nn.Conv1d):
    """Conv1d over the positions of a map [B, C, H, W]: guided-diffusion's keys, no reshaping."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[..., None], self.bias)


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
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


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
            _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

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
            if emb.shape[0] == 1 and not conv_in._forward_hooks:  # one time for the batch: it is a bias
                h = F.conv2d(h, conv_in.weight, conv_in.bias + emb[0], padding=1)
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
        self.qkv = Pointwise(channels, 3 * channels, 1)
        self.proj_out = _zeroed(Pointwise(channels, channels, 1))

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
            GroupNorm(channels), nn.SiLU(), _zeroed(nn.Conv2d(mult[0], out_channels, 3, padding=1))
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
