"""The dtypes that CUDA's autocast gives, on a CPU, whose own autocast leaves more operations in bfloat16."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from orwcfm_fast.torch_private import tree_map

# those of torch's list of CUDA ops that autocast to float32 which transformers and VAEs contain
FLOAT32_OPS = {
    F.group_norm, F.layer_norm, F.rms_norm, F.softmax, Tensor.__pow__, Tensor.norm, Tensor.pow, Tensor.rsqrt,
    Tensor.softmax, Tensor.sum, torch.exp, torch.group_norm, torch.layer_norm, torch.norm, torch.pow,
    torch.rsqrt, torch.softmax, torch.sum,
}  # fmt: skip


class CudaAutocastRules(TorchFunctionMode):
    """Within the CPU's autocast, runs in float32 those ops that CUDA's autocast runs in float32.

    Source: torch's documentation of automatic mixed precision, "CUDA Ops that can autocast to float32".
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FLOAT32_OPS and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_to_float32, (args, kwargs))
            if func is F.rms_norm:
                return _FusedRmsNorm.apply(args[0], args[2] if len(args) > 2 else kwargs.get("weight"))
        if func in (
            torch.cat,
            torch.stack,
        ):  # the CPU's autocast would first copy all inputs to the widest dtype
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def recompute(module: torch.nn.Module, *args: Any) -> Any:
    """Gradient checkpointing that enters `CudaAutocastRules` again in the backward pass, which runs outside of it."""
    return checkpoint(
        module.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), CudaAutocastRules())
    )


class _FusedRmsNorm(torch.autograd.Function):
    """Saves for backward what CUDA's fused op saves; the CPU's five ops save more. Only shapes matter, no values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _to_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x
