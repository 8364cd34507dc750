"""GroupNorm, then SiLU where requested, of channels_last maps: one pass over memory forward and one backward.

Statistics of each sample and group, over its N = channels / groups * height * width numbers, in float32:

    n = (x - mean) / sqrt(var + eps)        h = weight * n + bias        y = h * sigmoid(h), or h

    dh = dy * sigmoid(h) * (1 + h * (1 - sigmoid(h))), or dy
    dweight = sum over samples and pixels of dh * n        dbias = sum over samples and pixels of dh
    dx = (weight * dh - (sum of weight * dh + n * sum of weight * dh * n) / N) / sqrt(var + eps)

Wu and He, "Group Normalization", ECCV 2018; Elfwing, Uchibe, Doya, "Sigmoid-weighted linear units", 2018.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.kernels._check import DTYPES, check_like, check_tensor
from orwcfm_fast.kernels._launch import Launch
from orwcfm_fast.kernels._triton import tl, triton

Output = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _sum_of_group(x, TILE: tl.constexpr, LANES: tl.constexpr):
    """x [TILE * LANES] of one channel a lane → at each lane the sum over its group's lanes."""
    total = tl.sum(tl.reshape(x, [TILE, LANES]), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], [TILE, LANES]), [TILE * LANES])


@triton.jit
def _channels(tile, groups, WIDTH: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """Of each lane: its channel, its group, whether it is one of the map's, and whether it is its group's first."""
    lane = tl.arange(0, TILE * LANES)
    group = tile * TILE + lane // LANES
    inside = lane % LANES
    channel = tile * (TILE * WIDTH) + lane if WIDTH == LANES else group * WIDTH + inside
    live = (group < groups) & (inside < WIDTH)
    return channel, group, live, live & (inside == 0)


@triton.jit
def _group_norm_silu_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    pixels,
    groups,
    tiles,
    EPS: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    PIXELS: tl.constexpr,
    HELD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """TILE groups of one sample, of WIDTH channels each; HELD: all their pixels at once, in registers."""
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    channel, group, live, first = _channels(tile, groups, WIDTH, LANES, TILE)
    row = groups * WIDTH
    base = sample.to(tl.int64) * pixels * row
    pixel = tl.arange(0, PIXELS)
    offset = pixel[:, None] * row + channel[None, :]
    mask = (pixel < pixels)[:, None] & live[None, :] if MASKED else None
    numbers = pixels * WIDTH
    if HELD:
        if MASKED:
            x = tl.load(x_ptr + base + offset, mask, 0.0).to(tl.float32)
        else:
            x = tl.load(x_ptr + base + offset).to(tl.float32)
        mean = _sum_of_group(tl.sum(x, 0), TILE, LANES) / numbers
        x -= mean[None, :]
        if MASKED:
            x = tl.where(mask, x, 0.0)
        var = _sum_of_group(tl.sum(x * x, 0), TILE, LANES) / numbers
    else:
        total = tl.zeros([PIXELS, TILE * LANES], tl.float32)
        for start in range(0, pixels, PIXELS):
            rest = (pixel < pixels - start)[:, None] & live[None, :]
            total += tl.load(x_ptr + base + (start * row + offset), rest, 0.0).to(tl.float32)
        mean = _sum_of_group(tl.sum(total, 0), TILE, LANES) / numbers
        total = tl.zeros([PIXELS, TILE * LANES], tl.float32)
        for start in range(0, pixels, PIXELS):
            rest = (pixel < pixels - start)[:, None] & live[None, :]
            x = tl.load(x_ptr + base + (start * row + offset), rest, 0.0).to(tl.float32)
            x = tl.where(rest, x - mean[None, :], 0.0)
            total += x * x
        var = _sum_of_group(tl.sum(total, 0), TILE, LANES) / numbers
    rstd = 1 / tl.sqrt(var + EPS)
    tl.store(mean_ptr + sample * groups + group, mean, first)
    tl.store(rstd_ptr + sample * groups + group, rstd, first)
    scale = rstd * tl.load(weight_ptr + channel, live, 0.0).to(tl.float32)
    shift = tl.load(bias_ptr + channel, live, 0.0).to(tl.float32)
    if HELD:
        h = x * scale[None, :] + shift[None, :]
        if SILU:
            h = h / (1 + tl.exp(-h))
        tl.store(y_ptr + base + offset, h.to(y_ptr.dtype.element_ty), mask)
    else:
        shift -= mean * scale
        for start in range(0, pixels, PIXELS):
            rest = (pixel < pixels - start)[:, None] & live[None, :]
            at = base + (start * row + offset)
            h = tl.load(x_ptr + at, rest, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
            if SILU:
                h = h / (1 + tl.exp(-h))
            tl.store(y_ptr + at, h.to(y_ptr.dtype.element_ty), rest)


@triton.jit
def _normalised(x_ptr, at, mask, mean, rstd, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        return tl.where(mask, (x - mean[None, :]) * rstd[None, :], 0.0)
    else:
        return (tl.load(x_ptr + at).to(tl.float32) - mean[None, :]) * rstd[None, :]


@triton.jit
def _before_silu(dy_ptr, at, mask, n, weight, bias, SILU: tl.constexpr, MASKED: tl.constexpr):
    """dh, the gradient by what SiLU was applied to."""
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32) if MASKED else tl.load(dy_ptr + at).to(tl.float32)
    if SILU:
        h = n * weight[None, :] + bias[None, :]
        sigmoid = 1 / (1 + tl.exp(-h))
        dy *= sigmoid * (1 + h * (1 - sigmoid))
    return dy


@triton.jit
def _group_norm_silu_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    pixels,
    groups,
    tiles,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    PIXELS: tl.constexpr,
    HELD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """As in _group_norm_silu_kernel; dweight_ptr and dbias_ptr hold a row for each sample."""
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    channel, group, live, _ = _channels(tile, groups, WIDTH, LANES, TILE)
    row = groups * WIDTH
    base = sample.to(tl.int64) * pixels * row
    pixel = tl.arange(0, PIXELS)
    offset = pixel[:, None] * row + channel[None, :]
    mask = (pixel < pixels)[:, None] & live[None, :] if MASKED else None
    weight = tl.load(weight_ptr + channel, live, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, live, 0.0).to(tl.float32)
    mean = tl.load(mean_ptr + sample * groups + group, live, 0.0)
    rstd = tl.load(rstd_ptr + sample * groups + group, live, 0.0)
    if HELD:
        n = _normalised(x_ptr, base + offset, mask, mean, rstd, MASKED)
        dh = _before_silu(dy_ptr, base + offset, mask, n, weight, bias, SILU, MASKED)
        dweight, dbias = tl.sum(dh * n, 0), tl.sum(dh, 0)
    else:
        dweights = tl.zeros([PIXELS, TILE * LANES], tl.float32)
        dbiases = tl.zeros([PIXELS, TILE * LANES], tl.float32)
        for start in range(0, pixels, PIXELS):
            rest = (pixel < pixels - start)[:, None] & live[None, :]
            at = base + (start * row + offset)
            n = _normalised(x_ptr, at, rest, mean, rstd, True)
            dh = _before_silu(dy_ptr, at, rest, n, weight, bias, SILU, True)
            dweights += dh * n
            dbiases += dh
        dweight, dbias = tl.sum(dweights, 0), tl.sum(dbiases, 0)
    tl.store(dweight_ptr + sample * row + channel, dweight, live)
    tl.store(dbias_ptr + sample * row + channel, dbias, live)
    numbers = pixels * WIDTH
    along = rstd * _sum_of_group(weight * dweight, TILE, LANES) / numbers
    level = rstd * _sum_of_group(weight * dbias, TILE, LANES) / numbers
    scale = rstd * weight
    if HELD:
        dx = dh * scale[None, :] - (level[None, :] + n * along[None, :])
        tl.store(dx_ptr + base + offset, dx.to(dx_ptr.dtype.element_ty), mask)
    else:
        for start in range(0, pixels, PIXELS):
            rest = (pixel < pixels - start)[:, None] & live[None, :]
            at = base + (start * row + offset)
            n = _normalised(x_ptr, at, rest, mean, rstd, True)
            dh = _before_silu(dy_ptr, at, rest, n, weight, bias, SILU, True)
            dx = dh * scale[None, :] - (level[None, :] + n * along[None, :])
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), rest)


