"""What the race found, as lines and as a plot; whoever wins stands first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = {
    "soon": ("chosen for reward soon", "s to 0.65", "s to 0.8", "reward after 3 s", "10 s", "30 s", "W2", "confidence"),
    "near": ("chosen for reward near", "reward at W2 1", "1.5", "2", "at diversity 0.97", "0.9", "W2", "confidence"),
}  # fmt: skip
RANKED_BY: dict[str, Callable[[Row], float]] = {
    "soon": lambda row: min(row["seconds_to"]["0.8"] or 1e9, 1e9) - max(row["reward"][0], 0) * 1e-3,
    "near": lambda row: -row["reward_at_w2"]["1.5"][0],
}


def ranked(found: dict[str, Any], goal: str) -> list[Row]:
    """The rows of a goal, the first to win: fewest seconds to 0.8, or the most reward at a coupled W2 of 1.5."""
    return sorted((row for row in found["rows"] if row["goal"] == goal), key=RANKED_BY[goal])


def cells(row: Row) -> list[str]:
    """Texts of a row, in the order of COLUMNS of its goal."""
    if row["goal"] == "soon":
        own = [_seconds(row["seconds_to"][r]) for r in ("0.65", "0.8")]
        own += [_interval(row["reward_after"].get(s)) for s in ("3", "10", "30")]
    else:
        own = [_interval(row["reward_at_w2"][w]) for w in ("1", "1.5", "2")]
        own += [_interval(row["reward_at_diversity"][d]) for d in ("0.97", "0.9")]
    return [row["name"], *own, _interval(row["w2"], 2), _interval(row["confidence"])]


def settings_of(row: Row) -> str:
    """The settings of a row in one line."""
    return f"{row['name']}: " + ", ".join(f"{key} {value:g}" for key, value in row["trial"].items())


def ratio(found: dict[str, Any], reward: str = "0.65") -> float | None:
    """How many times the seconds of the default method the plain loop takes to a reward; None: one is not there."""
    seconds = {row["name"]: row["seconds_to"][reward] for row in found["rows"] if row["goal"] == "soon"}
    ours, plain = seconds.get("orw-centred"), seconds.get("plain")
    return plain / ours if ours and plain else None


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _interval(value: list[float] | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value[0]:.{digits}f}" + (f" ± {value[1]:.{digits}f}" if value[1] else "")


def plot(found: dict[str, Any], path: str | Path) -> None:
    """Write a PNG: reward against seconds, and against coupled W2, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    names = [row["name"] for row in ranked(found, "near")]
    for k, (goal, key, label) in enumerate(
        (("soon", "seconds", "seconds, looks taken out"), ("near", "w2", "coupled W2"))
    ):
        axes = figure.add_subplot(1, 2, k + 1)
        for row in ranked(found, goal):
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
