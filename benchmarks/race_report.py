"""What the race found, as lines and as a plot; whoever wins stands first."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orwcfm_fast.benchmarks.entrants import AFTER, AT_DIVERSITY, AT_W2, FOR_REWARDS, Look, seconds_to

Row = dict[str, Any]
RANKED_BY: dict[str, Callable[[Row], Any]] = {
    "soon": lambda row: (
        [math.inf if s is None else s for s in reversed(row["seconds_to"].values())],
        -row["reward"][0],
    ),
    "near": lambda row: -[*row["reward_at_w2"].values()][1][0],
}


def columns(found: dict[str, Any], goal: str) -> list[str]:
    """Heads of the table of a goal."""
    if goal == "soon":
        own = [*(f"s to {r:g}" for r in FOR_REWARDS), *(f"reward after {s:g} s" for s in AFTER)]
    else:
        own = [f"reward at W2 {w:g}" for w in AT_W2[found["data"]]]
        own += [f"at {d:g} of the diversity" for d in AT_DIVERSITY]
    return [f"chosen for reward {goal}", *own, "W2 at the end", "diversity kept", "confidence"]


def ranked(found: dict[str, Any], goal: str) -> list[Row]:
    """The rows of a goal, the winner first: fewest seconds to the highest reward, or most reward at the same W2."""
    return sorted((row for row in found["rows"] if row["goal"] == goal), key=RANKED_BY[goal])


def cells(row: Row) -> list[str]:
    """Texts of a row, in the order of its goal's columns."""
    if row["goal"] == "soon":
        own = [_seconds_to(row, reward) for reward in FOR_REWARDS]
        own += [_interval(row["reward_after"].get(f"{s:g}")) for s in AFTER]
    else:
        own = [_interval(value) for value in row["reward_at_w2"].values()]
        own += [_interval(row["reward_at_diversity"][f"{d:g}"]) for d in AT_DIVERSITY]
    return [
        row["name"],
        *own,
        _interval(row["w2"], 2),
        _interval(row["diversity"], 2),
        _interval(row["confidence"]),
    ]


def settings_of(row: Row) -> str:
    """The settings of a row in one line, and why runs broke off, where some did."""
    line = f"{row['name']}: " + ", ".join(f"{key} {value:g}" for key, value in row["trial"].items())
    reasons = [reason for one in row["runs"] if (reason := one[-1].get("broke_off"))]
    return line + "".join(f"; broke off: {reason}" for reason in reasons)


def _seconds_to(row: Row, reward: float) -> str:
    """The median of the seeds, and the least and the most."""
    text = _seconds(row["seconds_to"][f"{reward:g}"])
    if len(row["runs"]) == 1:
        return text
    each = (seconds_to([Look(**look) for look in one], reward) for one in row["runs"])
    found = sorted(math.inf if s is None else s for s in each)
    return text if found[0] == math.inf else f"{text} ({_seconds(found[0])} to {_seconds(found[-1])})"


def _seconds(value: float | None) -> str:
    if value in (None, math.inf):
        return "–"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _interval(value: list[float] | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value[0]:.{digits}f}" + (f" ± {value[1]:.{digits}f}" if value[1] else "")


def plot(found: dict[str, Any], path: str | Path) -> None:
    """Write a PNG: reward against seconds, and against coupled W2, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    names = [*dict.fromkeys(row["name"] for row in found["rows"])]
    for k, (goal, key, label) in enumerate(
        (("soon", "seconds", "seconds, looks taken out"), ("near", "w2", "coupled W2"))
    ):
        axes = figure.add_subplot(1, 2, k + 1)
        for row in ranked(found, goal) or ranked(found, "soon"):
            for one in row["runs"]:
                axes.plot(
                    [look[key] for look in one], [look["reward"] for look in one], lw=1,
                    color=f"C{names.index(row['name'])}", label=row["name"] if one is row["runs"][0] else None,
                )  # fmt: skip
        axes.set(xlabel=label, ylabel=f"mean reward, {found['reward']}")
        axes.grid(alpha=0.3)
        if key == "seconds":
            axes.set_xscale("symlog", linthresh=1)
        axes.legend(fontsize=8)
    figure.suptitle(f"{found['data']}, {found['device']}, {found['date'][:10]}")
    figure.savefig(path, dpi=120)
