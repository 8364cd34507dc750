"""Seconds of each phase of a round, measured without making the host wait for the GPU during the round."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Seconds by name of phase: wall-clock time on a CPU; on a GPU, CUDA events that are read after a round."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._cuda and torch.cuda.is_current_stream_capturing():  # kernels are recorded, none runs
            yield
        elif self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin

    def add(self, seconds: dict[str, float]) -> None:
        """Add the seconds of the part of a round that ran before it was interrupted."""
        for name, value in seconds.items():
            self._seconds[name] += value

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last read, 0 for a phase that did not occur; waits for the device once."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        found = self._seconds.copy()
        self._seconds.clear()
        self._events.clear()
        return found
