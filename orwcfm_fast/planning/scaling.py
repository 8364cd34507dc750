"""How long a round takes on many ranks, on paper: what is computed, what is exchanged, where more stop to help.

A velocity is counted in floating-point operations, an exchange in bytes. Both are divided by rates that the user may
set; nothing here is measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Finetune

NODE_GBIT = 3600.0  # between the GPUs of a node of H100s: NVLink, 450 GB/s in each direction
TFLOPS = 400.0  # two fifths of an H100's matrix rate in bf16
LATENCY = 20e-6  # seconds of each hop of an exchange
BUCKET = 25 << 20  # bytes of DDP's buckets: the last one has no backward pass left to hide behind
WORTH = 0.5  # of twice the ranks' gain: below it doubling the ranks is called useless


@dataclass(frozen=True)
class Cluster:
    """ranks in all; gpus_per_node; Gbit/s of each GPU's link to other nodes; TFLOP/s that a GPU reaches."""

    ranks: int
    gpus_per_node: int = 8
    link_gbit: float = 400.0
    tflops: float = TFLOPS

    def gather_seconds(self, size: float) -> float:
        """Every rank receives `size` bytes of which each holds an equal part; a reduce-scatter takes as long.

        Over the links first, a part of the node's for each of its GPUs, then within the node.
        """
        here = min(self.ranks, self.gpus_per_node)
        nodes = self.ranks / here
        within = size * (1 - 1 / here) / (NODE_GBIT * 1e9 / 8)
        across = size / here * (1 - 1 / nodes) / (self.link_gbit * 1e9 / 8)
        return within + across + LATENCY * math.log2(self.ranks)

    def sum_seconds(self, size: float) -> float:
        """All-reduce of `size` bytes: a reduce-scatter and a gather."""
        return 2 * self.gather_seconds(size)


@dataclass(frozen=True)
class RoundWork:
    """What a round computes and exchanges, in all.

    Attributes:
        forward, backward: FLOP of a sample's velocity, and of its backward pass with what it computes again.
        weights, gradients: bytes of the network as it computes, and of the gradients of what is trained.
        rollout, batch, steps, nfe: as the settings have them. chunk, micro_batch: samples at once on a rank.
        anchors: velocities of each draw before the first step.
        reward_seconds: of one sample, on a reward server of its own.
        sharded: weights, gradients and optimiser are spread over the ranks. accumulates: gradients are then summed
            once a step, not after every micro-batch.
    """

    forward: float
    backward: float
    weights: float
    gradients: float
    rollout: int
    batch: int
    steps: int
    nfe: int
    chunk: int
    micro_batch: int
    anchors: int
    reward_seconds: float = 0.0
    sharded: bool = False
    accumulates: bool = False

    @classmethod
    def of(
        cls, s: Finetune, forward: float, weights: float, gradients: float, reward_seconds: float
    ) -> "RoundWork":
        """Of a run with these settings. With adapters nothing is spent on the gradient of frozen weights."""
        method = METHODS.get(s.method)
        backward = forward * ((1 if s.lora else 2) + bool(s.gradient_checkpointing))
        anchors = method.old + method.has_reference(s.alpha)
        return cls(
            forward, backward, weights, gradients, s.rollout, s.batch, s.steps_per_round, s.nfe, s.chunk,
            s.micro_batch or s.batch, anchors, reward_seconds, s.shard, s.lora > 0,
        )  # fmt: skip


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a round by phase on so many ranks; bytes that each receives; reward servers that keep up.

    `steps` is the computation, `exchange` what is waited for besides.
    """

    ranks: int
    rollout: float
    anchors: float
    steps: float
    exchange: float
    bytes: float
    reward_servers: int

    @property
    def total(self) -> float:
        return self.rollout + self.anchors + self.steps + self.exchange


def round_time(work: RoundWork, cluster: Cluster) -> RoundTime:
    """The round on this cluster. Gathers and sums go on beside computation, except for a step's last bucket."""
    rate, n = cluster.tflops * 1e12, cluster.ranks
    many = n > 1
    rows, draws = math.ceil(work.batch / n), math.ceil(work.rollout / n)
    gather = cluster.gather_seconds(work.weights) if many and work.sharded else 0.0

    def velocities(samples: int, at_once: int) -> float:
        calls = math.ceil(samples / at_once)
        return max(samples * work.forward / rate, calls * gather)

    parts = math.ceil(rows / work.micro_batch)
    forward, backward = rows * work.forward / rate, rows * work.backward / rate
    computed = taken = forward + backward
    received = 0.0
    if many and work.sharded:
        sums = 1 if work.accumulates else parts
        reduced = cluster.gather_seconds(work.gradients)
        taken = max(forward, parts * gather) + max(backward, parts * gather + sums * reduced)
        calls = math.ceil(draws / work.chunk) * work.nfe + work.steps * parts * (work.anchors + 2)
        received = (calls * work.weights + work.steps * sums * work.gradients) * (1 - 1 / n)
    elif many:
        last = cluster.sum_seconds(min(BUCKET, work.gradients))
        beside = cluster.sum_seconds(work.gradients) - last
        taken = forward + backward * (1 - 1 / parts) + max(backward / parts, beside) + last
        received = 2 * work.steps * work.gradients * (1 - 1 / n)
    rollout = work.nfe * velocities(draws, work.chunk)
    return RoundTime(
        n,
        rollout,
        work.steps * work.anchors * velocities(rows, work.micro_batch),
        work.steps * computed,
        work.steps * (taken - computed),
        received,
        math.ceil(work.rollout * work.reward_seconds / rollout) if rollout else 0,
    )


def ladder(work: RoundWork, cluster: Cluster) -> list[RoundTime]:
    """The round on 1, 2, 4, … and on all ranks of the cluster."""
    sizes = [2**k for k in range(cluster.ranks.bit_length()) if 2**k < cluster.ranks] + [cluster.ranks]
    return [round_time(work, replace(cluster, ranks=n)) for n in sizes]


def stops_at(times: Sequence[RoundTime]) -> tuple[RoundTime, RoundTime] | None:
    """The first step of the ladder that gains less than half of what more ranks cost; None where each pays."""
    for here, there in pairwise(times):
        if here.total / there.total < 1 + WORTH * (there.ranks / here.ranks - 1):
            return here, there
    return None


def why_it_stops(work: RoundWork, there: RoundTime) -> str:
    """In words: what does not fall any more where the round is no longer worth its ranks."""
    if there.exchange > there.steps:
        return "a step would wait longer for its exchange than it computes"
    if work.batch < there.ranks:
        return f"a minibatch of {work.batch} has no sample for each; a larger --batch has"
    return "the shares of rollout and minibatch are too uneven"


def velocity_flops(policy: Policy) -> float:
    """FLOP of one sample's velocity (matrix products, convolutions, attention), both passes of guidance included."""
    condition = None if policy.conditions is None else torch.zeros(1, dtype=torch.int64)
    # by products of matrices: the counter knows no flash attention of a CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        x = torch.zeros(1, *policy.shape, device=policy.device)
        policy.velocity(torch.zeros(1, device=policy.device), x, condition)
    return float(counted.get_total_flops())
