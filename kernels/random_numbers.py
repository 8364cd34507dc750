"""Uniform numbers, normal numbers and choices of counted noise, drawn in one launch.

word = Philox4x32-10(seed; element // 4, purpose, index)[element % 4]
uniform = its leading bits / 2^bits        normal: Box-Muller on pairs of words        choice = floor(n * uniform)
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orwcfm_fast.kernels._check import check_tensor
from orwcfm_fast.kernels._launch import Launch
from orwcfm_fast.kernels._triton import tl, triton
from orwcfm_fast.kernels.philox import (
    MASK,
    box_muller,
    four_normals_kernel,
    philox4x32,
    unit_kernel,
    words_kernel,
)

BLOCK = 128  # counters a program
# counters that the reference works on at a time, so that temporaries stay in a CPU's cache, or below a GiB
_CACHED, _LARGE = 1 << 15, 1 << 22


@triton.jit
def _draw_kernel(
    seed_ptr,
    index_ptr,
    out_ptr,
    elements,
    quads,
    total,
    n,
    PURPOSE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Elements 4q to 4q + 3 of a sample are one of its `quads` counters, `total` counters in all."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    counter = program * BLOCK + lane
    live = counter < total
    sample = counter // quads
    quad = counter - sample * quads
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + sample, live, 0)
    if KIND == "normal":
        z0, z1, z2, z3 = four_normals_kernel(quad.to(tl.uint32), seed, index, PURPOSE)
    else:
        w0, w1, w2, w3 = words_kernel(quad.to(tl.uint32), seed, index, PURPOSE)
        z0, z1, z2, z3 = (
            unit_kernel(w0, BITS),
            unit_kernel(w1, BITS),
            unit_kernel(w2, BITS),
            unit_kernel(w3, BITS),
        )
    if KIND == "choice":
        tl.store(out_ptr + sample, tl.minimum((z0 * n).to(tl.int64), n - 1), live)
    elif WHOLE:  # no sample ends within a counter: the numbers lie in a row
        z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3)).to(out_ptr.dtype.element_ty)
        at = 4 * program.to(tl.int64) * BLOCK + tl.arange(0, 4 * BLOCK)
        tl.store(out_ptr + at, z, at < 4 * total.to(tl.int64))
    else:
        first = 4 * quad
        at = out_ptr + sample.to(tl.int64) * elements + first
        tl.store(at, z0.to(out_ptr.dtype.element_ty), live)
        tl.store(at + 1, z1.to(out_ptr.dtype.element_ty), live & (first + 1 < elements))
        tl.store(at + 2, z2.to(out_ptr.dtype.element_ty), live & (first + 2 < elements))
        tl.store(at + 3, z3.to(out_ptr.dtype.element_ty), live & (first + 3 < elements))


def _bits(dtype: torch.dtype) -> int:
    """Leading bits of a word that a number of this type holds, at most 24."""
    return min(24, 1 - round(math.log2(torch.finfo(dtype).eps)))


def _draw(
    transform: Callable[[tuple[Tensor, ...]], Sequence[Tensor]],
    shape: Sequence[int],
    seed: Tensor | int,
    index: Tensor,
    purpose: int,
    dtype: torch.dtype,
) -> Tensor:
    n = math.prod(shape)
    quads = -(-n // 4)
    out = torch.empty(index.shape[0], n, dtype=dtype, device=index.device)
    rows = max(1, (_CACHED if index.device.type == "cpu" else _LARGE) // max(1, quads))
    c0 = torch.arange(quads, device=index.device)[None]
    for start in range(0, index.shape[0], rows):
        i = index[start : start + rows, None]
        words = philox4x32(c0, purpose, i & MASK, (i >> 32) & MASK, seed)
        out[start : start + rows] = torch.stack(transform(words), dim=-1).flatten(1)[:, :n]  # type: ignore[arg-type]
    return out.view(index.shape[0], *shape)


def normal_reference(
    shape: Sequence[int], seed: Tensor | int, index: Tensor, purpose: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`normal` in plain torch; the CPU path, and what tests compare with."""
    return _draw(
        lambda w: (*box_muller(w[0], w[1]), *box_muller(w[2], w[3])), shape, seed, index, purpose, dtype
    )


