"""The one list of what is measured: ops, the eager code that they replace, dtypes and sizes."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from orwcfm_fast.kernels.anchored_residual import anchored_residual, anchored_residual_reference
from orwcfm_fast.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from orwcfm_fast.kernels.interpolate import interpolate, interpolate_reference
from orwcfm_fast.kernels.philox import X0
from orwcfm_fast.kernels.random_numbers import normal

Inputs = dict[str, Tensor]


def eager_interpolate(x1: Tensor, t: Tensor, **_) -> Tensor:
    """x_t as a plain loop computes it, x0 from torch's generator."""
    t = t.view(-1, *[1] * (x1.ndim - 1))
    return ((1 - t) * torch.randn_like(x1) + t * x1).to(x1.dtype)


def eager_loss(v: Tensor, v_ref: Tensor, x1: Tensor, x0: Tensor, w: Tensor, a: Tensor, **_) -> Tensor:
    """The objective's loss [B] as a plain loop computes it, x0 kept from the step's start."""
    v = v.float()
    fm = (v - (x1.float() - x0.float())).square().flatten(1).mean(1)
    return w * fm + a * (v - v_ref.float()).square().flatten(1).mean(1)


def loss_and_gradient(
    v: Tensor, v_ref: Tensor, x1: Tensor, x0: Tensor, w: Tensor, a: Tensor, **_
) -> tuple[Tensor, Tensor]:
    """`eager_loss` and its gradient by v, written out, for torch.compile to fuse."""
    scale = 2 * len(v) / v.numel()
    residual, drift = v.float() - (x1.float() - x0.float()), v.float() - v_ref.float()
    fm, w2 = (x.square().flatten(1).mean(1) for x in (residual, drift))
    per_sample = (-1, *[1] * (v.ndim - 1))
    dv = scale * (w.view(per_sample) * residual + a.view(per_sample) * drift)
    return w * fm + a * w2, dv.to(v.dtype)


def _groups(x: Tensor) -> int:
    return math.gcd(32, x.shape[1])


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Our GroupNorm and SiLU."""
    return group_norm_silu(x, weight, bias, _groups(x), True)[0]


def norm_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`norm` in plain torch."""
    return group_norm_silu_reference(x, weight, bias, _groups(x), True)[0]


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor, **_) -> Tensor:
    """torch's GroupNorm and SiLU, in x's dtype."""
    return F.silu(F.group_norm(x, _groups(x), weight.to(x.dtype), bias.to(x.dtype)))


class Op(NamedTuple):
    """One op of ours and what it replaces.

    floor: bytes an element of one pass over memory, in units of (the dtype's, x1's dtype's) size.
    result: the output that is held to float64; eager's gradient is held to the same.
    by_hand: loss and gradient without autograd, for torch.compile.
    maps: whether it is for feature maps, with parameters of their own.
    """

    ours: Callable
    reference: Callable
    eager: Callable
    names: tuple[str, ...]
    passes: tuple[str, ...]
    floor: tuple[int, int]
    result: Callable[..., Tensor]
    by_hand: Callable | None = None
    maps: bool = False


OPS = {
    "interpolate": Op(
        interpolate,
        interpolate_reference,
        eager_interpolate,
        ("x1", "t", "seed", "index"),
        ("forward",),
        (0, 2),
        lambda x_t: x_t,
    ),
    "anchored_residual": Op(
        anchored_residual,
        anchored_residual_reference,
        eager_loss,
        ("v", "v_ref", "x1", "seed", "index", "w", "a"),
        ("forward", "forward+backward"),
        (3, 1),
        lambda loss, fm, w2, dv: dv,
        by_hand=loss_and_gradient,
    ),
    "group_norm_silu": Op(
        norm,
        norm_reference,
        eager_norm,
        ("x", "weight", "bias"),
        ("forward",),
        (2, 0),
        lambda y: y,
        maps=True,
    ),
}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"fp32": (FP32, FP32), "bf16": (BF16, BF16), "fp16": (FP16, FP16), "bf16, x1 fp32": (BF16, FP32)}
DIGITS, CIFAR = (256, 1, 8, 8), (128, 3, 32, 32)
MAPS = (64, 64, 8, 8), (16, 128, 32, 32)  # of the digits U-Net, and of CIFAR-10's


class Case(NamedTuple):
    """One op at one precision and size."""

    op: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {'x'.join(map(str, self.shape))}"

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def floor_bytes(self) -> int:
        """What one pass over memory must move."""
        (dtype, x1_dtype), (n, m) = DTYPES[self.dtype], OPS[self.op].floor
        return self.elements * (n * dtype.itemsize + m * x1_dtype.itemsize)

    def inputs(self, device: str | torch.device) -> Inputs:
        """Arguments of the op and of its eager form, by name; w and a positive; x0 is the counted noise."""
        dtype, x1_dtype = DTYPES[self.dtype]
        batch, g = self.shape[0], torch.Generator(device=device).manual_seed(0)

        def randn(shape, dtype):
            return torch.randn(shape, generator=g, device=device, dtype=dtype)

        seed, index = torch.tensor(7, device=device), torch.arange(batch, device=device)
        w, a, t = (torch.rand(batch, generator=g, device=device) + 0.5 for _ in range(3))
        if OPS[self.op].maps:
            x = randn(self.shape, dtype).to(memory_format=torch.channels_last)
            return {"x": x, "weight": randn(self.shape[1], FP32), "bias": randn(self.shape[1], FP32)}
        found = {"x1": randn(self.shape, x1_dtype), "t": t - 0.5, "seed": seed, "index": index}
        if self.op == "anchored_residual":
            found |= {"v": randn(self.shape, dtype), "v_ref": randn(self.shape, dtype), "w": w, "a": a}
            found["x0"] = torch.empty_like(found["x1"])
            for i in range(0, batch, 4096):  # torch's noise takes room
                found["x0"][i : i + 4096] = normal(self.shape[1:], seed, index[i : i + 4096], X0, x1_dtype)
        return found


def cases(device: str | torch.device, short: bool) -> Iterator[Case]:
    """short: a digit batch and a CIFAR-10 batch (on a GPU 256 MiB too); else all dtypes, on a GPU to 2 GiB."""
    cuda = torch.device(device).type == "cuda"
    sizes = ([2**28] if short else [2**24, 2**28, 2**31]) if cuda else []
    for op in OPS:
        for dtype, (kind, x1_kind) in DTYPES.items():
            if op != "anchored_residual" and kind != x1_kind:
                continue
            if short and dtype not in (("fp32", "bf16") if cuda else ("fp32",)):
                continue
            if OPS[op].maps:
                yield from (Case(op, dtype, shape) for shape in MAPS)
                continue
            large = [(size // (3072 * kind.itemsize), 3, 32, 32) for size in sizes]
            for shape in large[-2:-1] if cuda and dtype == "fp16" else [DIGITS, CIFAR, *large]:
                yield Case(op, dtype, shape)
