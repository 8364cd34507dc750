"""How samples are cut into programs, and where an element lies; shared by the kernels."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orwcfm_fast.kernels._triton import tl, triton


class Launch(NamedTuple):
    """One kernel call; the static test compiles it where a launcher runs it."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    meta: dict[str, Any]

    def run(self, device_of: Tensor) -> None:
        with torch.cuda.device_of(device_of):
            self.kernel[self.grid](**self.args, **self.meta)


def multiprocessors(device: torch.device) -> int:
    """Of this GPU; an H100's where there is none but the kernel is to be compiled for one."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else 132  # the interpreter runs one program after the other


@lru_cache(maxsize=256)
def cut(elements: int, batch: int, itemsize: int, processors: int) -> tuple[int, dict[str, Any]]:
    """Number of chunks of a sample, and the block sizes.

    A program takes one chunk: BLOCKS blocks of BLOCK elements of one sample, eight to a thread. Chunks are as large as
    leaves 4 programs to each multiprocessor, without a mask where whole blocks divide the sample.
    """
    found: tuple[int, dict[str, Any]] = (0, {})
    for warps, blocks in ((4, 4), (4, 3), (4, 2), (4, 1), (2, 1), (1, 1)):
        block = 256 * warps
        divides = elements % 256 == 0
        idle = elements <= (block * (blocks - 1) if blocks > 1 else block // 2)
        if warps > 1 and elements % (block * blocks) and (divides or idle):
            continue
        chunks = -(-elements // (block * blocks))
        meta = {"BLOCK": block, "BLOCKS": blocks, "MASKED": not divides, "num_warps": warps}
        found = chunks, meta | {"NEIGHBOURS": 4 if itemsize == 4 else 8, "enable_fp_fusion": True}
        if batch * chunks >= 4 * processors:
            break
    return found


def is_strided(name: str, x: Tensor) -> bool:
    """Whether x is read by channel and pixel (channels_last) instead of in a row."""
    strided = not x.is_contiguous()
    if strided and x[0].numel() >= 2**31:
        raise ValueError(f"{name} is channels_last with {x[0].numel()} elements a sample, expected < 2^31")
    return strided


def channels_and_pixels(x: Tensor) -> dict[str, int]:
    """Of one sample [C, ...]; only strided samples use them."""
    return (
        {"channels": x.shape[1], "pixels": math.prod(x.shape[2:])}
        if x.ndim > 2
        else {"channels": 1, "pixels": 1}
    )


@triton.jit
def pointers(base, start, lane, channels, pixels, STRIDED: tl.constexpr):
    """Where the elements start + lane (row-major in the sample) of the sample at base are stored."""
    if STRIDED:
        element = start.to(tl.int32) + lane
        channel = element // pixels
        return base + channel + (element - channel * pixels) * channels
    else:
        return base + start + lane
