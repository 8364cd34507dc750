"""The online loop against the plain one, in one run, alternating, one ratio a rung: `orwcfm bench loop`."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.benchmarks.plain_loop import BATCH, EULER_STEPS, PlainLoop, torchcfm_network
from orwcfm_fast.benchmarks.ways import (
    CPU,
    LORA_RANK,
    alternate,
    bench_policy,
    forward_flop,
    matrix_rate,
    paired,
)
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.device import device_name
from orwcfm_fast.method import noise
from orwcfm_fast.method.anchors import blend, velocities
from orwcfm_fast.method.coupling import Batch, couple
from orwcfm_fast.method.graph import GraphChoices, VelocityGraphs
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.networks.inference import InferenceCopy
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Finetune

DEFAULT = Finetune()
REUSE = DEFAULT.steps_per_round * DEFAULT.batch / DEFAULT.rollout  # gradient samples a rollout sample


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder: the ways in which it draws samples and takes steps, and how often it uses a sample."""

    way: str
    rollout: str
    step: str
    reuse: float = REUSE


LADDER = (
    Rung("plain", "plain", "plain", 1.0),
    Rung("+ rollout reuse", "plain", "plain"),
    Rung("+ solver", "solver", "plain"),
    Rung("+ network, fused step", "fp32", "fp32"),
    Rung("the same in bf16", "bf16", "bf16"),
    Rung("LoRA, fp32", "lora", "lora"),
    Rung("bf16, in CUDA graphs", "bf16 graph", "bf16 graph"),
    Rung("bf16, compiled", "bf16 compiled", "bf16 compiled"),
    Rung("one fresh batch a step, fp32", "fp32", "fp32", 1.0),
    Rung("one fresh batch a step, bf16", "bf16", "bf16", 1.0),
)


@dataclass(frozen=True)
class Row:
    """Images a second that are drawn, trained on, and used by the whole loop, which draws one for every `reuse` used.

    The ratios are to the plain loop, medians over runs paired in time. rollout_share: of the loop's time;
    matrix_share: FLOP/s of the rollout, as a share of the highest rate seen at that precision in the same run.
    """

    data: str
    way: str
    rollout: float
    step: float
    loop: float
    rollout_ratio: float
    step_ratio: float
    loop_ratio: float
    rollout_share: float
    matrix_share: float


