"""Memory and time of a run before it starts: small probes of its own step and rollout, carried to full size.

A probe records every allocation of torch in order. The same work at another batch size allocates in the same
order, each time an amount affine in the batch; so two probes give the whole course at any size, and its peak.
"""

import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from orwcfm_fast import noise
from orwcfm_fast.coupling import couple
from orwcfm_fast.data import source
from orwcfm_fast.device import resolve_device
from orwcfm_fast.errors import UserError
from orwcfm_fast.guarding.memory import out_of_memory
from orwcfm_fast.guarding.steer import probe_size
from orwcfm_fast.networks.lora import add_lora
from orwcfm_fast.networks.policy import Policy, make_policy
from orwcfm_fast.plan_looks import Looks
from orwcfm_fast.ranks import bucket_bytes
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.rollout import Reward, draw, start_noise
from orwcfm_fast.runs.load import DEFAULT, FOREIGN_DATA, Loader
from orwcfm_fast.samplers import times as solver_times
from orwcfm_fast.settings import Finetune
from orwcfm_fast.step import Learner

HEADROOM = 0.9  # of the memory there is
PHASES = ("step", "rollout", "reward", "probe", "evaluation")
PROBE_SECONDS = 10.0  # for each thing probed


@dataclass(frozen=True)
class Course:
    """What one piece of work allocates and how long it takes, by its size.

    Args:
        sizes: two sizes that were tried; changes: bytes of each allocation (+) and release (−) in order;
            seconds: of each.
    """

    sizes: tuple[int, int]
    changes: tuple[list[int], list[int]]
    seconds: tuple[float, float]

    def peak(self, size: int) -> int:
        """Most bytes at once, above those there before."""
        (a, b), (first, second) = self.sizes, self.changes
        share = (size - a) / (b - a)
        if len(first) == len(second):
            return int(
                max(accumulate((x + (y - x) * share for x, y in zip(first, second, strict=True)), initial=0))
            )
        low, high = (max(accumulate(changes, initial=0)) for changes in (first, second))
        return int(low + (high - low) * share)

    def time(self, size: int) -> float:
        """Seconds, on the line through both sizes that were tried."""
        (a, b), (first, second) = self.sizes, self.seconds
        slope = max(second - first, 0.0) / (b - a)
        return max(second + slope * (size - b), 0.0)


