"""Gradient steps and velocities as CUDA graphs: each launched by one call, on buffers that stay where they are."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.distributed import ProcessGroup
from orwcfm_fast.errors import UserError
from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Finetune
from orwcfm_fast.timing import Phases

SEED = "seed"
TRIES = 3  # timed calls of each way, before the faster one is chosen


def can_record(settings: Finetune, policy: Policy, ranks: ProcessGroup) -> bool:
    """Whether velocities and steps may be recorded (`--graph`).

    Raises:
        UserError: they should be, and cannot.
    """
    if settings.graph == "off":
        return False
    missing = ""
    if policy.device.type != "cuda" or ranks.world > 1:
        missing = "needs an NVIDIA GPU, and no more than one"
    elif policy.pipeline:
        missing = "is not for pipelines"
    if missing and settings.graph == "on":
        raise UserError(f"--graph on: {missing}; use --graph off")
    return not missing


class Choice:
    """Whether calls are replayed from recordings: as told, else as the first calls of either way, timed, show.

    Args:
        name: of what is called, in messages.
        settings: `graph` tells.

    Attributes:
        replays: None while it is open.
        on_choice: called with a line of text when it is made.
    """

    def __init__(self, name: str, settings: Finetune | None = None) -> None:
        self.name = name
        self.replays: bool | None = None if settings and settings.graph == "auto" else True
        self.on_choice: Callable[[str], None] = lambda text: None
        self.key: Any = None  # of the calls that are timed: those of one shape
        self.seconds: dict[bool, list[float]] = {False: [], True: []}

    def settle(self, replays: bool, reason: str) -> None:
        self.replays = replays
        self.on_choice(f"{self.name} are {'' if replays else 'not '}replayed from CUDA graphs: {reason}")

    def take(self, key: Any, call: Callable[[], Tensor], replay: Callable[[], Tensor]) -> Tensor:
        """What the way in force gives; while the choice is open they take turns and are timed."""
        if self.replays is not None:
            return replay() if self.replays else call()
        self.key = key if self.key is None else self.key
        if key != self.key:
            return call()
        way = len(self.seconds[True]) < len(self.seconds[False])
        found, seconds = timed(replay if way else call)
        self.seconds[way].append(seconds)
        if len(self.seconds[True]) == TRIES:
            times = min(self.seconds[False]) / min(self.seconds[True])
            self.settle(times > 1, f"{times:.2g} times as fast")
        return found


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a call gives, and its seconds; waits for the device before and after."""

    def wait() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    began = wait()
    found = call()
    return found, wait() - began


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

    Args:
        choice: whether to.
        phases: a replay's seconds are "policy".
    """

    def __init__(self, choice: Choice, phases: Phases) -> None:
        self.choice, self.phases = choice, phases
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
        if self.choice.replays is not False and key != self.key:
            self.record(key, batch, tensors, body)
        found = self.choice.take(key, lambda: body(batch, seed), lambda: self.run(tensors))
        if self.choice.replays is False:
            self.forget()
        return found

    def record(self, key: Any, batch: Batch, tensors: dict[str, Tensor], body: Callable[..., Tensor]) -> None:
        """A recording that fails while the choice is open decides it."""
        self.forget()
        self.tensors = {name: x.clone() for name, x in tensors.items()}
        fields: dict[str, Any] = {name: x for name, x in self.tensors.items() if name != SEED}
        own = replace(batch, **fields), self.tensors[SEED]
        try:
            self.replay, self.found = record(lambda: body(*own))
        except RuntimeError as error:
            if self.choice.replays is not None:
                raise
            return self.choice.settle(False, first_line(error))
        self.key = key

    def run(self, tensors: dict[str, Tensor]) -> Tensor:
        assert self.replay and self.found is not None
        with self.phases("policy"):
            for name, x in tensors.items():
                self.tensors[name].copy_(x)
            self.replay()
            return self.found.clone()


@dataclass
class Recording:
    """Of one velocity: the tensors that it reads, what runs it, and the tensor it leaves its result in."""

    tensors: tuple[Tensor, ...]
    replay: Callable[[], None]
    found: Tensor

    def run(self, tensors: tuple[Tensor, ...]) -> Tensor:
        for own, x in zip(self.tensors, tensors, strict=True):
            own.copy_(x)
        self.replay()
        return self.found.clone()


class VelocityGraphs:
    """Velocities without gradient, each shape of a policy's input as a recording; a policy's `replay`.

    The first call of a shape runs as it is, which loads or compiles its kernels, and the second one records. Weights
    must be changed in place, as all are here.

    Args:
        choice: whether to.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.recordings: dict[Any, Recording | None] = {}

    def __call__(self, policy: Policy, tensors: tuple[Tensor, ...]) -> Tensor:
        """policy.run(*tensors); what it returns is a copy."""
        key = (policy.network, policy.base_only, *((x.shape, x.dtype) for x in tensors))

        def call() -> Tensor:
            return policy.run(*(x.clone() for x in tensors))

        # one mode for rollouts and anchors, which share a recording, and for what is compiled before it
        with torch.inference_mode(False), torch.no_grad():
            if self.choice.replays is False:
                return call()
            if key not in self.recordings:
                self.recordings[key] = None
                return call()
            self.recordings[key] = recording = self.recordings[key] or self.record(policy, tensors)
            if recording is None:
                return call()
            found = self.choice.take(key, call, lambda: recording.run(tensors))
        if self.choice.replays is False:
            self.recordings.clear()
        return found

    def record(self, policy: Policy, tensors: tuple[Tensor, ...]) -> Recording | None:
        """One that fails while the choice is open decides it.

        Later, where memory runs out, all recordings are given up: what is tried next has another shape.
        """
        own = tuple(x.clone() for x in tensors)
        try:
            return Recording(own, *record(lambda: policy.run(*own)))
        except RuntimeError as error:
            if self.choice.replays is None:
                self.choice.settle(False, first_line(error))
                return None
            self.recordings.clear()
            raise


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
