"""Counted noise: Philox4x32-10 and Box-Muller, with the same integers on every device.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A number depends only on its
seed (the 64-bit key) and its counter (element // 4, purpose, index low, index high), where *element* is the
row-major position within one logical sample and *index* the global number of the draw.

Words (w0, w1) make elements 4k and 4k+1, (w2, w3) make 4k+2 and 4k+3:

    sqrt(-2 ln u) * cos(2 pi v), sqrt(-2 ln u) * sin(2 pi v),    u = (w0 + 1/2) / 2^32, v = w1 / 2^32

The angle is taken modulo half a turn, to [-pi/2, pi/2], where both polynomials are short; the odd half turns change
the sign of cosine and sine alike, so the sign is put on the radius, once.
"""

import math

import torch
from torch import Tensor

from orwcfm_fast.kernels._triton import INTERPRETED, tl, triton

X0, T = 0, 1
"""Purposes of the training noise x0 and of its time t, which the kernels draw themselves."""

M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)

MINUS_2_LN2 = tl.constexpr(-2 * math.log(2))
SIGN = tl.constexpr(-(2**31))

MASK = 0xFFFFFFFF  # of the words, which torch holds in int64


# Polynomials of least maximum error (Lawson's iteration). torch calls them through `.fn`, Triton compiles them.


@triton.jit
def sine(y, square):
    """sin(pi/2 * y) on [-1, 1], square = y * y; relative error 6e-9 before rounding."""
    p = square * 0.000151484935722 - 0.004673766262364
    p = p * square + 0.079689678753887
    p = p * square - 0.645963710566013
    p = p * square + 1.570796318446806
    return p * y


@triton.jit
def cosine(square):
    """cos(pi/2 * y) on [-1, 1], square = y * y; error 6e-8 before rounding."""
    p = square * 0.000859688628022 - 0.020813964262224
    p = p * square + 0.253653207668295
    p = p * square - 1.233698879372624
    return p * square + 1.0


@triton.jit
def _minus_2_log1p_near_0(f):
    """-2 ln(1 + f) on [-1/8, 0]; relative error 5e-7 before rounding."""
    p = f * 0.616784068459946 - 0.657078487710979
    p = p * f + 1.000245726297762
    p = p * f - 1.999999022582472
    return p * f


@triton.jit
def _log2(u):
    """The hardware's logarithm, one instruction, exact to 2^-22; `tl.log2` takes 25."""
    if INTERPRETED:  # where inline assembly does not run
        return tl.log2(u)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, True, 1)


