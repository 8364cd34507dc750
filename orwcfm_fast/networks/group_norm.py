"""GroupNorm, then SiLU, of channels_last maps, in the type of the map."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orwcfm_fast.kernels.group_norm_silu import group_norm_silu


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
            # one layout for both: torch 2.11 is silently wrong where they differ
            x32, g = (a.float().contiguous(memory_format=torch.channels_last) for a in (part, g))
            b = len(part)
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
    """A map a few samples at a time, about half a million numbers."""
    return x.split(max(1, 2**19 // x[0].numel()))


def _native_forward(x: Tensor) -> bool:
    """Whether torch's own bf16 kernel is the faster one, as it is on large maps."""
    return x.shape[2] * x.shape[3] > 256


class GroupNorm(nn.GroupNorm):
    """32 groups, eps 1e-5, computed in float32 and returned in the dtype of x; then SiLU where requested."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        if x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
            return cast(Tensor, group_norm_silu(x, self.weight, self.bias, 32, silu, self.eps)[0])
        # on a CPU torch's own kernels are as fast as the op's reference, measured over a training step
        train = torch.is_grad_enabled()
        narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[1] < 512
        if narrow and (train or not _native_forward(x)):
            return cast(Tensor, _Float32Norm.apply(x, self.weight.float(), self.bias.float(), silu))
        h = F.group_norm(x, 32, self.weight, self.bias)
        return F.silu(h, inplace=not train) if silu else h
