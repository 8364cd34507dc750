"""What a piece of work allocates at any size, from two that were tried.

A probe records every allocation of torch in order. The same work at another batch size allocates in the same
order, each time an amount affine in the batch; so two probes give the whole course at any size, and its peak.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from orwcfm_fast.device import out_of_memory

PROFILE_SECONDS = 10.0  # for each thing probed


@dataclass(frozen=True)
class AllocationProfile:
    """What one piece of work allocates and how long it takes, by its size.

    Args:
        sizes: two sizes that were tried; changes: bytes of each allocation (+) and release (−) in order;
            seconds: of each.
    """

    sizes: tuple[int, int]
    changes: tuple[list[int], list[int]]
    seconds: tuple[float, float]

    def peak(self, size: int) -> int:
        """Most bytes at once, above those there before."""
        (a, b), (first, second) = self.sizes, self.changes
        share = (size - a) / (b - a)
        if len(first) == len(second):
            return int(
                max(accumulate((x + (y - x) * share for x, y in zip(first, second, strict=True)), initial=0))
            )
        low, high = (max(accumulate(changes, initial=0)) for changes in (first, second))
        return int(low + (high - low) * share)

    def time(self, size: int) -> float:
        """Seconds, on the line through both sizes that were tried."""
        (a, b), (first, second) = self.sizes, self.seconds
        slope = max(second - first, 0.0) / (b - a)
        return max(second + slope * (size - b), 0.0)


def record_allocations(work: Callable[[], object], device: torch.device) -> list[int]:
    """Bytes of every allocation (+) and release (−) that torch makes on the device during `work`, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its own lines say nothing of a plan
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        work()
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    assert profile.profiler and profile.profiler.kineto_results
    events = [
        e
        for e in profile.profiler.kineto_results.events()
        if e.name() == "[memory]" and e.device_type() == wanted
    ]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def profile_allocations(work: Callable[[int], object], want: int, device: torch.device) -> AllocationProfile:
    """Try `work` at growing sizes, at most half of `want` (or 2), while time and memory allow.

    Raises:
        RuntimeError: out of memory at the least sizes.
    """
    tried: list[tuple[int, list[int], float]] = []
    size, began = 1, time.perf_counter()
    while size <= max(2, want // 2) and (len(tried) < 2 or time.perf_counter() - began < PROFILE_SECONDS):
        try:
            work(size)  # first use of a size chooses kernels
            seconds = min(_timed(work, size, device) for _ in range(2))
            tried.append((size, record_allocations(lambda size=size: work(size), device), seconds))  # type: ignore[misc]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(tried) < 2:
                raise
            break
        half = max(2, want // 2)
        size = min(4 * size, half) if size < half else size + 1
    (a, first, fast), (b, second, slow) = tried[-2:]
    return AllocationProfile((a, b), (first, second), (fast, slow))


def _timed(work: Callable[[int], object], size: int, device: torch.device) -> float:
    began = time.perf_counter()
    work(size)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