def _pieces(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A map, and what belongs to its samples, a few samples at a time.

    Temporaries then stay in a CPU's cache: fresh pages of memory cost more than the arithmetic.
    """
    size = max(1, 2**16 // first[0].numel())
    yield from zip(*(x.split(size) for x in (first, *others)), strict=True)


def _scale_and_shift(mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Those [b, C, 1, 1] with which h = x * scale + shift."""
    width = len(weight) // mean.shape[1]
    mean, rstd = (x[:, :, None].expand(-1, -1, width).flatten(1) for x in (mean, rstd))
    scale = rstd * weight
    return scale[..., None, None], torch.addcmul(bias, mean, scale, value=-1)[..., None, None]


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, eps: float = 1e-5
) -> Output:
    """The formulas in plain torch; the CPU path, and what tests compare with. Also takes float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(dtype), bias.to(dtype)
    y, means, rstds = torch.empty_like(x), [], []
    for part, to in _pieces(x, y):
        part = part.to(dtype)
        rows = part.permute(0, 2, 3, 1).flatten(1, 2)  # [b, pixels, channels]
        level = rows.mean(1)
        mean = level.unflatten(1, (groups, -1)).mean(2)
        apart = level.unflatten(1, (groups, -1)) - mean[..., None]
        squares = (rows - level[:, None]).square_().mean(1).unflatten(1, (groups, -1))
        var = (squares + apart.square()).mean(2)
        means.append(mean)
        rstds.append((var + eps).rsqrt())
        scale, shift = _scale_and_shift(mean, rstds[-1], weight, bias)
        h = torch.addcmul(shift, part, scale)
        to.copy_(torch.nn.functional.silu(h, inplace=True) if silu else h)
    return y, torch.cat(means), torch.cat(rstds)


def group_norm_silu_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> Output:
    """`group_norm_silu_backward` by torch's own backward ops. Also takes float64."""
    dtype, (_, c, height, width) = torch.promote_types(x.dtype, torch.float32), x.shape
    weight32, bias32 = weight.to(dtype), bias.to(dtype)
    dx, dweight, dbias = torch.empty_like(x), torch.zeros_like(weight32), torch.zeros_like(bias32)
    for part, dh, to, m, r in _pieces(x, dy, dx, mean, rstd):
        part, dh = part.to(dtype), dh.to(dtype)
        if silu:
            scale, shift = _scale_and_shift(m, r, weight32, bias32)
            dh = torch.ops.aten.silu_backward(dh, torch.addcmul(shift, part, scale))
        found = torch.ops.aten.native_group_norm_backward(
            dh, part, m, r, weight32, len(part), c, height * width, m.shape[1], [True, True, True]
        )
        to.copy_(found[0])
        dweight += found[1]
        dbias += found[2]
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    dtypes = (*DTYPES, torch.float64) if x.device.type == "cpu" else DTYPES
    if x.dtype not in dtypes:
        raise ValueError(f"x has dtype {x.dtype}, expected {' or '.join(map(str, dtypes))}")
    if x.ndim != 4 or x.numel() == 0 or x.shape[1] % groups:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [B, C, H, W] with C a multiple of {groups}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x has strides {x.stride()}, expected channels_last")
    if x[0].numel() >= 2**31:
        raise ValueError(f"x has {x[0].numel()} elements a sample, expected < 2^31")
    for name, p in (("weight", weight), ("bias", bias)):
        if p.dtype != x.dtype:
            check_tensor(name, p, torch.float32, (x.shape[1],), x.device)
        else:
            check_tensor(name, p, x.dtype, (x.shape[1],), x.device)