def uniform_reference(
    shape: Sequence[int], seed: Tensor | int, index: Tensor, purpose: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`uniform` in plain torch."""
    bits = _bits(dtype)
    return _draw(
        lambda words: [(word >> (32 - bits)).to(dtype) * 2.0**-bits for word in words],
        shape,
        seed,
        index,
        purpose,
        dtype,
    )


def choice_reference(n: int, seed: Tensor | int, index: Tensor, purpose: int) -> Tensor:
    """`choice` in plain torch."""
    return (uniform_reference((1,), seed, index, purpose)[:, 0] * n).long().clamp_(max=n - 1)


def _check(seed: Tensor, index: Tensor) -> None:
    check_tensor("index", index, torch.int64, tuple(index.shape[:1]), index.device)
    check_tensor("seed", seed, torch.int64, (), index.device)


def plan_draw(
    kind: str,
    shape: Sequence[int],
    seed: Tensor,
    index: Tensor,
    purpose: int,
    dtype: torch.dtype,
    n: int = 1,
) -> tuple[list[Launch], Tensor]:
    """The kernel call for kind "normal", "uniform" or "choice" (of n), and the output that it fills."""
    _check(seed, index)
    out = index.new_empty(len(index), *shape, dtype=dtype)
    elements = math.prod(shape)
    quads = -(-elements // 4)
    total = len(index) * quads
    if total >= 2**31:
        raise ValueError(
            f"index has {len(index)} draws of {elements} numbers, expected less than 2^33 in all"
        )
    args = {"seed_ptr": seed, "index_ptr": index, "out_ptr": out}
    sizes = {"elements": elements, "quads": quads, "total": total, "n": n}
    bits = _bits(dtype) if kind == "uniform" else 24
    meta = {"PURPOSE": purpose, "KIND": kind, "BITS": bits, "BLOCK": BLOCK, "WHOLE": elements % 4 == 0}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return [
        Launch(_draw_kernel, (triton.cdiv(total, BLOCK),), args | sizes, meta | options)
    ] if total else [], out


def launch_draw(
    kind: str, shape: Sequence[int], seed: Tensor, index: Tensor, purpose: int, dtype: torch.dtype, n: int = 1
) -> Tensor:
    """Run the kernel; the interpreter's tests call this, everyone else the functions below."""
    launches, out = plan_draw(kind, shape, seed, index, purpose, dtype, n)
    for launch in launches:
        launch.run(index)
    return out


@torch.library.custom_op("orwcfm::normal", mutates_args=(), device_types="cuda")
def _normal(shape: Sequence[int], seed: Tensor, index: Tensor, purpose: int, dtype: torch.dtype) -> Tensor:
    return launch_draw("normal", shape, seed, index, purpose, dtype)


@torch.library.custom_op("orwcfm::uniform", mutates_args=(), device_types="cuda")
def _uniform(shape: Sequence[int], seed: Tensor, index: Tensor, purpose: int, dtype: torch.dtype) -> Tensor:
    return launch_draw("uniform", shape, seed, index, purpose, dtype)


@torch.library.custom_op("orwcfm::choice", mutates_args=(), device_types="cuda")
def _choice(n: int, seed: Tensor, index: Tensor, purpose: int) -> Tensor:
    return launch_draw("choice", (), seed, index, purpose, torch.int64, n)


@_normal.register_kernel("cpu")
def _(shape, seed, index, purpose, dtype):
    _check(seed, index)
    return normal_reference(shape, seed, index, purpose, dtype)


@_uniform.register_kernel("cpu")
def _(shape, seed, index, purpose, dtype):
    _check(seed, index)
    return uniform_reference(shape, seed, index, purpose, dtype)


@_choice.register_kernel("cpu")
def _(n, seed, index, purpose):
    _check(seed, index)
    return choice_reference(n, seed, index, purpose)


@_normal.register_fake
@_uniform.register_fake
def _(shape, seed, index, purpose, dtype):
    _check(seed, index)
    return index.new_empty(index.shape[0], *shape, dtype=dtype)


@_choice.register_fake
def _(n, seed, index, purpose):
    _check(seed, index)
    return torch.empty_like(index)


def _on(seed: Tensor | int, index: Tensor) -> Tensor:
    """A seed as the 0-d int64 tensor that the ops take, filled in there: a copy would wait for the device."""
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=index.device)


def normal(
    shape: Sequence[int],
    seed: Tensor | int,
    index: Tensor,
    purpose: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers, within 6e-7 * max(1, r) of the float64 formula, r = sqrt(-2 ln u) the radius.

    Args:
        shape: shape of one logical sample; its elements are numbered in row-major order.
        seed: run seed, a 0-d int64 tensor on index's device, or any Python integer (taken mod 2^64).
        index: int64 [B], the global number of each draw; its device is the result's.
        purpose: what the numbers are for; those of other purposes are independent of them.
        dtype: any floating type.

    Returns:
        [B, *shape], computed in float32 and then converted to dtype.

    Raises:
        ValueError: seed or index has another dtype, shape or device.
    """
    return _normal(shape, _on(seed, index), index, purpose, dtype)


def uniform(
    shape: Sequence[int],
    seed: Tensor | int,
    index: Tensor,
    purpose: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1), never 1: the leading bits of each word, as many as dtype holds (at most 24).

    Args, result and errors as in `normal`.
    """
    return _uniform(shape, _on(seed, index), index, purpose, dtype)


def choice(n: int, seed: Tensor | int, index: Tensor, purpose: int) -> Tensor:
    """For each index one of n things with replacement, int64 [B]; its bias is below n / 2^24.

    Other arguments and errors as in `normal`.
    """
    return _choice(n, _on(seed, index), index, purpose)