@triton.jit
def box_muller_kernel(radius_word, angle_word):
    """Two float32 normals from two uint32 words."""
    # u - 1 where the word's top bit is set, so that a u near 1 keeps its precision
    f = radius_word.to(tl.int32, bitcast=True).to(tl.float32) * 2**-32 + 2**-33
    u = tl.where(f < 0, f + 1.0, f)
    # 2^-22 is too little where the logarithm itself is small
    square_radius = tl.where(radius_word < 0xE0000000, _log2(u) * MINUS_2_LN2, _minus_2_log1p_near_0(f))
    radius = tl.sqrt(square_radius)
    sign = (angle_word + 0x40000000) & 0x80000000
    radius = (radius.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    y = (angle_word << 1).to(tl.int32, bitcast=True).to(tl.float32) * 2**-31
    square = y * y
    return radius * cosine(square), radius * sine(y, square)


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
def words_kernel(quad, seed, index, PURPOSE: tl.constexpr):
    """The four words of elements 4 * quad to 4 * quad + 3; quad uint32, seed and index int64."""
    zero = tl.zeros_like(quad)
    return philox_kernel(
        quad,
        zero + PURPOSE,
        zero + index.to(tl.uint32),
        zero + (index >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def four_normals_kernel(quad, seed, index, PURPOSE: tl.constexpr):
    """float32 normals of elements 4 * quad to 4 * quad + 3."""
    w0, w1, w2, w3 = words_kernel(quad, seed, index, PURPOSE)
    z0, z1 = box_muller_kernel(w0, w1)
    z2, z3 = box_muller_kernel(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def normal_kernel(start, seed, index, PURPOSE: tl.constexpr, BLOCK: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """float32 normals [BLOCK] of elements start, start + 1, ...; start is an int64 multiple of 8.

    Each thread makes NEIGHBOURS (4 or 8) in a row, as many as one 16-byte access of the caller holds, and
    in the caller's order: no exchange through shared memory.
    """
    quad = (start // 4).to(tl.uint32)
    if NEIGHBOURS == 4:
        quad += tl.arange(0, BLOCK // 4).to(tl.uint32)
        z0, z1, z2, z3 = four_normals_kernel(quad, seed, index, PURPOSE)
        return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        quad += 2 * tl.arange(0, BLOCK // 8).to(tl.uint32)
        z0, z1, z2, z3 = four_normals_kernel(quad, seed, index, PURPOSE)
        z4, z5, z6, z7 = four_normals_kernel(quad + 1, seed, index, PURPOSE)
        even = tl.interleave(tl.interleave(z0, z4), tl.interleave(z2, z6))
        odd = tl.interleave(tl.interleave(z1, z5), tl.interleave(z3, z7))
        return tl.interleave(even, odd)


@triton.jit
def unit_kernel(word, BITS: tl.constexpr = 24):
    """Uniform float32 in [0, 1) from the leading BITS (at most 24) of a uint32 word."""
    return (word >> (32 - BITS)).to(tl.int32, bitcast=True).to(tl.float32) * 2 ** (-BITS)


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
    step = torch.arange(10, device=c0.device)
    k0, k1 = step * W0.value + (seed & MASK), step * W1.value + ((seed >> 32) & MASK)
    for key0, key1 in zip(k0.unbind(), k1.unbind(), strict=True):
        p0, p1 = c0 * M0.value, c2 * M1.value  # wrap mod 2^64; what >> copies from their sign is masked off
        c0, c1 = ((p1 >> 32) ^ c1 ^ key0) & MASK, p1
        c2, c3 = ((p0 >> 32) ^ c3 ^ key1) & MASK, p0
    return c0, c1 & MASK, c2, c3 & MASK  # type: ignore[return-value]


def _minus_2_log1p(f: Tensor) -> Tensor:
    """-2 ln(1 + f) on [-1/2, 0]; relative error 1.5e-7 before rounding (least maximum, Lawson's iteration)."""
    p = f * 2.369862318038940 + 2.163079261779785
    for c in (1.570861339569092, -0.076036371290684, 0.544501006603241, -0.663725256919861,
              1.000073075294495, -1.999999761581421):  # fmt: skip
        p = p * f + c
    return p * f


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two words (int64): the module's formula in plain torch.

    The logarithm is a polynomial on u's mantissa, so that every CPU computes the same bits.
    """
    w, v = radius_word.to(torch.int32), angle_word.to(torch.int32)
    # u, or u - 1 where the word's top bit is set, so that ln u keeps its precision on both sides
    u = w.float() * 2**-32 + 2**-33
    bits = u.view(torch.int32)
    near_one = w < 0
    f = torch.where(near_one, u, ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32) - 1.0)
    exponent = torch.where(near_one, 0, (bits >> 23) - 126)
    # torch's float32 sqrt on CPUs is not rounded correctly, by a bit in one of five: through float64 it is
    radius = (exponent * MINUS_2_LN2.value + _minus_2_log1p(f)).double().sqrt_().float()
    radius = (radius.view(torch.int32) ^ ((v + 2**30) & SIGN.value)).view(torch.float32)
    y = (v << 1).float() * 2**-31
    square = y * y
    return radius * cosine.fn(square), radius * sine.fn(y, square)
