"""Memory and time of a computation at any batch size, extrapolated from two sizes that were measured.

Every allocation and release of torch is recorded in order. At another batch size the same computation allocates in
the same order, and each amount is affine in the batch size. Two recordings therefore give the whole sequence at any
batch size, and from it the peak.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from orwcfm_fast.device import out_of_memory

PROFILE_SECONDS = 10.0  # spent at most on larger sizes of one computation


@dataclass(frozen=True)
class AllocationProfile:
    """Memory and time of one computation as functions of its batch size.

    Args:
        sizes: the two batch sizes that were measured.
        changes: for each of them the bytes of every allocation (+) and release (−), in order.
        seconds: for each of them the time that it took.
    """

    sizes: tuple[int, int]
    changes: tuple[list[int], list[int]]
    seconds: tuple[float, float]

    def peak(self, size: int) -> int:
        """Peak memory in bytes at this batch size, on top of what was allocated before."""
        (a, b), (first, second) = self.sizes, self.changes
        share = (size - a) / (b - a)
        if len(first) == len(second):
            return int(
                max(accumulate((x + (y - x) * share for x, y in zip(first, second, strict=True)), initial=0))
            )
        low, high = (max(accumulate(changes, initial=0)) for changes in (first, second))
        return int(low + (high - low) * share)

    def time(self, size: int) -> float:
        """Seconds at this batch size, on the line through the two that were measured."""
        (a, b), (first, second) = self.sizes, self.seconds
        slope = max(second - first, 0.0) / (b - a)
        return max(second + slope * (size - b), 0.0)


def record_allocations(work: Callable[[], object], device: torch.device) -> list[int]:
    """Bytes of every allocation (+) and release (−) by torch on the device during `work`, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler's own log lines off the terminal
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    # acc_events: torch 2.11 warns without it, though there is one cycle
    with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profile:
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
    """Measure `work` at growing batch sizes and keep the two largest.

    Args:
        work: called with a batch size.
        want: the batch size of interest; nothing beyond half of it (or 2) is tried, nor after PROFILE_SECONDS.

    Raises:
        RuntimeError: out of memory at the two smallest sizes.
    """
    tried: list[tuple[int, list[int], float]] = []
    size, began = 1, time.perf_counter()
    while size <= max(2, want // 2) and (len(tried) < 2 or time.perf_counter() - began < PROFILE_SECONDS):
        try:
            work(size)  # the first call at a size selects kernels
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
