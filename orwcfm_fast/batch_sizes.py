"""How many samples go through a network or a reward at once."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Self, TypeVar

from orwcfm_fast.settings import Finetune

T = TypeVar("T")


@dataclass
class BatchSizes:
    """The sizes in force: one object that the loop, its rewards and its evaluation share.

    Attributes:
        micro_batch: samples at once in a gradient step.
        chunk: samples at once without gradient, in a rollout or an evaluation.
        reward_batch: samples of one reward call; 0: all.
    """

    micro_batch: int
    chunk: int
    reward_batch: int = 0

    @classmethod
    def of(cls, s: Finetune) -> Self:
        """Those of the settings; a micro-batch is at most the batch."""
        return cls(min(s.micro_batch or s.batch, s.batch), min(s.chunk, s.rollout), s.reward_batch)

    def limit(self, name: str, n: int) -> int:
        """The size `name` in force for n samples, at least 1."""
        return max(1, min(getattr(self, name) or n, n))

    def fit(self, name: str, work: Callable[[int], T], n: int) -> T:
        """work(size) with the size `name` in force for n samples; a subclass may try again with a smaller one."""
        return work(self.limit(name, n))

    def shrink_to(self, others: "list[BatchSizes]") -> None:
        """Take the smallest of every size over several processes."""
        for name in asdict(self):
            known = [size for other in others if (size := getattr(other, name))]
            setattr(self, name, min(known, default=0))
