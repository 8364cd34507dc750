"""The fused ops against eager and torch.compile: `orwcfm bench kernels`."""

import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.benchmarks.cases import CIFAR, OPS, Case, Inputs, cases
from orwcfm_fast.benchmarks.clock import (
    copying,
    host_seconds_of,
    kernels_alone,
    peak_bytes,
    seconds_in_turn,
    seconds_of,
)
from orwcfm_fast.device import device_name

BY_HAND = "compile, gradient by hand"
IMPLEMENTATIONS = ("eager", "compile", BY_HAND, "ours")


@dataclass
class Row:
    """One implementation of one case. seconds and what follows from it is None where the check failed.

    seconds: of the kernels alone on a GPU, replayed from a CUDA graph, else of a call; host_seconds: of issuing a call
    to a GPU. bytes: the one-pass floor; gb_per_s: floor / seconds; copy_share: of the bandwidth of a copy of as many
    bytes, copy_gb_per_s, timed in turn with it. speedup: over eager, at the same passes.
    peak_bytes: device memory above the inputs (GPU only). error: largest error of the gradient (of x_t
    for interpolate) against float64, over the largest value. step_share: of a CIFAR-10 training step on
    this device, where the size is that step's batch.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    implementation: str
    passes: str
    correct: bool
    bytes: int
    seconds: float | None = None
    host_seconds: float | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    copy_share: float | None = None
    speedup: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    step_share: float | None = None


def _call(case: Case, inputs: Inputs, implementation: str, passes: str) -> Callable[[], Any]:
    op = OPS[case.op]
    if implementation == "ours":
        args = [inputs[name] for name in op.names]
        return lambda: op.ours(*args)  # the gradient comes with the forward pass: v.backward(dv)
    if implementation == BY_HAND:
        by_hand = torch.compile(op.by_hand, fullgraph=True, dynamic=False)
        return lambda: by_hand(**inputs)[1]  # type: ignore[call-arg, index]
    function = (
        torch.compile(op.eager, fullgraph=True, dynamic=False) if implementation == "compile" else op.eager
    )
    if passes == "forward":
        return lambda: function(**inputs)
    v = inputs["v"].detach().requires_grad_()

    def forward_and_backward():
        v.grad = None
        function(**inputs | {"v": v}).sum().backward()
        return v.grad

    return forward_and_backward


def _few(case: Case, inputs: Inputs, samples: int = 8) -> list[Tensor]:
    """The op's arguments for the first samples: samples do not depend on each other."""
    whole = ("seed", "weight", "bias")
    return [inputs[name] if name in whole else inputs[name][:samples] for name in OPS[case.op].names]


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


def check(case: Case, inputs: Inputs) -> bool:
    """Whether every output is as near to float64 as torch at that precision: twice its error and an ulp."""
    op, few = OPS[case.op], _few(case, inputs)
    exact = _tuple(op.reference(*[x.double() if x.is_floating_point() else x for x in few]))
    ours = _tuple(op.ours(*[inputs[name] for name in op.names]))
    for one, torchs, best in zip(ours, _tuple(op.reference(*few)), exact, strict=True):
        slack = max(torch.finfo(one.dtype).eps * float(best.abs().max()), 2e-6 * float(best.abs().mean()))
        error, allowed = (float((x[:8].double() - best).abs().max()) for x in (one, torchs))
        if not error <= 2 * allowed + slack:
            return False
    return True


def _error(case: Case, inputs: Inputs, result) -> float | None:
    if result is None:
        return None
    op, few = OPS[case.op], _few(case, inputs)
    exact = op.result(*_tuple(op.reference(*[x.double() if x.is_floating_point() else x for x in few])))
    return float((result[:8].double() - exact).abs().max() / exact.abs().max())


def _result(case: Case, implementation: str, passes: str, output) -> Tensor | None:
    if implementation == "ours":
        return OPS[case.op].result(*_tuple(output))
    return output if passes == "forward+backward" else None  # eager's x_t has another x0


