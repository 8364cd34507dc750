"""A plan: what a run will take, by part and phase, beside the memory there is."""

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

HEADROOM = 0.9  # of the memory there is
PHASES = ("step", "rollout", "reward", "probe", "evaluation")


@dataclass(frozen=True)
class Plan:
    """What a run with these settings will take; bytes and seconds.

    Attributes:
        micro_batch, chunk, reward_batch: the largest halves of what was asked for that fit; a reward_batch of 0 is
            the whole rollout.
        held: by part, what is there all the time; step, rollout, reward, probe, evaluation: by part, what each
            adds at its peak.
        process: Python, torch and its libraries themselves (CPU only).
        limit: memory there is; seconds: of a round, by phase.
        encoding: by part, of prompts, before anything else is there.
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

    @property
    def phases(self) -> dict[str, int]:
        """Peak of torch's own allocations in each phase of a round, after the last, and before the first."""
        held = sum(self.held.values())
        found = {name: held + sum(getattr(self, name).values()) for name in PHASES}
        return found | ({"encoding": sum(self.encoding.values())} if self.encoding else {})

    @property
    def peak(self) -> int:
        """Most memory at once, the process itself included."""
        return max(self.phases.values()) + self.process

    @property
    def fits(self) -> bool:
        return self.peak <= HEADROOM * self.limit


def largest_fitting(size: int, room: int, at: Callable[[int], dict[str, int]]) -> int:
    """The largest of size, size/2, … 1 that fits; 1 where none does."""
    while size > 1 and sum(at(size).values()) > room:
        size = max(1, size // 2)
    return size


def resident_bytes() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes(device: torch.device) -> int:
    """Bytes that a run can have there: the GPU's free ones, or the machine's (or container's) with ours."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024 + resident_bytes()
    with suppress(OSError, ValueError):  # no limit is the word "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free
