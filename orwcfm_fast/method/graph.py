"""Gradient steps and velocities as CUDA graphs: each launched by one call, on buffers that stay where they are."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.networks.policy import Policy

SEED = "seed"


def record(body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The body's kernels, kept and not run: what runs them, and the tensor they leave its result in."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # rewards may run in another thread
        found = body()
    return graph.replay, found


class StepGraph:
    """Replays a step; recorded anew where the shapes of its batch change.

    What changes from step to step must be in tensors: the batch's and the seed are copied into the graph's own,
    weights and optimiser state are changed in place, and so must the learning rate be.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Give the recording's memory back; to be called where weights or optimiser state become other tensors."""
        self.key: Any = None
        self.tensors: dict[str, Tensor] = {}
        self.replay: Callable[[], None] | None = None
        self.found: Tensor | None = None

    def __call__(
        self, batch: Batch, seed: Tensor, body: Callable[[Batch, Tensor], Tensor], micro_batch: int
    ) -> Tensor:
        """body(batch, seed); what it returns is a copy."""
        tensors = {name: x for name, x in vars(batch).items() if isinstance(x, Tensor)} | {SEED: seed}
        key = (micro_batch, batch.whole, {name: (x.shape, x.dtype) for name, x in tensors.items()})
        if key != self.key:
            self.forget()
            self.tensors = {name: x.clone() for name, x in tensors.items()}
            fields: dict[str, Any] = {name: x for name, x in self.tensors.items() if name != SEED}
            own = replace(batch, **fields), self.tensors[SEED]
            self.replay, self.found = record(lambda: body(*own))
            self.key = key
        for name, x in tensors.items():
            self.tensors[name].copy_(x)
        assert self.replay and self.found is not None
        self.replay()
        return self.found.clone()


@dataclass
class Recording:
    """Of one velocity: the tensors that it reads, what runs it, and the tensor it leaves its result in."""

    tensors: tuple[Tensor, ...]
    replay: Callable[[], None]
    found: Tensor


class VelocityGraphs:
    """Velocities without gradient, each shape of a policy's input as a recording; a policy's `replay`.

    The first call of a shape runs as it is, which loads or compiles its kernels, and the second one records. Weights
    must be changed in place, as all are here.
    """

    def __init__(self) -> None:
        self.recordings: dict[Any, Recording | None] = {}

    def __call__(self, policy: Policy, tensors: tuple[Tensor, ...]) -> Tensor:
        """policy.run(*tensors); what it returns is a copy."""
        key = (policy.network, policy.base_only, *((x.shape, x.dtype) for x in tensors))
        # one mode for rollouts and anchors, which share a recording, and for what is compiled before it
        with torch.inference_mode(False), torch.no_grad():
            if key not in self.recordings:
                self.recordings[key] = None
                return policy.run(*(x.clone() for x in tensors))
            recording = self.recordings[key] or self.record(policy, tensors)
        self.recordings[key] = recording
        for own, x in zip(recording.tensors, tensors, strict=True):
            own.copy_(x)
        recording.replay()
        return recording.found.clone()

    def record(self, policy: Policy, tensors: tuple[Tensor, ...]) -> Recording:
        """Where memory runs out, all recordings are given up: what is tried next has another shape."""
        own = tuple(x.clone() for x in tensors)
        try:
            return Recording(own, *record(lambda: policy.run(*own)))
        except torch.OutOfMemoryError:
            self.recordings.clear()
            raise
