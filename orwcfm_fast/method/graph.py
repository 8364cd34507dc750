"""Gradient steps and velocities as CUDA graphs: each launched by one call, on buffers that stay where they are."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.device import out_of_memory
from orwcfm_fast.distributed import ProcessGroup
from orwcfm_fast.errors import UserError
from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Finetune
from orwcfm_fast.timing import Phases

SEED = "seed"
TRIES = 3  # timed calls of each way, before the faster one is chosen
MARGIN = 1.05  # a recording keeps memory


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


class GraphChoices:
    """Which calls are replayed from recordings, by label: what is called and its number of samples.

    Calls of a label are timed as they are, then, once recorded, as replays, which stay where they are `MARGIN` times as
    fast. The two follow each other, so that a recording never lies in memory beside what the call itself needs.

    Args:
        told: all are replayed, and nothing is timed.

    Attributes:
        chosen: whether the calls of a label are replayed, once it is known.
        on_choice: called with a line of text for each choice.
    """

    def __init__(self, told: bool = True) -> None:
        self.told = told
        self.chosen: dict[str, bool] = {}
        self.seconds: defaultdict[str, dict[bool, list[float]]] = defaultdict(lambda: {False: [], True: []})
        self.on_choice: Callable[[str], None] = lambda text: None

    def choose(self, label: str, replays: bool, reason: str) -> None:
        self.chosen[label] = replays
        self.on_choice(f"{label} are {'' if replays else 'not '}replayed from CUDA graphs: {reason}")

    def refused(self, label: str) -> bool:
        """Whether the calls of this label are not replayed, now and later."""
        return not self.told and self.chosen.get(label) is False

    def records(self, label: str) -> bool:
        """Whether a recording is wanted now."""
        return self.told or self.chosen.get(label, len(self.seconds[label][False]) >= TRIES)

    def take(self, label: str, replayed: bool, way: Callable[[], Tensor]) -> Tensor:
        """What one of the two ways gives; timed, while it is open which one stays."""
        if self.told or label in self.chosen:
            return way()
        found, seconds = timed(way)
        times = self.seconds[label]
        times[replayed].append(seconds)
        if len(times[True]) >= TRIES:
            faster = min(times[False]) / min(times[True])
            self.choose(label, faster > MARGIN, f"{faster:.2f} times as fast")
        return found

    def failed(self, label: str, error: Exception) -> None:
        """A recording could not be made; where memory ran out, these calls are not replayed.

        Raises:
            Exception: the same, for other reasons, and where all calls should be replayed.
        """
        if self.told or not out_of_memory(error):
            raise error
        self.choose(label, False, str(error).split("\n")[0] or type(error).__name__)


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
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    failed: list[Exception] = []
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # rewards may run in another thread
            try:
                found = body()
            except Exception as error:
                failed.append(error)
                raise
    except Exception as error:  # the end of a broken recording fails too, and leaves its own stream current
        raise (failed or [error])[0] from None
    finally:
        torch.cuda.set_stream(stream)
    return graph.replay, found


class StepGraph:
    """Replays a step; recorded anew where the shapes of its batch change.

    What changes from step to step must be in tensors: the batch's and the seed are copied into the graph's own,
    weights and optimiser state are changed in place, and so must the learning rate be.

    Args:
        choices: whether to replay.
        phases: a replay's seconds are "policy".
    """

    def __init__(self, choices: GraphChoices, phases: Phases) -> None:
        self.choices, self.phases = choices, phases
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
        label = f"steps of {len(batch.w)} in parts of {micro_batch}"
        tensors = {name: x for name, x in vars(batch).items() if isinstance(x, Tensor)} | {SEED: seed}
        key = (label, batch.whole, {name: (x.shape, x.dtype) for name, x in tensors.items()})
        if key != self.key:
            self.forget()
            if self.choices.records(label):
                self.record(label, batch, tensors, body)
                self.key = key if self.replay else None
        if not self.replay:
            return self.choices.take(label, False, lambda: body(batch, seed))
        found = self.choices.take(label, True, lambda: self.run(tensors))
        if self.choices.refused(label):
            self.forget()
        return found

    def record(
        self, label: str, batch: Batch, tensors: dict[str, Tensor], body: Callable[..., Tensor]
    ) -> None:
        self.tensors = {name: x.clone() for name, x in tensors.items()}
        fields: dict[str, Any] = {name: x for name, x in self.tensors.items() if name != SEED}
        own = replace(batch, **fields), self.tensors[SEED]
        try:
            self.replay, self.found = record(lambda: body(*own))
        except Exception as error:
            self.forget()
            self.choices.failed(label, error)

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

    The first call of a shape runs as it is, which loads or compiles its kernels. Weights must be changed in place, as
    all are here.

    Args:
        choices: whether to replay.
    """

    def __init__(self, choices: GraphChoices) -> None:
        self.choices = choices
        self.recordings: dict[Any, Recording | None] = {}

    def __call__(self, policy: Policy, tensors: tuple[Tensor, ...]) -> Tensor:
        """policy.run(*tensors); what it returns is a copy."""
        label = f"velocities of {len(tensors[0])}"
        if self.choices.refused(label):
            return policy.run(*tensors)
        key = (label, policy.network, policy.base_only, *((x.shape, x.dtype) for x in tensors))

        def call() -> Tensor:
            return policy.run(*(x.clone() for x in tensors))

        # one mode for rollouts and anchors, which share a recording, and for what is compiled before it
        with torch.inference_mode(False), torch.no_grad():
            if key not in self.recordings:
                self.recordings[key] = None
                return call()
            if not self.recordings[key] and self.choices.records(label):
                self.recordings[key] = self.record(label, policy, tensors)
            if not (recording := self.recordings.get(key)):
                return self.choices.take(label, False, call)
            found = self.choices.take(label, True, lambda: recording.run(tensors))
        if self.choices.refused(label):
            self.forget(label)
        return found

    def forget(self, label: str) -> None:
        """Give the memory of its recordings back."""
        self.recordings = {key: kept for key, kept in self.recordings.items() if key[0] != label}

    def record(self, label: str, policy: Policy, tensors: tuple[Tensor, ...]) -> Recording | None:
        """None where it failed and is not needed; else all recordings are given up: what is tried next is smaller."""
        own = tuple(x.clone() for x in tensors)
        try:
            return Recording(own, *record(lambda: policy.run(*own)))
        except Exception as error:
            self.forget(label)
            if self.choices.told:
                self.recordings.clear()
            self.choices.failed(label, error)
            return None
