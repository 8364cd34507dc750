"""Chunks on threads of their own: torch's threads wait for each other at every operation, which is
slow for small arrays and tenfold slower on a busy machine."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK = 256  # rows at once: the work arrays stay in cache


@contextmanager
def single_threaded() -> Iterator[int]:
    """torch on one thread inside; yields how many it had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_parallel(function: Callable[[Tensor], Tensor], x: Tensor, threads: int) -> Tensor:
    """function of x, CHUNK rows at a time, one thread to a chunk: the same bits on any number of threads."""
    parts = x.split(CHUNK)
    if threads == 1 or len(parts) == 1:
        return torch.cat([function(part) for part in parts])
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.cat(list(pool.map(function, parts)))
