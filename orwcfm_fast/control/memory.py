"""On out-of-memory, retry with half the batch."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.device import out_of_memory
from orwcfm_fast.errors import WorkError

T = TypeVar("T")
NAMES = {"micro_batch": "micro-batch", "chunk": "chunk", "reward_batch": "reward batch"}


class MemoryFallback(BatchSizes):
    """Batch sizes that are halved where memory runs out, and stay so.

    Attributes:
        on_change: called with a line of text at each change.
    """

    on_change: Callable[[str], None] = staticmethod(lambda text: None)

    def fit(self, name: str, work: Callable[[int], T], n: int) -> T:
        """work(size) for n samples; on out-of-memory again with half the size, down to 1.

        Raises:
            WorkError: memory runs out even with a size of 1.
        """
        while True:
            size = self.limit(name, n)
            try:
                return work(size)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if size == 1:
                    reason = str(error).split("\n")[0] or type(error).__name__
                    raise WorkError(f"out of memory even with a {NAMES[name]} of 1: {reason}") from None
            # outside of the handler: the error's frames no longer hold the tensors
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            setattr(self, name, size // 2)
            self.on_change(f"out of memory: continues with a {NAMES[name]} of {size // 2}")
