"""How many samples go through a network or a reward at once; on out-of-memory, retry with half as many."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from orwcfm_fast.errors import WorkError
from orwcfm_fast.settings import Finetune

T = TypeVar("T")
NAMES = {"micro_batch": "micro-batch", "chunk": "chunk", "reward_batch": "reward batch"}


@dataclass
class BatchSizes:
    """The sizes in force: one object that the loop, its rewards and its evaluation share.

    Attributes:
        micro_batch: samples at once in a gradient step.
        chunk: samples at once without gradient, in a rollout or an evaluation.
        reward_batch: samples of one reward call; 0: all.
        fixed: ranks share each call of a network, which one of them cannot repeat with less (a reward's call it can).
        on_change: called with a line of text when a size was halved.
    """

    micro_batch: int = 0
    chunk: int = 0
    reward_batch: int = 0
    fixed: bool = False
    on_change: Callable[[str], None] = field(default=lambda text: None, repr=False, compare=False)

    @classmethod
    def of(cls, s: Finetune) -> "BatchSizes":
        """Those of the settings; a micro-batch is at most the batch."""
        return cls(min(s.micro_batch or s.batch, s.batch), min(s.chunk, s.rollout), s.reward_batch)

    def limit(self, name: str, n: int) -> int:
        """The size `name` in force for n samples, at least 1."""
        return max(1, min(getattr(self, name) or n, n))

    def fit(self, name: str, work: Callable[[int], T], n: int) -> T:
        """work(size) with the size `name` in force for n samples; on out-of-memory with half, from then on.

        Raises:
            WorkError: memory runs out even with a size of 1.
        """
        import torch

        from orwcfm_fast.device import out_of_memory
        from orwcfm_fast.distributed import OutOfStep

        while True:
            size = self.limit(name, n)
            try:
                return work(size)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0] or type(error).__name__
                if self.fixed and name != "reward_batch":
                    flag = name.replace("_", "-")
                    raise OutOfStep(
                        f"out of memory with --shard; lower --{flag} (it is {size}): {reason}"
                    ) from None
                if size == 1:
                    raise WorkError(f"out of memory even with a {NAMES[name]} of 1: {reason}") from None
            # outside of the handler: the error's frames no longer hold the tensors
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            setattr(self, name, size // 2)
            self.on_change(f"out of memory: continues with a {NAMES[name]} of {size // 2}")

    def values(self) -> dict[str, int]:
        """The sizes by name."""
        return {name: getattr(self, name) for name in NAMES}

    def shrink_to(self, others: list[dict[str, int]]) -> None:
        """Take the smallest of every size over several processes' `values()`."""
        for name in NAMES:
            setattr(self, name, min((sizes[name] for sizes in others if sizes[name]), default=0))
