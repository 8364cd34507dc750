"""The memory plan of a run: what it will take by part and phase, beside the memory of the device."""

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.settings import Finetune
from orwcfm_fast.sharding import blocks

HEADROOM = 0.9  # share of the memory that a plan may use
PHASES = ("step", "rollout", "reward", "probe", "evaluation")


@dataclass(frozen=True)
class Plan:
    """Memory (bytes) and time (seconds) that a run with these settings will take.

    Attributes:
        micro_batch, chunk, reward_batch: the sizes set by the user, halved until they fit; a reward_batch of 0 is
            the whole rollout.
        held: by part, what is allocated throughout the run.
        step, rollout, reward, probe, evaluation: by part, what each phase adds at its peak.
        process: Python, torch and its libraries themselves (CPU only).
        limit: memory of the device. seconds: of a round, by phase.
        encoding: by part, what embedding the prompts takes before anything else is loaded.
        flops: of one sample's velocity. weights, gradients: bytes of the network as it computes, and of the
            gradients of all that is trained.
    """

    device: str
    micro_batch: int
    chunk: int
    held: dict[str, int]
    step: dict[str, int]
    rollout: dict[str, int]
    reward: dict[str, int]
    process: int
    limit: int
    seconds: dict[str, float]
    encoding: dict[str, int] = field(default_factory=dict)
    probe: dict[str, int] = field(default_factory=dict)
    evaluation: dict[str, int] = field(default_factory=dict)
    reward_batch: int = 0
    flops: float = 0.0
    weights: int = 0
    gradients: int = 0

    @property
    def phases(self) -> dict[str, int]:
        """Peak of torch's own allocations in each phase of a round, in evaluation and in embedding prompts."""
        held = sum(self.held.values())
        found = {name: held + sum(getattr(self, name).values()) for name in PHASES}
        return found | ({"encoding": sum(self.encoding.values())} if self.encoding else {})

    @property
    def peak(self) -> int:
        """Peak memory in bytes, including the process itself."""
        return max(self.phases.values()) + self.process

    @property
    def fits(self) -> bool:
        return self.peak <= HEADROOM * self.limit


def held_by_method(s: Finetune, draws: int, velocity: int, trained: int) -> dict[str, int]:
    """Bytes that the method keeps throughout a round, by part.

    Args:
        draws: of this process in a round; velocity: bytes of one.
        trained: bytes of the trained parameters.
    """
    method = METHODS.get(s.method)
    held = {"stored anchors": draws * velocity * method.kept(s.alpha)}
    # the policy's own parameters are set aside while it has the averaged ones
    return held | ({"average of past policies": 2 * trained} if method.averages else {})


@dataclass(frozen=True)
class TrainedMemory:
    """Bytes on one of `ranks` of what follows the weights.

    Attributes:
        trained: bytes of the trained parameters.
        gathered: bytes of the weights that are whole at once under --shard.
    """

    s: Finetune
    ranks: int
    trained: int
    gathered: int

    @classmethod
    def of(cls, s: Finetune, ranks: int, network: nn.Module, precision: torch.dtype) -> "TrainedMemory":
        parameters = [p for p in network.parameters() if p.requires_grad]
        width = precision.itemsize
        sizes = sorted(width * sum(p.numel() for p in block.parameters()) for block in blocks(network))
        outside = width * sum(p.numel() for p in network.parameters()) - sum(sizes)
        return cls(s, ranks, sum(p.nbytes for p in parameters), outside + sum(sizes[-2:]))

    def shard(self, size: int) -> int:
        """Bytes of `size` that this rank holds."""
        return -(-size // self.ranks) if self.s.shard else size

    @property
    def held(self) -> dict[str, int]:
        if self.ranks == 1 or self.s.shard:
            return {}
        return {"buckets of the gradient exchange": self.trained}

    def step(self, top: int, parts: int) -> dict[str, int]:
        """Of a gradient step that allocates `top` bytes at its peak on one process, in so many parts."""
        activations = {"activations": max(top - self.trained, 0)}
        if not self.s.shard:
            return {"gradients": min(self.trained, top)} | activations
        accumulated = self.trained if self.s.lora and parts > 1 else 0
        return {
            "gradients": self.shard(self.trained) + accumulated,
            "gathered weights": self.gathered,
        } | activations


def largest_fitting(size: int, room: int, at: Callable[[int], dict[str, int]]) -> int:
    """The largest of size, size/2, … 1 whose parts, in sum, fit into `room` bytes; 1 where none does."""
    while size > 1 and sum(at(size).values()) > room:
        size = max(1, size // 2)
    return size


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes(device: torch.device) -> int:
    """Bytes that a run can use: free memory of the GPU, or of the machine or container, plus what we hold already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024 + resident_bytes()
    with suppress(OSError, ValueError):  # without a limit the file contains the word "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free
