"""Counted noise: Philox4x32-10 and Box-Muller, the same integers and polynomials on every device.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A number depends on
its seed (64-bit key) and its counter (element // 4, purpose, index low, index high) alone: *element* is
the row-major index within one logical sample, *index* the global number of the draw.

Words (w0, w1) make elements 4k and 4k+1, (w2, w3) make 4k+2 and 4k+3:

    sqrt(-2 ln u) * cos(2 pi v), sqrt(-2 ln u) * sin(2 pi v),    u = (w0 + 1/2) / 2^32, v = w1 / 2^32
"""

import math

import torch
from torch import Tensor

from orwcfm_fast.kernels._triton import tl, triton

X0 = 0
"""Purpose of the training noise x0, which the kernels draw again instead of reading it."""

M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)

MINUS_2_LN2 = tl.constexpr(-2 * math.log(2))
ANGLE = tl.constexpr(2 * math.pi * 2**-34)  # of a word shifted left by two
SIGN = tl.constexpr(-(2**31))

_MASK = 0xFFFFFFFF
# counters worked on at a time, so that temporaries stay in a CPU's cache, or below a GiB
_CACHED, _LARGE = 1 << 15, 1 << 22


# The three polynomials: torch calls them through .fn, Triton compiles them.


@triton.jit
def minus_2_log1p(f):
    """-2 ln(1 + f) on [-1/2, 0]; relative error 1.5e-7 (least maximum, Lawson's iteration)."""
    p = f * 2.369862318038940 + 2.163079261779785
    p = p * f + 1.570861339569092
    p = p * f + -0.076036371290684
    p = p * f + 0.544501006603241
    p = p * f + -0.663725256919861
    p = p * f + 1.000073075294495
    p = p * f + -1.999999761581421
    return p * f


@triton.jit
def sine(x, square):
    """sin x on [-pi/4, pi/4]; error 3e-9 before rounding."""
    p = square * -0.000195040222025 + 0.008332036435604
    p = p * square + -0.166666507720947
    return p * (square * x) + x


@triton.jit
def cosine(square):
    """cos x on [-pi/4, pi/4], from x squared; error 5e-11 before rounding."""
    p = square * 0.000024379929528 + -0.001388661912642
    p = p * square + 0.041666615764366
    p = p * square + -0.5
    return p * square + 1.0


@triton.jit
def _box_muller_kernel(radius_word, angle_word):
    """_box_muller below, operation by operation."""
    w = radius_word.to(tl.int32, bitcast=True)
    v = angle_word.to(tl.int32, bitcast=True)
    u = w.to(tl.float32) * 2**-32 + 2**-33
    bits = u.to(tl.int32, bitcast=True)
    near_one = w < 0
    f = tl.where(near_one, u, ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True) - 1.0)
    exponent = tl.where(near_one, 0, (bits >> 23) - 126)
    radius = tl.sqrt(exponent.to(tl.float32) * MINUS_2_LN2 + minus_2_log1p(f))
    x = (v << 2).to(tl.float32) * ANGLE
    quarter = angle_word + 0x20000000
    square = x * x
    sin, cos = sine(x, square), cosine(square)
    odd = (quarter & 0x40000000) != 0
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    first_sign = (quarter + 0x40000000) & 0x80000000
    second_sign = quarter & 0x80000000
    first = (first.to(tl.uint32, bitcast=True) ^ first_sign).to(tl.float32, bitcast=True)
    second = (second.to(tl.uint32, bitcast=True) ^ second_sign).to(tl.float32, bitcast=True)
    return radius * first, radius * second


