"""Out of memory: recognised on every device, and answered with half of what was asked for."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from orwcfm_fast.errors import WorkError

T = TypeVar("T")
SAID = (
    "can't allocate memory",  # the CPU's allocator
    "out of memory",  # the CUDA driver, also by way of Triton and NCCL
    "STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN, of a handle or a workspace
    "unable to find an engine to execute",  # cuDNN, where no engine's workspace fits
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is out: a GPU's, the CPU allocator's or Python's own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, WorkError):  # of our own, which may tell of it
        return False
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SAID)


def halving(work: Callable[[int], T], size: int, name: str, halved: Callable[[int], None]) -> T:
    """work(size); where memory runs out, work(size / 2) and so on, each told to `halved`.

    Raises:
        WorkError: memory runs out even with a size of 1.
    """
    while True:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                reason = str(error).split("\n")[0] or type(error).__name__
                raise WorkError(f"out of memory even with a {name} of 1: {reason}") from None
        # outside of the handler: the error's frames no longer hold the tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = max(1, size // 2)
        halved(size)
