"""Reward-weighted flow matching with a velocity anchor: loss and gradient in one pass over memory.

u = x1 - x0 with x0 drawn again from its counters, D elements a sample:

    fm_i = 1/D ||v_i - u_i||^2      w2_i = 1/D ||v_i - v_ref_i||^2      loss_i = w_i fm_i + a_i w2_i
    dv_i = d loss_i / d v_i = 2/D (w_i (v_i - u_i) + a_i (v_i - v_ref_i))
"""

import torch
from torch import Tensor

from orwcfm_fast.kernels._check import check_counters, check_like, check_samples, check_tensor, refuse_grad
from orwcfm_fast.kernels._launch import (
    Launch,
    channels_and_pixels,
    cut,
    is_strided,
    multiprocessors,
    pointers,
)
from orwcfm_fast.kernels._triton import tl, triton
from orwcfm_fast.kernels.philox import X0, normal_kernel
from orwcfm_fast.kernels.random_numbers import normal_reference

Output = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _store_sums(loss_ptr, fm_ptr, w2_ptr, at, fm, w2, w_ptr, a_ptr, sample):
    # w and a are read again: kept over the loop, they spill on sm_100
    tl.store(loss_ptr + at, tl.load(w_ptr + sample) * fm + tl.load(a_ptr + sample) * w2)
    tl.store(fm_ptr + at, fm)
    tl.store(w2_ptr + at, w2)


@triton.jit
def _anchored_residual_kernel(
    v_ptr,
    v_ref_ptr,
    x1_ptr,
    seed_ptr,
    index_ptr,
    w_ptr,
    a_ptr,
    dv_ptr,
    loss_ptr,
    fm_ptr,
    w2_ptr,
    elements,
    chunks,
    channels,
    pixels,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    V_STRIDED: tl.constexpr,
    V_REF_STRIDED: tl.constexpr,
    X1_STRIDED: tl.constexpr,
):
    """One chunk of one sample; loss_ptr, fm_ptr and w2_ptr hold a number for each chunk."""
    program = tl.program_id(0)
    sample = program // chunks
    first = (program % chunks).to(tl.int64) * (BLOCK * BLOCKS)
    base = sample.to(tl.int64) * elements
    # seed and index live on the device: Python integers would freeze under CUDA-graph capture
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + sample)
    w_scale, a_scale = 2 * tl.load(w_ptr + sample) / elements, 2 * tl.load(a_ptr + sample) / elements
    lane = tl.arange(0, BLOCK)
    # a thread's groups of neighbours are added at once: eight accumulators a sum spill on sm_100
    GROUPS: tl.constexpr = 8 // NEIGHBOURS
    SUMS: tl.constexpr = BLOCK // GROUPS
    fm, w2 = tl.zeros([SUMS], tl.float32), tl.zeros([SUMS], tl.float32)
    for block in tl.static_range(BLOCKS):
        start = first + block * BLOCK
        mask = lane < elements - start if MASKED else None
        v_at = pointers(v_ptr + base, start, lane, channels, pixels, V_STRIDED)
        v_ref_at = pointers(v_ref_ptr + base, start, lane, channels, pixels, V_REF_STRIDED)
        x1_at = pointers(x1_ptr + base, start, lane, channels, pixels, X1_STRIDED)
        v = tl.load(v_at, mask).to(tl.float32)
        drift = v - tl.load(v_ref_at, mask).to(tl.float32)
        x0 = normal_kernel(start, seed, index, PURPOSE, BLOCK, NEIGHBOURS)
        residual = v - tl.load(x1_at, mask).to(tl.float32) + x0
        if MASKED:
            residual, drift = tl.where(mask, residual, 0.0), tl.where(mask, drift, 0.0)
        fm += tl.sum(tl.reshape(residual * residual, [GROUPS, SUMS]), 0)
        w2 += tl.sum(tl.reshape(drift * drift, [GROUPS, SUMS]), 0)
        dv = (w_scale * residual + a_scale * drift).to(dv_ptr.dtype.element_ty)
        tl.store(pointers(dv_ptr + base, start, lane, channels, pixels, V_STRIDED), dv, mask)
    fm, w2 = tl.sum(fm, 0) / elements, tl.sum(w2, 0) / elements
    _store_sums(loss_ptr, fm_ptr, w2_ptr, program, fm, w2, w_ptr, a_ptr, sample)