def _cut(x: Tensor, groups: int, largest: int = 16384) -> tuple[int, dict[str, Any]]:
    """Programs a sample, and what each takes: some groups, all their pixels at once up to `largest` numbers."""
    width, pixels = x.shape[1] // groups, x.shape[2] * x.shape[3]
    lanes, tile = triton.next_power_of_2(width), 1
    at_once = min(triton.next_power_of_2(pixels), 1024)
    # whole 32-byte sectors, and enough numbers for a few warps
    while tile < groups and (tile * lanes * x.itemsize < 32 or tile * lanes * at_once < 4096):
        tile *= 2
    held = pixels <= min(at_once, largest // (tile * lanes))
    if not held:  # sums are kept beside the numbers
        at_once = max(1, 8192 // (tile * lanes))
    tiles = triton.cdiv(groups, tile)
    exact = lanes == width and groups % tile == 0 and pixels % at_once == 0
    meta = {
        "WIDTH": width,
        "LANES": lanes,
        "TILE": tile,
        "PIXELS": at_once,
        "HELD": held,
        "MASKED": not exact,
        "num_warps": max(1, min(16, tile * lanes * at_once // (1024 if held else 512))),
        "enable_fp_fusion": True,
    }
    return tiles, meta


def plan_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, eps: float = 1e-5
) -> tuple[list[Launch], Output]:
    """The kernel call, and the outputs that it fills."""
    _check(x, weight, bias, groups)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(len(x), groups, dtype=torch.float32) for _ in range(2))
    tiles, meta = _cut(x, groups)
    args = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "y_ptr": y,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
    }
    sizes = {"pixels": x.shape[2] * x.shape[3], "groups": groups, "tiles": tiles}
    launch = Launch(
        _group_norm_silu_kernel, (len(x) * tiles,), args | sizes, meta | {"EPS": eps, "SILU": silu}
    )
    return [launch], (y, mean, rstd)


def plan_group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[list[Launch], Output]:
    """The kernel call, and what it fills: dx, and the parts of dweight and of dbias of each sample [B, C]."""
    groups = mean.shape[1]
    _check(x, weight, bias, groups)
    check_like("dy", dy, "x", x)
    dx = torch.empty_like(x)
    dweight, dbias = x.new_empty(2, len(x), x.shape[1], dtype=torch.float32)
    # dy is held beside x, and masks beside both where a group's width is no power of two: more would spill
    largest = 16384 if (x.shape[1] // groups).bit_count() == 1 else 8192
    tiles, meta = _cut(x, groups, largest)
    args = {
        "dy_ptr": dy,
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
    }
    outputs = {"dx_ptr": dx, "dweight_ptr": dweight, "dbias_ptr": dbias}
    sizes = {"pixels": x.shape[2] * x.shape[3], "groups": groups, "tiles": tiles}
    launch = Launch(
        _group_norm_silu_backward_kernel, (len(x) * tiles,), args | outputs | sizes, meta | {"SILU": silu}
    )
    return [launch], (dx, dweight, dbias)


def launch_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, eps: float = 1e-5
) -> Output:
    """Run the kernel; the interpreter's tests call this, everyone else the op."""
    launches, outputs = plan_group_norm_silu(x, weight, bias, groups, silu, eps)
    for launch in launches:
        launch.run(x)
    return outputs


def launch_group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> Output:
    """Run the kernel, and add up the parts of the samples."""
    launches, (dx, dweight, dbias) = plan_group_norm_silu_backward(dy, x, weight, bias, mean, rstd, silu)
    for launch in launches:
        launch.run(x)
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)


