"""A gradient step as one CUDA graph: launched by one call, on buffers that stay where they are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.coupling import Batch


def record(body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The body's kernels, kept and not run: what runs them, and the tensor they leave its result in."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = body()
    return graph.replay, found


class StepGraph:
    """Replays a step; recorded anew where the shapes of its batch change.

    What changes from step to step must be in tensors: the batch's are copied into the graph's own, weights and
    optimiser state are changed in place, and so must the learning rate be.
    """

    def __init__(self) -> None:
        self.key: Any = None

    def __call__(self, batch: Batch, body: Callable[[Batch], Tensor], micro_batch: int) -> Tensor:
        """body(batch); what it returns is a copy."""
        tensors = {name: x for name, x in vars(batch).items() if isinstance(x, Tensor)}
        key = (micro_batch, batch.whole, {name: (x.shape, x.dtype) for name, x in tensors.items()})
        if key != self.key:
            self.tensors: dict[str, Any] = {name: x.clone() for name, x in tensors.items()}
            own = replace(batch, **self.tensors)
            self.replay, self.found = record(lambda: body(own))
            self.key = key
        for name, x in tensors.items():
            self.tensors[name].copy_(x)
        self.replay()
        return self.found.clone()
