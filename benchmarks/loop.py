"""The online loop against the plain one, in one run, alternating: `orwcfm bench loop`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from orwcfm_fast import checkpoint, noise
from orwcfm_fast.benchmarks.plain_loop import BATCH, EULER_STEPS, PlainLoop, torchcfm_network
from orwcfm_fast.coupling import couple
from orwcfm_fast.policy import Policy, make_policy
from orwcfm_fast.rollout import sample, start_noise
from orwcfm_fast.settings import Finetune
from orwcfm_fast.step import Learner

SIZES = {"digits": ("unet-digits", (1, 8, 8)), "cifar10": ("unet-cifar10", (3, 32, 32))}


@dataclass
class Row:
    """Images a second of one way of running one phase; `ratio` to the plain loop's, paired run by run."""

    data: str
    phase: str
    way: str
    images_per_s: float
    ratio: float


def bench_policy(data: str, precision: str) -> Policy:
    """The preset as initialised, its zero layers randomised so that every product is a real one."""
    model, shape = SIZES[data]
    policy = make_policy(model, data, shape, torch.device("cpu"), precision)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.network.parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return policy


def alternate(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Images a second of each way, in turn, `repeats` times after one warm-up; each call returns its images."""
    for call in ways.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            began = time.perf_counter()
            images = call()
            found[name].append(images / (time.perf_counter() - began))
    return found


def rows(data: str, phase: str, found: dict[str, list[float]]) -> list[Row]:
    plain = next(iter(found.values()))
    return [
        Row(
            data,
            phase,
            way,
            statistics.median(v),
            statistics.median(a / b for a, b in zip(v, plain, strict=True)),
        )
        for way, v in found.items()
    ]


def measure(data: str, batch: int, repeats: int, euler_share: float) -> list[Row]:
    """Rollout, gradient step, and one fresh batch a gradient step.

    Args:
        euler_share: the plain rollout takes this share of its 99 steps and is scaled up; its steps are equal.
    """
    settings = Finetune(batch=batch, rollout=batch)
    ours = {"ours fp32": bench_policy(data, "fp32"), "ours bf16": bench_policy(data, "bf16")}
    first = ours["ours fp32"]
    steps = max(2, round(EULER_STEPS * euler_share))
    network = torchcfm_network(first.model, first.network.state_dict())
    plain = PlainLoop(network, lambda x: x.flatten(1).mean(1), first.shape, 1.0, 0.5, batch, steps)
    learners = {way: Learner(policy, policy.frozen_copy(), settings) for way, policy in ours.items()}
    x1 = torch.randn(batch, *first.shape).clamp(-1, 1)
    seed, ones = torch.tensor(0), torch.ones(batch)
    x0 = start_noise(first, batch, 0)

    def gradient_step(way: str) -> int:
        learners[way].step(couple(x1, ones, 1.0, seed, noise.indices(0, batch, "cpu")), seed)
        return batch

    def draw(way: str) -> int:
        sample(ours[way], x0, settings, batch)
        return batch

    def plain_rollout() -> int:
        plain.rollout()
        return batch

    def plain_step() -> int:
        plain.gradient_step(x1)
        return batch

    rollout = alternate({"plain": plain_rollout} | {way: lambda way=way: draw(way) for way in ours}, repeats)
    rollout["plain"] = [v * steps / EULER_STEPS for v in rollout["plain"]]
    train = alternate(
        {"plain": plain_step} | {way: lambda way=way: gradient_step(way) for way in ours}, repeats
    )
    both = {
        way: [1 / (1 / a + 1 / b) for a, b in zip(rollout[way], train[way], strict=True)] for way in rollout
    }
    return [
        *rows(data, "rollout", rollout),
        *rows(data, "gradient step", train),
        *rows(data, "one fresh batch a step", both),
    ]


def run(full: bool = False, watch: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure; the short form takes about a minute on two cores.

    Returns:
        machine, versions, date and rows as plain values.
    """
    say = watch or (lambda text: None)
    plan = [("digits", BATCH, 3, 0.1), ("cifar10", 16 if full else 4, 3 if full else 1, 0.03)]
    found: list[Row] = []
    for data, batch, repeats, share in plan:
        say(f"{data}, batch {batch}")
        found += measure(data, batch, repeats, share)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"cpu, {torch.get_num_threads()} threads",
        "versions": checkpoint.versions(),
        "solver": f"{Finetune().solver}, {Finetune().nfe} evaluations; plain: euler, {EULER_STEPS}",
        "rows": [asdict(row) for row in found],
    }
