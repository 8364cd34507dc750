"""Reward-weighted flow matching with a velocity anchor: loss and gradient in one pass over memory.

u = x1 - x0 with x0 drawn again from its counters, D elements a sample:

    fm_i = 1/D ||v_i - u_i||^2      w2_i = 1/D ||v_i - v_ref_i||^2      loss_i = w_i fm_i + a_i w2_i
    dv_i = d loss_i / d v_i = 2/D (w_i (v_i - u_i) + a_i (v_i - v_ref_i))
"""

import torch
from orwcfm_fast.kernels._check import (
    check_counters,
    check_like,
    check_samples,
    check_tensor,
    refuse_grad,
)
from orwcfm_fast.kernels.philox import X0, normal
from torch import Tensor

Output = tuple[Tensor, Tensor, Tensor, Tensor]


def anchored_residual_reference(
    v: Tensor, v_ref: Tensor, x1: Tensor, seed: Tensor, index: Tensor, w: Tensor, a: Tensor
) -> Output:
    """The formulas in plain torch; the CPU path, and what tests compare with. Also takes float64."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    batch, w, a = v.shape[0], w.to(dtype), a.to(dtype)
    scale = 2 * batch / v.numel()
    x0 = normal(tuple(x1.shape[1:]), seed, index, X0, dtype).view(batch, -1)
    residual = x0.sub_(x1.reshape(batch, -1)).add_(v.reshape(batch, -1))
    drift = v.reshape(batch, -1).to(dtype) - v_ref.reshape(batch, -1)
    fm, w2 = residual.square().mean(1), drift.square().mean(1)
    dv = residual.mul_((scale * w)[:, None]).addcmul_((scale * a)[:, None], drift)
    return w * fm + a * w2, fm, w2, torch.empty_like(v).copy_(dv.view(v.shape))


def _check(v, v_ref, x1, seed, index, w, a) -> None:
    check_samples("v", v)
    check_samples("v_ref", v_ref, (v.dtype,))
    check_samples("x1", x1, tuple({v.dtype: 0, torch.float32: 0}))
    check_like("v_ref", v_ref, "v", v)
    check_like("x1", x1, "v", v)
    check_counters(seed, index, v)
    check_tensor("w", w, torch.float32, (v.shape[0],), v.device)
    check_tensor("a", a, torch.float32, (v.shape[0],), v.device)


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
    raise NotImplementedError


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
