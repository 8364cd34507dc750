"""What the runs of `benchmarks.methods` say together: reward at equal drift, and a plot."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from orwcfm_fast.reporting.images import grid_image

EQUAL_W2 = {"digits": (1.3, 1.9), "mnist": (5.0, 6.0, 7.0, 8.0, 9.0)}


def plot(found: dict[str, Any], path: Path) -> None:
    """Write a PNG: reward against coupled W2 with the limit line, and reward by round; a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    front, rounds = figure.subplots(1, 2)
    limit = found["limit"]
    front.fill_betweenx(
        limit["reward"], limit["w2_low"], limit["w2"], color="0.85", label="least W2 of any method"
    )
    for colour, method in enumerate(dict.fromkeys(row["method"] for row in found["runs"])):
        own = sorted((row for row in found["runs"] if row["method"] == method), key=lambda row: -row["alpha"])
        start = own[0]["before"]["reward"][0]
        ends = [(row["after"]["w2_coupled"], row["after"]["reward"][0]) for row in own]
        front.plot(*zip((0.0, start), *ends, strict=True), marker="o", color=f"C{colour}", label=method)
        for row, end in zip(own, ends, strict=True):
            front.annotate(
                f"α={row['alpha']:g}", end, xytext=(4, -10), textcoords="offset points", fontsize=8
            )
            drawn = [r["reward_mean"] for r in row["by_round"]]
            rounds.plot(
                [*range(len(drawn) + 1)], [*drawn, row["after"]["reward"][0]], color=f"C{colour}", alpha=0.7
            )
    front.set(xlabel="coupled W2", ylabel="mean reward", title=found["data"])
    rounds.set(xlabel="rounds trained", ylabel="mean reward")
    front.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def pictures(shown: dict[str, Tensor], path: Path) -> None:
    """Write a PNG: samples [N, C, H, W] of each model from the same noise, a block a model under its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.35 * len(shown)), layout="constrained")
    for axes, (name, images) in zip(
        figure.subplots(len(shown), squeeze=False)[:, 0], shown.items(), strict=True
    ):
        axes.imshow(grid_image(images, columns=16), cmap="gray")
        axes.set_title(name, fontsize=9, loc="left")
        axes.axis("off")
    figure.savefig(path, dpi=120)


def reward_at(runs: Sequence[dict[str, Any]], w2: float) -> tuple[float, float] | None:
    """Mean reward at this coupled W2, and its standard error: of held-out samples, or of seeds where that is larger.

    Each seed's front is a straight line from its start through its runs. None where no seed's runs reach so far.
    """
    found, errors = [], []
    for seed in sorted({r["seed"] for r in runs}):
        own = sorted((r["after"]["w2_coupled"], r["after"]["reward"]) for r in runs if r["seed"] == seed)
        start = next(r["before"]["reward"] for r in runs if r["seed"] == seed)
        for (w, low), (w_next, high) in pairwise([(0.0, start), *own]):
            if w <= w2 <= w_next:
                share = (w2 - w) / (w_next - w)
                found.append(low[0] + share * (high[0] - low[0]))
                errors.append((high[2] - high[1]) / 4)
    if not found:
        return None
    held_out = sum(errors) / len(errors) / math.sqrt(len(errors))
    return statistics.mean(found), max(
        held_out, statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0
    )
