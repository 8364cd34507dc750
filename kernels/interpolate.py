"""The probability path: x_t = (1 - t) * x0 + t * x1, with x0 ~ N(0, I), and on request t in (0, 1), drawn inside."""

import torch
from torch import Tensor

from orwcfm_fast.kernels._check import check_counters, check_samples, check_tensor, refuse_grad
from orwcfm_fast.kernels._launch import (
    Launch,
    channels_and_pixels,
    cut,
    is_strided,
    multiprocessors,
    pointers,
)
from orwcfm_fast.kernels._triton import tl, triton
from orwcfm_fast.kernels.philox import X0, T, normal_kernel, unit_kernel, words_kernel
from orwcfm_fast.kernels.random_numbers import normal_reference, uniform_reference


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
    T_PURPOSE: tl.constexpr,
    LATE: tl.constexpr,
):
    """One chunk of one sample; t is drawn for T_PURPOSE and written to t_ptr, or read there where that is None."""
    sample = tl.program_id(0) // chunks
    first = (tl.program_id(0) % chunks).to(tl.int64) * (BLOCK * BLOCKS)
    base = sample.to(tl.int64) * elements
    # seed and index live on the device: Python integers would freeze under CUDA-graph capture
    seed, index = tl.load(seed_ptr), tl.load(index_ptr + sample)
    if T_PURPOSE is not None:
        word, _, _, _ = words_kernel((sample * 0).to(tl.uint32), seed, index, T_PURPOSE)
        t = unit_kernel(word)
        if LATE:
            t = tl.sqrt(t)
        tl.store(t_ptr + sample, t)  # every chunk writes the same number
    else:
        t = tl.load(t_ptr + sample)
    lane = tl.arange(0, BLOCK)
    for block in tl.static_range(BLOCKS):
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
    x_t = normal_reference(x1.shape[1:], seed, index, X0, dtype).mul_(1 - t).addcmul_(t, x1.to(dtype))
    return torch.empty_like(x1).copy_(x_t)


def interpolate_at_random_times_reference(
    x1: Tensor, seed: Tensor, index: Tensor, late: bool = False
) -> tuple[Tensor, Tensor]:
    """`interpolate_at_random_times` in plain torch."""
    t = uniform_reference((), seed, index, T)
    t = t.sqrt() if late else t
    return interpolate_reference(x1, t, seed, index), t


def _check(x1: Tensor, t: Tensor | None, seed: Tensor, index: Tensor) -> None:
    check_samples("x1", x1)
    if t is not None:
        check_tensor("t", t, torch.float32, (x1.shape[0],), x1.device)
    check_counters(seed, index, x1)


def plan_interpolate(
    x1: Tensor, t: Tensor | None, seed: Tensor, index: Tensor, late: bool = False
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The kernel call, and x_t and t: outputs that it fills. t is drawn where None, with density 2t where `late`."""
    _check(x1, t, seed, index)
    out = torch.empty_like(x1)
    elements = x1[0].numel()
    chunks, meta = cut(elements, len(x1), x1.itemsize, multiprocessors(x1.device))
    meta = meta | {
        "PURPOSE": X0,
        "STRIDED": is_strided("x1", x1),
        "T_PURPOSE": T if t is None else None,
        "LATE": late,
    }
    t = x1.new_empty(len(x1), dtype=torch.float32) if t is None else t
    args = {"x1_ptr": x1, "t_ptr": t, "seed_ptr": seed, "index_ptr": index, "out_ptr": out}
    sizes = {"elements": elements, "chunks": chunks, **channels_and_pixels(x1)}
    return [Launch(_interpolate_kernel, (x1.shape[0] * chunks,), args | sizes, meta)], (out, t)


def launch_interpolate(
    x1: Tensor, t: Tensor | None, seed: Tensor, index: Tensor, late: bool = False
) -> tuple[Tensor, Tensor]:
    """Run the kernel; the interpreter's tests call this, everyone else the ops."""
    launches, outputs = plan_interpolate(x1, t, seed, index, late)
    for launch in launches:
        launch.run(x1)
    return outputs


@torch.library.custom_op("orwcfm::interpolate", mutates_args=(), device_types="cuda")
def interpolate(x1: Tensor, t: Tensor, seed: Tensor, index: Tensor) -> Tensor:
    """The point x_t = (1 - t) * x0 + t * x1 of the straight path from noise to data (Lipman et al. 2023).

    x0 is normal(shape, seed, index, X0) of kernels/random_numbers.py, the noise that anchored_residual draws again.

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
    return launch_interpolate(x1, t, seed, index)[0]


@interpolate.register_kernel("cpu")
def _(x1, t, seed, index):
    _check(x1, t, seed, index)
    return interpolate_reference(x1, t, seed, index)


@interpolate.register_fake
def _(x1, t, seed, index):
    _check(x1, t, seed, index)
    return torch.empty_like(x1)


@torch.library.custom_op("orwcfm::interpolate_at_random_times", mutates_args=(), device_types="cuda")
def interpolate_at_random_times(
    x1: Tensor, seed: Tensor, index: Tensor, late: bool = False
) -> tuple[Tensor, Tensor]:
    """`interpolate` with t drawn in the same launch, from u = uniform((), seed, index, T) of kernels/random_numbers.py.

    Args:
        late: t = √u, of density 2t, in place of t = u.

    Returns:
        x_t with x1's shape, dtype and strides, and t, float32 [B].
    """
    return launch_interpolate(x1, None, seed, index, late)


@interpolate_at_random_times.register_kernel("cpu")
def _(x1, seed, index, late=False):
    _check(x1, None, seed, index)
    return interpolate_at_random_times_reference(x1, seed, index, late)


@interpolate_at_random_times.register_fake
def _(x1, seed, index, late=False):
    _check(x1, None, seed, index)
    return torch.empty_like(x1), x1.new_empty(x1.shape[0], dtype=torch.float32)


def _refuse_grads(names: tuple[str, ...]):
    return lambda ctx, inputs, output: refuse_grad(ctx.needs_input_grad[: len(names)], names, "interpolate")


interpolate.register_autograd(lambda ctx, g: (None,) * 4, setup_context=_refuse_grads(("x1", "t")))
interpolate_at_random_times.register_autograd(
    lambda ctx, *g: (None,) * 4, setup_context=_refuse_grads(("x1",))
)