@triton.jit
def _sum_chunks_kernel(
    parts_fm_ptr, parts_w2_ptr, w_ptr, a_ptr, loss_ptr, fm_ptr, w2_ptr, chunks, BLOCK: tl.constexpr
):
    """Add the chunks of one sample, always in the same order."""
    sample = tl.program_id(0)
    fm, w2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        at, mask = sample.to(tl.int64) * chunks + chunk, chunk < chunks
        fm += tl.load(parts_fm_ptr + at, mask, 0.0)
        w2 += tl.load(parts_w2_ptr + at, mask, 0.0)
    _store_sums(loss_ptr, fm_ptr, w2_ptr, sample, tl.sum(fm, 0), tl.sum(w2, 0), w_ptr, a_ptr, sample)


def anchored_residual_reference(
    v: Tensor, v_ref: Tensor, x1: Tensor, seed: Tensor, index: Tensor, w: Tensor, a: Tensor
) -> Output:
    """The formulas in plain torch; the CPU path, and what tests compare with. Also takes float64."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    batch, w, a = v.shape[0], w.to(dtype), a.to(dtype)
    scale = 2 * batch / v.numel()
    x0 = normal_reference(x1.shape[1:], seed, index, X0, dtype).view(batch, -1)
    residual = x0.sub_(x1.reshape(batch, -1)).add_(v.reshape(batch, -1))
    drift = v.reshape(batch, -1).to(dtype) - v_ref.reshape(batch, -1)
    fm, w2 = residual.square().mean(1), drift.square().mean(1)
    dv = residual.mul_((scale * w)[:, None]).addcmul_((scale * a)[:, None], drift)
    return w * fm + a * w2, fm, w2, torch.empty_like(v).copy_(dv.view(v.shape))


def _check(v, v_ref, x1, seed, index, w, a) -> None:
    check_samples("v", v)
    check_samples("v_ref", v_ref, (v.dtype,))
    check_samples("x1", x1, (v.dtype, torch.float32))
    check_like("v_ref", v_ref, "v", v)
    check_like("x1", x1, "v", v)
    check_counters(seed, index, v)
    check_tensor("w", w, torch.float32, (v.shape[0],), v.device)
    check_tensor("a", a, torch.float32, (v.shape[0],), v.device)


def plan_anchored_residual(
    v: Tensor, v_ref: Tensor, x1: Tensor, seed: Tensor, index: Tensor, w: Tensor, a: Tensor
) -> tuple[list[Launch], Output]:
    """The kernel calls, and the outputs that they fill."""
    _check(v, v_ref, x1, seed, index, w, a)
    batch, elements = v.shape[0], v[0].numel()
    chunks, meta = cut(elements, batch, v.itemsize, multiprocessors(v.device))
    dv = torch.empty_like(v)
    loss, fm, w2 = (torch.empty_like(w) for _ in range(3))
    parts = (loss, fm, w2) if chunks == 1 else tuple(w.new_empty(batch * chunks) for _ in range(3))
    inputs = {"v_ptr": v, "v_ref_ptr": v_ref, "x1_ptr": x1, "seed_ptr": seed, "index_ptr": index}
    weights = {"w_ptr": w, "a_ptr": a}
    outputs = {"dv_ptr": dv, "loss_ptr": parts[0], "fm_ptr": parts[1], "w2_ptr": parts[2]}
    sizes = {"elements": elements, "chunks": chunks, **channels_and_pixels(v)}
    strided = {f"{n.upper()}_STRIDED": is_strided(n, x) for n, x in (("v", v), ("v_ref", v_ref), ("x1", x1))}
    args = inputs | weights | outputs | sizes
    launches = [Launch(_anchored_residual_kernel, (batch * chunks,), args, meta | strided | {"PURPOSE": X0})]
    if chunks > 1:
        sums = {
            "parts_fm_ptr": parts[1],
            "parts_w2_ptr": parts[2],
            "loss_ptr": loss,
            "fm_ptr": fm,
            "w2_ptr": w2,
        }
        launches.append(
            Launch(_sum_chunks_kernel, (batch,), sums | weights | {"chunks": chunks}, {"BLOCK": 512})
        )
    return launches, (loss, fm, w2, dv)


def launch_anchored_residual(
    v: Tensor, v_ref: Tensor, x1: Tensor, seed: Tensor, index: Tensor, w: Tensor, a: Tensor
) -> Output:
    """Run the kernels; the interpreter's tests call this, everyone else the op."""
    launches, outputs = plan_anchored_residual(v, v_ref, x1, seed, index, w, a)
    for launch in launches:
        launch.run(v)
    return outputs


