"""How samples are cut into programs, and where an element lies; shared by the kernels."""

import math
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


def cut(elements: int, dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """Number of chunks of a sample, and the block sizes.

    A program takes one chunk: BLOCKS blocks of BLOCK elements of one sample, eight to a thread. No mask
    where whole blocks divide the sample.
    """
    warps = 4 if elements >= 1024 else 1
    block = 256 * warps
    blocks = min(8, -(-elements // block))
    if elements % block == 0:
        blocks = max(n for n in range(1, blocks + 1) if elements // block % n == 0)
    chunk = block * blocks
    meta = {
        "BLOCK": block,
        "BLOCKS": blocks,
        "MASKED": elements % chunk != 0,
        "NEIGHBOURS": 4 if dtype == torch.float32 else 8,
        "num_warps": warps,
        "enable_fp_fusion": True,  # its default flips in triton 3.10
    }
    return -(-elements // chunk), meta


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