class LoopBenchmark:
    """All ways of drawing samples and of taking gradient steps on one data set, each a call that can be timed."""

    def __init__(self, data: str, batch: int, euler_share: float, device: torch.device = CPU) -> None:
        self.batch, self.settings = batch, DEFAULT.model_copy(update={"batch": batch, "rollout": batch})
        self.policies = {p: bench_policy(data, p, device) for p in ("fp32", "bf16")}
        first = self.policies["fp32"]
        self.steps = max(2, round(EULER_STEPS * euler_share))
        network = torchcfm_network(first.model, first.network.state_dict()).to(device)
        self.torchcfm = replace(first, network=network)
        self.plain = PlainLoop(
            network, lambda x: x.flatten(1).mean(1), first.shape, 1.0, 0.5, batch, self.steps
        )
        self.learners = {p: self.learner(policy) for p, policy in self.policies.items()}
        adapted = first.trainable_copy()
        from orwcfm_fast.networks.lora import add_lora

        add_lora(adapted.network, Finetune(lora=LORA_RANK))
        self.policies["lora"], self.learners["lora"] = adapted, self.learner(adapted)
        if device.type == "cuda":
            self.learners["bf16 graph"] = self.learner(self.policies["bf16"], graph="on")
            self.learners["bf16 compiled"] = self.learner(self.policies["bf16"].trainable_copy())
        self.references = {way: one.policy.frozen_copy() for way, one in self.learners.items()}
        self.inference = {way: InferenceCopy(one.policy) for way, one in self.learners.items()}
        if device.type == "cuda":
            way = "bf16 compiled"
            for policy in (self.learners[way].policy, self.references[way], self.inference[way].policy):
                policy.compile()
        self.graphs = VelocityGraphs(GraphChoices())
        self.x0 = start_noise(first, batch, 0)
        self.x1 = torch.randn(batch, *first.shape, device=device).clamp(-1, 1)
        self.seed = torch.tensor(0, device=device)

    def learner(self, policy: Policy, **change: str) -> PolicyOptimizer:
        return PolicyOptimizer(policy, self.settings.model_copy(update=change))

    def coupled(self) -> Batch:
        device = self.x1.device
        index = noise.indices(0, self.batch, device)
        return couple(self.x1, torch.ones(self.batch, device=device), 1.0, self.seed, index)

    def anchored(self, way: str) -> Batch:
        """A minibatch with its anchor, at the cost that a round has for it: v_old and v_ref."""
        batch, optimizer = self.coupled(), self.learners[way]
        policies = (self.inference[way].refresh(), self.references[way])
        v_old, v_ref = (velocities(self.replayed(way, one), batch, optimizer.sizes) for one in policies)
        return replace(batch, anchor=blend(v_old, v_ref, torch.ones_like(batch.a), batch.a))

    def replayed(self, way: str, policy: Policy) -> Policy:
        return replace(policy, replay=self.graphs) if way.endswith("graph") else policy

    def step(self, way: str) -> int:
        self.learners[way].step(self.anchored(way), self.seed)
        return self.batch

    def draw(self, way: str) -> int:
        policy = self.torchcfm if way == "solver" else self.replayed(way, self.inference[way].refresh())
        sample(policy, self.x0, self.settings, self.batch)
        return self.batch

    def plain_rollout(self) -> int:
        self.plain.rollout()
        return self.batch

    def plain_step(self) -> int:
        self.plain.gradient_step(self.x1)
        return self.batch

    def rollouts(self) -> dict[str, Callable[[], int]]:
        ways: dict[str, Callable[[], int]] = {"plain": self.plain_rollout}
        for way in ("solver", *self.inference):
            ways[way] = lambda way=way: self.draw(way)  # type: ignore[misc]
        return ways

    def trainings(self) -> dict[str, Callable[[], int]]:
        ways: dict[str, Callable[[], int]] = {"plain": self.plain_step}
        for way in self.learners:
            ways[way] = lambda way=way: self.step(way)  # type: ignore[misc]
        return ways


def measure(data: str, batch: int, repeats: int, euler_share: float, device: torch.device = CPU) -> list[Row]:
    """The ladder on one data set.

    Args:
        euler_share: the plain rollout takes this share of its 99 steps and is scaled up; its steps are equal.
    """
    ready = LoopBenchmark(data, batch, euler_share, device)
    rollout, step = (alternate(ways, repeats, device) for ways in (ready.rollouts(), ready.trainings()))
    rollout["plain"] = [v * ready.steps / EULER_STEPS for v in rollout["plain"]]
    flop = forward_flop(ready.policies["fp32"])
    rates = {t: matrix_rate(t, device) for t in (torch.float32, torch.bfloat16)}
    base_loop = loop_rates(rollout["plain"], step["plain"], 1.0)
    rows = []
    for rung in (rung for rung in LADDER if rung.step in step):
        drawn, trained = rollout[rung.rollout], step[rung.step]
        both = loop_rates(drawn, trained, rung.reuse)
        nfe = EULER_STEPS if rung.rollout == "plain" else ready.settings.nfe
        rate = rates[torch.bfloat16 if rung.rollout.startswith("bf16") else torch.float32]
        rows.append(
            Row(
                data, rung.way, statistics.median(drawn), statistics.median(trained), statistics.median(both),
                paired(drawn, rollout["plain"]), paired(trained, step["plain"]), paired(both, base_loop),
                statistics.median(b / (rung.reuse * a) for a, b in zip(drawn, both, strict=True)),
                statistics.median(drawn) * nfe * flop / rate,
            )
        )  # fmt: skip
    return rows