@torch.library.custom_op("orwcfm::anchored_residual", mutates_args=(), device_types="cuda")
def anchored_residual(
    v: Tensor, v_ref: Tensor, x1: Tensor, seed: Tensor, index: Tensor, w: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reward-weighted flow-matching loss with a velocity anchor (Fan et al., ICLR 2025), and its gradient.

    Call v.backward(dv), with 1/B and accumulation folded into w and a: then memory is passed over once.
    loss.sum().backward() is right too, and costs a second pass. No second derivative.

    Args:
        v: policy velocity [B, ...], float32, bfloat16 or float16, contiguous or channels_last.
        v_ref: the anchor's velocity, v's shape and dtype; no grad.
        x1: data, v's shape, v's dtype or float32; no grad.
        seed: run seed, a 0-d int64 tensor on v's device.
        index: global number of each draw, int64 [B]; the one that interpolate had.
        w: weight of each sample, float32 [B], any sign.
        a: strength of the anchor, float32 [B]. Where w + a <= 0 the loss has no lower bound.

    Returns:
        loss [B], fm [B], w2 [B] in float32, and dv like v (dtype and strides). Only loss is differentiable.

    Raises:
        ValueError: an argument of another shape, dtype, device or layout, or one other than v that
            requires grad.
    """
    return launch_anchored_residual(v, v_ref, x1, seed, index, w, a)


@anchored_residual.register_kernel("cpu")
def _(v, v_ref, x1, seed, index, w, a):
    _check(v, v_ref, x1, seed, index, w, a)
    return anchored_residual_reference(v, v_ref, x1, seed, index, w, a)


@anchored_residual.register_fake
def _(v, v_ref, x1, seed, index, w, a):
    _check(v, v_ref, x1, seed, index, w, a)
    loss, fm, w2 = (torch.empty_like(w) for _ in range(3))
    return loss, fm, w2, torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    refuse_grad(ctx.needs_input_grad[1:7], ("v_ref", "x1", "seed", "index", "w", "a"), "anchored_residual")
    _, fm, w2, dv = output
    ctx.mark_non_differentiable(fm, w2, dv)  # or differentiating a metric would silently give 0
    ctx.set_materialize_grads(False)  # no zeros as large as dv
    ctx.save_for_backward(dv)


def _backward(ctx, g, *_):
    if torch.is_grad_enabled():
        raise NotImplementedError("anchored_residual has no second derivative (create_graph=True)")
    (dv,) = ctx.saved_tensors
    dv = None if g is None else (g.view(-1, *[1] * (dv.ndim - 1)) * dv).to(dv.dtype)
    return dv, *[None] * 6


anchored_residual.register_autograd(_backward, setup_context=_setup_context)