@torch.library.custom_op("orwcfm::group_norm_silu", mutates_args=(), device_types="cuda")
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm over `groups` groups of channels, then SiLU if `silu`.

    Args:
        x: maps [B, C, H, W], float32, bfloat16 or float16 (on a CPU also float64), channels_last.
        weight, bias: [C], float32 or x's dtype.
        groups: divides C.
        eps: added to the variance.

    Returns:
        y like x (dtype and strides), computed in float32; mean and 1 / sqrt(var + eps) [B, groups] in float32. Only y
        is differentiable, once.

    Raises:
        ValueError: an argument of another shape, dtype, device or layout.
    """
    return launch_group_norm_silu(x, weight, bias, groups, silu, eps)


@group_norm_silu.register_kernel("cpu")
def _(x, weight, bias, groups, silu, eps=1e-5):
    _check(x, weight, bias, groups)
    return group_norm_silu_reference(x, weight, bias, groups, silu, eps)


@group_norm_silu.register_fake
def _(x, weight, bias, groups, silu, eps=1e-5):
    _check(x, weight, bias, groups)
    mean, rstd = (
        x.new_empty(x.shape[0], groups, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)
    )
    return torch.empty_like(x), mean, rstd


@torch.library.custom_op("orwcfm::group_norm_silu_backward", mutates_args=(), device_types="cuda")
def group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, dweight and dbias like weight, from dy like x and what `group_norm_silu` took and returned."""
    return launch_group_norm_silu_backward(dy, x, weight, bias, mean, rstd, silu)


@group_norm_silu_backward.register_kernel("cpu")
def _(dy, x, weight, bias, mean, rstd, silu):
    return group_norm_silu_backward_reference(dy, x, weight, bias, mean, rstd, silu)


@group_norm_silu_backward.register_fake
def _(dy, x, weight, bias, mean, rstd, silu):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, ctx.silu, *_ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx, dy, *_):
    if torch.is_grad_enabled():
        raise NotImplementedError("group_norm_silu has no second derivative (create_graph=True)")
    if dy is None:
        return (None,) * 6
    dy = dy.contiguous(memory_format=torch.channels_last)  # where the layer behind gave another layout
    return *group_norm_silu_backward(dy, *ctx.saved_tensors, ctx.silu), None, None, None


group_norm_silu.register_autograd(_backward, setup_context=_setup_context)
