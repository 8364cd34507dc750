"""How long calls take, of the kernels alone and of the host that issues them, and what memory."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds_of(function: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    """Median seconds of a call, after warming up; about `budget` seconds of calls."""
    return seconds_in_turn([function], device, budget)[0]


def seconds_in_turn(
    functions: list[Callable[[], object]], device: torch.device, budget: float = 0.5
) -> list[float]:
    """`seconds_of` each function, called in turn: what slows the machine for a while slows them all."""
    found: list[list[float]] = [[] for _ in functions]
    for function in functions * 3:
        function()
    end = time.perf_counter() + budget * len(functions)
    while len(found[0]) < 5 or (time.perf_counter() < end and len(found[0]) < 1000):
        for function, seconds in zip(functions, found, strict=True):
            seconds.append(_seconds(function, device))
    return [statistics.median(seconds) for seconds in found]


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        function()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1000
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def kernels_alone(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Replays the call's kernels from a CUDA graph; the call itself on a CPU, or where it cannot be captured."""
    if device.type != "cuda":
        return call
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def host_seconds_of(call: Callable[[], object], device: torch.device) -> float | None:
    """Median seconds of the host in issuing the call; None on a CPU, which does the work itself."""
    if device.type != "cuda":
        return None
    found = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def copying(moved: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes `moved` bytes together: caches serve it as they serve an op of that size."""
    x = torch.zeros(max(moved // 2, 1), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Device memory of a call above what is allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