def training_step_seconds(device: torch.device) -> tuple[int, float]:
    """Batch and seconds of a CIFAR-10 training step without the ops: two UNets, backward, AdamW."""
    from orwcfm_fast.networks.models import build_network

    cuda = device.type == "cuda"
    batch = CIFAR[0] if cuda else 2
    policy, reference = (build_network("unet-cifar10", CIFAR[1:]).to(device).eval() for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    t, x = torch.rand(batch, device=device), torch.randn(batch, *CIFAR[1:], device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            with torch.no_grad():
                reference(t, x)
            v = policy(t, x)
        v.backward(torch.ones_like(v))
        optimizer.step()
        optimizer.zero_grad()

    return batch, seconds_of(step, device, budget=2.0)


def run(
    device: str | torch.device = "cpu",
    short: bool = True,
    compiled: bool = True,
    training_step: bool = True,
    on_case: Callable[[str], None] = lambda name: None,
    chosen: list[Case] | None = None,
) -> dict[str, Any]:
    """Measure every case.

    Args:
        device: where; on a CPU the ops are their torch references.
        short: a few sizes (see cases), else all.
        compiled: whether torch.compile is measured, the slowest part to set up.
        training_step: whether a CIFAR-10 step is timed, for each op's share of it.
        on_case: called with the name of each case before it runs.
        chosen: the cases; by default those of `cases`.

    Returns:
        device, date, versions, step_seconds (of a CIFAR-10 batch of 128) and rows (Row, as
        dicts). A row that failed its correctness check holds no time.
    """
    device = torch.device(device)
    on_case("CIFAR-10 training step")
    batch, step = training_step_seconds(device) if training_step else (1, math.nan)
    step *= CIFAR[0] / batch
    rows: list[Row] = []
    for case in chosen or cases(device, short):
        on_case(str(case))
        rows += _measure(case, device, compiled, step)
    return {
        "device": device_name(device),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": _versions(),
        "step_seconds": None if math.isnan(step) else step,
        "step_measured_at_batch": batch,
        "rows": [asdict(row) for row in rows],
    }


def _versions() -> dict[str, str]:
    from orwcfm_fast import __version__
    from orwcfm_fast.kernels._triton import triton

    versions = {"python": platform.python_version(), "torch": torch.__version__, "orwcfm": __version__}
    return versions | {"triton": getattr(triton, "__version__", "none"), "cuda": torch.version.cuda or "none"}


def _measure(case: Case, device: torch.device, compiled: bool, step: float) -> list[Row]:
    """All implementations of a case, timed in turn with a copy of as many bytes."""
    torch.compiler.reset()  # or its limit on recompiling one function ends the run after a few cases
    inputs, rows, calls = case.inputs(device), [], []
    correct = check(case, inputs)
    for passes in OPS[case.op].passes:
        for implementation in IMPLEMENTATIONS:
            if implementation.startswith("compile") and not compiled:
                continue
            if implementation == BY_HAND and (passes == "forward" or OPS[case.op].by_hand is None):
                continue
            fine = correct or implementation != "ours"
            row = Row(case.op, case.dtype, case.shape, implementation, passes, fine, case.floor_bytes)
            rows.append(row)
            call = _call(case, inputs, implementation, passes)
            try:
                row.error = _error(case, inputs, _result(case, implementation, passes, call()))
                if fine:
                    row.peak_bytes = peak_bytes(call, device)
                    row.host_seconds = host_seconds_of(call, device)
                    calls.append((row, kernels_alone(call, device)))
            except torch.OutOfMemoryError:
                pass
    try:
        copied, *found = seconds_in_turn([copying(case.floor_bytes, device), *[c for _, c in calls]], device)
    except torch.OutOfMemoryError:
        return rows
    eager = {row.passes: t for (row, _), t in zip(calls, found, strict=True) if row.implementation == "eager"}
    for (row, _), seconds in zip(calls, found, strict=True):
        row.seconds, row.gb_per_s = seconds, case.floor_bytes / seconds / 1e9
        row.copy_gb_per_s, row.copy_share = case.floor_bytes / copied / 1e9, copied / seconds
        row.speedup = eager[row.passes] / seconds if row.passes in eager else None
        if case.shape == CIFAR and not math.isnan(step):
            row.step_share = seconds / (step + seconds)
    return rows


COLUMNS = {
    "op": "op",
    "dtype": "dtype",
    "shape": "shape",
    "passes": "passes",
    "implementation": "by",
    "seconds": "time",
    "host_seconds": "host time",
    "gb_per_s": "GB/s",
    "copy_gb_per_s": "copy GB/s",
    "copy_share": "of copy",
    "speedup": "speed-up",
    "peak_bytes": "peak",
    "error": "error",
    "step_share": "of a step",
}


def cells(row: dict[str, Any]) -> list[str]:
    """A row's texts, in the order of COLUMNS; '-' where there is no figure."""
    formats: dict[str, Callable[[Any], str]] = {
        "shape": lambda shape: "×".join(map(str, shape)),
        "seconds": lambda s: f"{s * 1e3:.3g} ms",
        "host_seconds": lambda s: f"{s * 1e6:.3g} µs",
        "gb_per_s": lambda x: f"{x:.4g}",
        "copy_gb_per_s": lambda x: f"{x:.4g}",
        "copy_share": lambda x: f"{x:.0%}",
        "speedup": lambda x: f"{x:.2f}×",
        "peak_bytes": lambda x: f"{x / 2**20:.4g} MiB",
        "error": lambda x: f"{x:.1e}",
        "step_share": lambda x: f"{100 * x:.2g}%",
    }
    if not row["correct"]:
        row = row | {"seconds": None}
    texts = [formats.get(name, str)(row[name]) if row[name] is not None else "-" for name in COLUMNS]
    return texts if row["correct"] else [*texts[:5], "wrong result", *texts[6:]]


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Write a PNG: effective bandwidth against size, a panel for each op and dtype."""
    from matplotlib.figure import Figure

    panels = sorted({(row["op"], row["dtype"], row["passes"]) for row in result["rows"]})
    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for implementation in IMPLEMENTATIONS:
            points = sorted(
                (row["bytes"] / 2**20, row["gb_per_s"])
                for row in result["rows"]
                if (row["op"], row["dtype"], row["passes"]) == panel
                and row["implementation"] == implementation
                and row["seconds"] is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=implementation)
        copies = {
            row["bytes"] / 2**20: row["copy_gb_per_s"]
            for row in result["rows"]
            if (row["op"], row["dtype"], row["passes"]) == panel and row["copy_gb_per_s"] is not None
        }
        if copies:
            axes.plot(*zip(*sorted(copies.items()), strict=True), color="gray", linestyle="--", label="copy")
        axes.set(xscale="log", title=", ".join(panel), xlabel="one-pass MiB", ylabel="effective GB/s")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.suptitle(f"{result['device']}, {result['date']}")
    figure.savefig(path, dpi=120)
