"""Seconds by phase, without a host sync inside a round."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Adds up seconds by name: wall clock on a CPU, CUDA events (read at the end of a round) on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._cuda and torch.cuda.is_current_stream_capturing():  # nothing runs now
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
        """Count seconds spent elsewhere: those of a round's part before it was interrupted."""
        for name, value in seconds.items():
            self._seconds[name] += value

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last read, 0 for a phase that never was; waits for the device once."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        found = self._seconds.copy()
        self._seconds.clear()
        self._events.clear()
        return found