@dataclass(frozen=True)
class Plan:
    """What a run with these settings will take; bytes and seconds.

    Attributes:
        micro_batch, chunk: the largest halves of what was asked for that fit.
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


def allocations(work: Callable[[], object], device: torch.device) -> list[int]:
    """Bytes of every allocation (+) and release (−) that torch makes on the device during `work`, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its own lines say nothing of a plan
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        work()
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    assert profile.profiler and profile.profiler.kineto_results
    events = [
        e
        for e in profile.profiler.kineto_results.events()
        if e.name() == "[memory]" and e.device_type() == wanted
    ]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def probe(work: Callable[[int], object], want: int, device: torch.device) -> Course:
    """Try `work` at growing sizes, at most half of `want` (or 2), while time and memory allow.

    Raises:
        RuntimeError: out of memory at the least sizes.
    """
    tried: list[tuple[int, list[int], float]] = []
    size, began = 1, time.perf_counter()
    while size <= max(2, want // 2) and (len(tried) < 2 or time.perf_counter() - began < PROBE_SECONDS):
        try:
            work(size)  # first use of a size chooses kernels
            seconds = min(_timed(work, size, device) for _ in range(2))
            tried.append((size, allocations(lambda size=size: work(size), device), seconds))  # type: ignore[misc]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(tried) < 2:
                raise
            break
        half = max(2, want // 2)
        size = min(4 * size, half) if size < half else size + 1
    (a, first, fast), (b, second, slow) = tried[-2:]
    return Course((a, b), (first, second), (fast, slow))


def _timed(work: Callable[[int], object], size: int, device: torch.device) -> float:
    began = time.perf_counter()
    work(size)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def plan_run(s: Finetune, ranks: int = 1) -> Plan:
    """Plan `orwcfm finetune` with these settings; a network preset stands in for its weights.

    Raises:
        UserError: no such model, data or reward.
    """
    device = resolve_device(s.device)
    solver_times(s.nfe, s.solver, s.grid)
    if s.checkpoint:
        policy = Loader(device, s.precision, s.model, s.data).load(s.checkpoint).policy
        if policy.pipeline:
            raise UserError(f"--plan: of a pipeline, name it alone: --model {policy.model}")
    else:
        model = s.model or DEFAULT
        data = s.data or FOREIGN_DATA.get(model, "")
        if not data:
            raise UserError(f"model '{model}': say for which data with --data (orwcfm list data)")
        policy = make_policy(model, data, source(data)[0].shape or (3, 32, 32), device, s.precision)
    reward = make_reward(s.reward or [source(policy.data)[0].reward], s)
    return make_plan(policy, reward, s, ranks=ranks)


def make_plan(policy: Policy, reward: Reward, s: Finetune, limit: int | None = None, ranks: int = 1) -> Plan:
    """Plan a run of `policy`, whose weights are trained on noise on the way: give one that is not needed after.

    Args:
        limit: bytes of memory there are; what the device says where None.
        ranks: of which this is one.
    """
    batch, rollout = (-(-n // ranks) for n in (s.batch, s.rollout))
    device = policy.device
    limit = available(device) if limit is None else limit
    if s.lora:
        add_lora(policy.network, s.lora, seed=s.seed)
    reference = policy.frozen_copy()
    learner = Learner(policy, reference, s)
    learner.graph = None  # a replay allocates nothing: what it holds shows in the step that it records
    seed = noise.seed_on(s.seed, device)

    def step(size: int, parts: int = 1) -> None:
        index = noise.indices(0, size * parts, device)
        x1 = start_noise(policy, size * parts, s.seed)
        batch = couple(x1, torch.ones(len(x1), device=device), s.alpha, seed, index, s.coupling)
        learner.micro_batch = size
        learner.step(batch, seed)

    least = 2 if s.coupling == "ot" else 1
    step(least)  # the optimiser's state comes into being
    reward(policy.decode(draw(policy, 2, 0, s.seed, s, 2).x1))
    weights = sum(x.numel() * x.element_size() for x in policy.network.state_dict().values())
    anchor = 0 if reference.network is policy.network else weights  # under adapters they share one base
    moments = sum(
        x.numel() * x.element_size()
        for v in learner.optimizer.state.values()
        for x in v.values()
        if isinstance(x, Tensor)
    )
    # before the probes: recording takes memory of its own
    process = 0 if device.type == "cuda" else max(0, resident() - weights - anchor - moments)
    one = probe(lambda size: step(max(size, least)), batch, device)
    several = probe(lambda size: step(size, 2), batch // 2, device) if batch > 1 else one
    drawn = probe(lambda size: draw(policy, size, 0, s.seed, s, size), min(s.chunk, rollout), device)
    noised = probe(lambda size: start_noise(policy, size, s.seed), rollout, device)
    samples = policy.decode(start_noise(policy, max(2, rollout // 2), s.seed))
    scored = probe(lambda size: reward(samples[:size]), rollout, device)

    one_sample = 4 * start_noise(policy, 1, s.seed).numel()
    held = {
        "weights": weights,
        "reference": anchor,
        "optimizer": moments,
        "rollout kept": s.rollout * one_sample,
    }
    gradients = sum(p.numel() * p.element_size() for p in learner.parameters)
    exchange = bucket_bytes(gradients) if ranks > 1 else 0  # when the activations are gone

    def step_at(size: int) -> dict[str, int]:
        top = one.peak(size) if size >= batch else several.peak(size)
        own = {"gradients": min(gradients, top), "activations": max(top - gradients, exchange)}
        return own | kept_draws(s, batch, one_sample)

    def rollout_at(chunk: int) -> dict[str, int]:
        others = 2 * (rollout - chunk) * one_sample
        return {"sampling": max(drawn.peak(chunk) + others, noised.peak(rollout))}

    looks = Looks(
        s, ranks, one_sample, one_sample, one_sample, drawn.peak, lambda size: 0, False, device.type == "cpu"
    )
    held["probe kept"] = looks.probe_kept
    room = int(HEADROOM * limit) - process - sum(held.values())
    micro_batch = fitting(min(s.micro_batch or batch, batch), room, step_at)
    stepping = step_at(micro_batch)
    if s.graph:  # never given back
        held["step's graph"] = sum(stepping.values())
        room, stepping = room - held["step's graph"], dict.fromkeys(stepping, 0)
    chunk = fitting(min(s.chunk, rollout), room, rollout_at)
    per_step = (
        one.time(batch) if micro_batch == batch else several.time(micro_batch) * batch / (2 * micro_batch)
    )
    per_sample, probed = drawn.time(chunk) / chunk, probe_size(s)
    seconds = {
        "rollout": per_sample * rollout,
        "reward": scored.time(rollout),
        "steps": per_step * s.steps_per_round,
        "probe": 2 * drawn.time(min(probed, chunk)) * max(1.0, probed / chunk),
    }
    return Plan(
        str(device), micro_batch, chunk, held, stepping, rollout_at(chunk),
        {"scoring": scored.peak(rollout) + rollout * one_sample}, process, limit, seconds,
        probe=looks.probe(chunk), evaluation=looks.evaluation(chunk),
    )  # fmt: skip


def fitting(size: int, room: int, at: Callable[[int], dict[str, int]]) -> int:
    """The largest of size, size/2, … 1 that fits; 1 where none does."""
    while size > 1 and sum(at(size).values()) > room:
        size = max(1, size // 2)
    return size


def kept_draws(s: Finetune, batch: int, one_sample: int) -> dict[str, int]:
    """Bytes of the minibatches that later passes take again; `batch`: a rank's part, views of the whole's tensors."""
    if s.reference_passes == 1:
        return {}
    numbers = 20  # t, w and a, and the draw's index
    return {"draws kept": s.draws * (s.batch * (2 * one_sample + numbers) + batch * one_sample)}


def resident() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available(device: torch.device) -> int:
    """Bytes that a run can have there: the GPU's free ones, or the machine's (or container's) with ours."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024 + resident()
    with suppress(OSError, ValueError):  # no limit is the word "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free