def loop_rates(drawn: list[float], trained: list[float], reuse: float) -> list[float]:
    """Images a second of a loop that draws one image for every `reuse` that it trains on."""
    return [1 / (1 / (reuse * a) + 1 / b) for a, b in zip(drawn, trained, strict=True)]


def run(
    full: bool = False, watch: Callable[[str], None] | None = None, device: torch.device = CPU
) -> dict[str, Any]:
    """Measure the ladder; the short form takes under two minutes on two cores, the full one an hour.

    Returns:
        machine, versions, date and rows as plain values; with `full` also pretraining and peak memory of the
        CIFAR-10 UNet. Full, it is at the paper's batch, on a GPU at one that fills it.
    """
    from orwcfm_fast.benchmarks import memory, pretraining

    report = watch or (lambda text: None)
    cuda = device.type == "cuda"
    cifar = (512 if cuda else BATCH) if full else (128 if cuda else 2)
    plan = [("digits", BATCH, 3, 0.1), ("cifar10", cifar, 3 if full or cuda else 1, 0.03)]
    rows: list[Row] = []
    for data, batch, repeats, share in plan:
        report(f"{data}, batch {batch}")
        rows += measure(data, batch, repeats, share, device)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": checkpoint.versions(),
        "solver": f"{DEFAULT.solver}, {DEFAULT.nfe} evaluations; plain: euler, {EULER_STEPS}",
        "reuse": REUSE,
        "rows": [asdict(row) for row in rows],
    }
    if full:
        report("pretraining")
        found["pretraining"] = pretraining.measure(cifar, 3, device)
        report("peak memory")
        found["memory"] = memory.measure(cifar if cuda else 16, device)
    return found


def extra_lines(found: dict[str, Any]) -> list[str]:
    """A line for each of the measurements that the full form adds to the ladder."""
    lines = [
        f"pretraining, {row['way']}: {row['images_per_s']:.3g} images/s, {row['ratio']:.2f}×"
        for row in found.get("pretraining", ())
    ]
    lines += [
        f"peak memory, {row['way']}: {row['peak'] / 2**30:.2f} GiB, {row['peak_ratio']:.2f}×; weights, gradients,"
        f" optimiser and copies {row['held'] / 2**30:.2f} GiB, {row['held_ratio']:.2f}×"
        for row in found.get("memory", ())
    ]
    return lines


def plot(found: dict[str, Any], path: str | Path) -> None:
    """Write a PNG: images a second of the loop over the plain loop's, by rung."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    names = [*dict.fromkeys(row["data"] for row in found["rows"])]
    for i, name in enumerate(names):
        rows = [row for row in found["rows"] if row["data"] == name][::-1]
        axes = figure.add_subplot(1, len(names), i + 1)
        bars = axes.barh([row["way"] for row in rows], [row["loop_ratio"] for row in rows])
        axes.bar_label(bars, fmt="%.3g×", padding=2)
        top = max(row["loop_ratio"] for row in rows)
        axes.set(title=name, xlabel="loop, images/s over plain's", xscale="log", xlim=(0.5, 4 * top))
    figure.suptitle(f"{found['device']}, {found['date'][:10]}")
    figure.savefig(path, dpi=120)


COLUMNS = (
    "data",
    "way",
    "drawn",
    "trained on",
    "loop",
    "× drawn",
    "× trained",
    "× loop",
    "drawing",
    "of matrix rate",
)


def cells(row: dict[str, Any]) -> list[str]:
    """Texts of a row, in the order of COLUMNS."""
    texts = [row["data"], row["way"]]
    texts += [f"{row[key]:.3g}" for key in ("rollout", "step", "loop")]
    texts += [f"{row[key]:.2f}" for key in ("rollout_ratio", "step_ratio", "loop_ratio")]
    return texts + [f"{row[key]:.0%}" for key in ("rollout_share", "matrix_share")]
