"""Transport plans of a round's minibatches, solved once each by a thread on the CPU, ahead of whoever needs them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

AHEAD = 2  # plans that are begun before they are needed


class PlannedPairs:
    """For each minibatch of a round, which sample goes with which noise.

    A plan is solved once a round, though the anchors and the step both need it.

    Args:
        solve: the pairs int64 [B] of minibatch k, from tensors on the CPU: a GPU's would wait for its queue.
        count: number of minibatches.
    """

    def __init__(self, solve: Callable[[int], Tensor], count: int) -> None:
        self.solve, self.count = solve, count
        self.found: dict[int, Future[Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plan")

    def __getitem__(self, k: int) -> Tensor:
        """The pairs of minibatch k; those of the next ones are begun."""
        for j in range(k, min(k + AHEAD + 1, self.count)):
            if j not in self.found:
                self.found[j] = self._thread.submit(self.solve, j)
        return self.found[k].result()
