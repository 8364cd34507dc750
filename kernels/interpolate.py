"""The probability path: x_t = (1 - t) * x0 + t * x1, with x0 ~ N(0, I) drawn inside."""

import torch
from torch import Tensor

from orwcfm_fast.kernels._check import check_counters, check_samples, check_tensor, refuse_grad
from orwcfm_fast.kernels._launch import Launch, channels_and_pixels, cut, is_strided, pointers
from orwcfm_fast.kernels._triton import tl, triton
from orwcfm_fast.kernels.philox import X0, normal, normal_kernel


@triton.jit
def _interpolate_kernel(
    x1_ptr,
    t_ptr,
    seed_ptr,
    index_ptr,
    out_ptr,
    elements,
    chunks,
    channels,
    pixels,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    STRIDED: tl.constexpr,
):
    sample = tl.program_id(0) // chunks
    first = (tl.program_id(0) % chunks).to(tl.int64) * (BLOCK * BLOCKS)
    base = sample.to(tl.int64) * elements
    # seed and index live on the device: Python integers would freeze under CUDA-graph capture
    seed, index, t = tl.load(seed_ptr), tl.load(index_ptr + sample), tl.load(t_ptr + sample)
    lane = tl.arange(0, BLOCK)
    for block in range(BLOCKS):
        start = first + block * BLOCK
        mask = lane < elements - start if MASKED else None
        x1 = tl.load(pointers(x1_ptr + base, start, lane, channels, pixels, STRIDED), mask).to(tl.float32)
        x0 = normal_kernel(start, seed, index, PURPOSE, BLOCK, NEIGHBOURS)
        x_t = ((1 - t) * x0 + t * x1).to(out_ptr.dtype.element_ty)
        tl.store(pointers(out_ptr + base, start, lane, channels, pixels, STRIDED), x_t, mask)


def interpolate_reference(x1: Tensor, t: Tensor, seed: Tensor, index: Tensor) -> Tensor:
    """The formula in plain torch; the CPU path, and what tests compare with. Also takes float64."""
    dtype = torch.promote_types(x1.dtype, torch.float32)
    t = t.to(dtype).view(-1, *[1] * (x1.ndim - 1))
    x_t = normal(tuple(x1.shape[1:]), seed, index, X0, dtype).mul_(1 - t).addcmul_(t, x1.to(dtype))
    return torch.empty_like(x1).copy_(x_t)


def _check(x1: Tensor, t: Tensor, seed: Tensor, index: Tensor) -> None:
    check_samples("x1", x1)
    check_tensor("t", t, torch.float32, (x1.shape[0],), x1.device)
    check_counters(seed, index, x1)


def plan_interpolate(x1: Tensor, t: Tensor, seed: Tensor, index: Tensor) -> tuple[list[Launch], Tensor]:
    """The kernel call, and the output that it fills."""
    _check(x1, t, seed, index)
    out = torch.empty_like(x1)
    elements = x1[0].numel()
    chunks, meta = cut(elements, x1.dtype)
    args = {"x1_ptr": x1, "t_ptr": t, "seed_ptr": seed, "index_ptr": index, "out_ptr": out}
    sizes = {"elements": elements, "chunks": chunks, **channels_and_pixels(x1)}
    meta |= {"PURPOSE": X0, "STRIDED": is_strided("x1", x1)}
    return [Launch(_interpolate_kernel, (x1.shape[0] * chunks,), args | sizes, meta)], out


def launch_interpolate(x1: Tensor, t: Tensor, seed: Tensor, index: Tensor) -> Tensor:
    """Run the kernel; the interpreter's tests call this, everyone else the op."""
    launches, out = plan_interpolate(x1, t, seed, index)
    for launch in launches:
        launch.run(x1)
    return out


@torch.library.custom_op("orwcfm::interpolate", mutates_args=(), device_types="cuda")
def interpolate(x1: Tensor, t: Tensor, seed: Tensor, index: Tensor) -> Tensor:
    """The point x_t = (1 - t) * x0 + t * x1 of the straight path from noise to data (Lipman et al. 2023).

    x0 is normal(shape, seed, index, X0) of kernels/philox.py, the noise that anchored_residual draws again.

    Args:
        x1: data [B, ...], float32, bfloat16 or float16, contiguous or channels_last; no grad.
        t: time in [0, 1], float32 [B].
        seed: run seed, a 0-d int64 tensor on x1's device.
        index: global number of each draw, int64 [B].

    Returns:
        x_t with x1's shape, dtype and strides, computed in float32.

    Raises:
        ValueError: an argument of another shape, dtype, device or layout, or x1 or t that requires grad.
    """
    return launch_interpolate(x1, t, seed, index)


@interpolate.register_kernel("cpu")
def _(x1, t, seed, index):
    _check(x1, t, seed, index)
    return interpolate_reference(x1, t, seed, index)


@interpolate.register_fake
def _(x1, t, seed, index):
    _check(x1, t, seed, index)
    return torch.empty_like(x1)


def _setup_context(ctx, inputs, output):
    refuse_grad(ctx.needs_input_grad[:2], ("x1", "t"), "interpolate")


interpolate.register_autograd(lambda ctx, g: (None,) * 4, setup_context=_setup_context)
