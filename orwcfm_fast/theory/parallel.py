"""Rows in chunks on a pool of threads: torch's own threads synchronise at every operation, which is slow for
small arrays and ten times slower on a busy machine."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK = 256  # rows at once: the work arrays stay in cache


@contextmanager
def single_threaded() -> Iterator[int]:
    """Run torch on one thread inside the block; yields the number of threads that it had before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_parallel(function: Callable[[Tensor], Tensor], x: Tensor, threads: int) -> Tensor:
    """Apply `function` to x, CHUNK rows at a time, one thread to a chunk; the same bits on any number of threads."""
    parts = x.split(CHUNK)
    if threads == 1 or len(parts) == 1:
        return torch.cat([function(part) for part in parts])
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.cat(list(pool.map(function, parts)))