@triton.jit
def philox_kernel(c0, c1, c2, c3, k0, k1):
    """philox4x32 on uint32 blocks and scalars."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * M0
        p1 = c2.to(tl.uint64) * M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 += W0
        k1 += W1
    return c0, c1, c2, c3


@triton.jit
def _four_normals(quad, seed, index, PURPOSE: tl.constexpr):
    zero = tl.zeros_like(quad)
    w0, w1, w2, w3 = philox_kernel(
        quad,
        zero + PURPOSE,
        zero + index.to(tl.uint32),
        zero + (index >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    z0, z1 = _box_muller_kernel(w0, w1)
    z2, z3 = _box_muller_kernel(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def normal_kernel(start, seed, index, PURPOSE: tl.constexpr, BLOCK: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """float32 normals [BLOCK] of elements start, start + 1, ...; start is an int64 multiple of 8.

    Each thread makes NEIGHBOURS (4 or 8) in a row, as many as one 16-byte access of the caller holds, and
    in the caller's order: no exchange through shared memory.
    """
    quad = (start // 4).to(tl.uint32)
    if NEIGHBOURS == 4:
        z0, z1, z2, z3 = _four_normals(quad + tl.arange(0, BLOCK // 4).to(tl.uint32), seed, index, PURPOSE)
        return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        quad += 2 * tl.arange(0, BLOCK // 8).to(tl.uint32)
        z0, z1, z2, z3 = _four_normals(quad, seed, index, PURPOSE)
        z4, z5, z6, z7 = _four_normals(quad + 1, seed, index, PURPOSE)
        even = tl.interleave(tl.interleave(z0, z4), tl.interleave(z2, z6))
        odd = tl.interleave(tl.interleave(z1, z5), tl.interleave(z3, z7))
        return tl.interleave(even, odd)


def _key(seed: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    return seed & _MASK, (seed >> 32) & _MASK


def philox4x32(
    c0: Tensor, c1: Tensor | int, c2: Tensor, c3: Tensor, seed: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011).

    Args:
        c0, c1, c2, c3: counter words, int64 that hold uint32 values, of shapes that broadcast together.
        seed: 64-bit key, a 0-d int64 tensor or any Python integer (taken mod 2^64).

    Returns:
        Four words, int64 in [0, 2^32).
    """
    k0, k1 = _key(seed)
    for _ in range(10):
        # the product wraps mod 2^64; & drops what >> copies from its sign
        p0, p1 = c0 * M0.value, c2 * M1.value
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + W0.value) & _MASK, (k1 + W1.value) & _MASK
    return c0, c1, c2, c3  # type: ignore[return-value]


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    w, v = radius_word.to(torch.int32), angle_word.to(torch.int32)
    # u, or u - 1 where the word's top bit is set, so that ln u keeps its precision on both sides
    u = w.float() * 2**-32 + 2**-33
    bits = u.view(torch.int32)
    near_one = w < 0
    f = torch.where(near_one, u, ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32) - 1.0)
    exponent = torch.where(near_one, 0, (bits >> 23) - 126)
    # torch's float32 sqrt on CPUs is not rounded correctly, by a bit in one of five: through float64 it is
    radius = (exponent * MINUS_2_LN2.value + minus_2_log1p.fn(f)).double().sqrt_().float()
    x = (v << 2).float() * ANGLE.value  # within an eighth of a turn of the nearest quarter
    quarter = v + 2**29
    square = x * x
    sin, cos = sine.fn(x, square), cosine.fn(square)
    odd = (quarter & 2**30) != 0
    sin, cos = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    sin = (sin.view(torch.int32) ^ (quarter & SIGN.value)).view(torch.float32)
    cos = (cos.view(torch.int32) ^ ((quarter + 2**30) & SIGN.value)).view(torch.float32)
    return radius * cos, radius * sin


def _draw(transform, shape, seed, index, purpose, dtype):
    n = math.prod(shape)
    blocks = -(-n // 4)
    out = torch.empty(index.shape[0], n, dtype=dtype, device=index.device)
    rows = max(1, (_CACHED if index.device.type == "cpu" else _LARGE) // max(1, blocks))
    c0 = torch.arange(blocks, device=index.device)[None]
    for start in range(0, index.shape[0], rows):
        i = index[start : start + rows, None]
        words = philox4x32(c0, purpose, i & _MASK, (i >> 32) & _MASK, seed)
        out[start : start + rows] = torch.stack(transform(words), dim=-1).flatten(1)[:, :n]
    return out.view(index.shape[0], *shape)


def normal(
    shape: tuple[int, ...],
    seed: Tensor | int,
    index: Tensor,
    purpose: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals, within 1e-6 of the module's formula in float64 (beyond |z| = 3, within 3e-7 |z|).

    Args:
        shape: shape of one logical sample; its elements are numbered in row-major order.
        seed: run seed, a 0-d int64 tensor on index's device, or any Python integer (taken mod 2^64).
        index: int64 [B], the global number of each draw; its device is the result's.
        purpose: what the noise is for; other purposes are independent of it.

    Returns:
        [B, *shape], computed in float32 and then converted to dtype.
    """
    return _draw(
        lambda w: (*_box_muller(w[0], w[1]), *_box_muller(w[2], w[3])), shape, seed, index, purpose, dtype
    )


def uniform(
    shape: tuple[int, ...],
    seed: Tensor | int,
    index: Tensor,
    purpose: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniforms in [0, 1), never 1: the leading bits of each word, as many as dtype holds (at most 24).

    Args and result as in normal.
    """
    bits = min(24, 1 - round(math.log2(torch.finfo(dtype).eps)))
    return _draw(
        lambda w: [(word >> (32 - bits)).to(dtype) * 2.0**-bits for word in w],
        shape,
        seed,
        index,
        purpose,
        dtype,
    )
