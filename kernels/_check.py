"""What every launcher asks of its arguments: shapes, dtypes, devices, layout; never a value (a sync)."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_samples(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """x is [B, ...] with at least one element, of a known dtype, contiguous or channels_last."""
    if x.dtype not in dtypes:
        raise ValueError(
            f"{name} has dtype {x.dtype}, expected {' or '.join(dict.fromkeys(map(str, dtypes)))}"
        )
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [B, ...] with at least one element")
    if not (x.is_contiguous() or is_channels_last(x)):
        raise ValueError(f"{name} has strides {x.stride()}, expected contiguous or channels_last")


def check_like(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """x has like's shape and device."""
    if x.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, {like_name} has {tuple(like.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, {like_name} on {like.device}")


def check_tensor(
    name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """x is contiguous, with this dtype, shape and device."""
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()}, "
            f"expected contiguous {dtype} {tuple(shape)}"
        )
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the samples on {device}")


def check_counters(seed: Tensor, index: Tensor, samples: Tensor) -> None:
    """seed is a 0-d and index a [B] int64 tensor on the samples' device."""
    check_tensor("seed", seed, torch.int64, (), samples.device)
    check_tensor("index", index, torch.int64, (samples.shape[0],), samples.device)


def refuse_grad(needs_grad, names: tuple[str, ...], op: str) -> None:
    """No argument of these may require a gradient: op has none for it, and would give a silent 0."""
    for name, needed in zip(names, needs_grad, strict=True):
        if needed:
            raise ValueError(f"{name} requires grad, and {op} gives it none; pass {name}.detach()")


def is_channels_last(x: Tensor) -> bool:
    """Stored as [B, spatial ..., C]."""
    return x.ndim > 2 and x.movedim(1, -1).is_contiguous()
