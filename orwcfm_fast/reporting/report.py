"""The report of a finished run: one self-contained page with settings, samples, curves, forecast and tables."""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orwcfm_fast.files import write_text
from orwcfm_fast.reporting.charts import Series, bar_chart, chart
from orwcfm_fast.reporting.parting import parting
from orwcfm_fast.reporting.table import interval, measure_rows

if TYPE_CHECKING:
    from orwcfm_fast.evaluation.evaluate import Measures
    from orwcfm_fast.runs.result import Result

MOST_PICTURES = 25
Record = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, and a label that says what it shows."""

    label: str
    uri: str


@dataclass(frozen=True)
class Table:
    """A table of texts; `folded`: closed until it is clicked on; `text`: with long cells that wrap."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    text: bool = False


@dataclass(frozen=True)
class Page:
    """The content of the template, which escapes all texts.

    Attributes:
        pictures: samples by round or run, one at a time under a slider.
        extremes: most and least rewarded samples, each shown with the picture of the same label.
        before: a picture to show beside them, where they do not show the start themselves.
        classes: a chart of the share of each class, or empty.
    """

    title: str
    lines: Sequence[str]
    tiles: Sequence[tuple[str, str]]
    charts_title: str
    charts: Sequence[str]
    tables: Sequence[Table]
    guard: Sequence[str] = field(default=())
    slider: str = "round"
    before: str = ""
    pictures: Sequence[Picture] = field(default=())
    extremes: Sequence[Picture] = field(default=())
    classes: str = ""


def write_page(path: Path, page: Page) -> Path:
    """Write the page as one file that needs no network and no other file."""
    import jinja2

    loader = jinja2.PackageLoader("orwcfm_fast.reporting")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    write_text(path, environment.get_template("report.html").render(page=page))
    return path


def data_uri(png: Path) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


def run_report(result: "Result", lines: Sequence[str]) -> Path:
    """Write report.html to the run's directory.

    Args:
        lines: what was run, in words, to show under the title.
    """
    run, s, records = result.run, result.settings, result.records
    forecast = json.loads(run.forecast.read_text()) if run.forecast.is_file() else None
    shown = _thin([p for p in sorted(run.samples.glob("round_*.png")) if _round_of(p) <= len(records)])
    guard = [f"round {r['round']}: {text}" for r in records for text in r.get("guard", [])]
    extremes = [run.samples / p.name.replace("round_", "extremes_") for p in shown]
    page = Page(
        title=run.path.name,
        lines=[*lines, f"to repeat it: orwcfm finetune --config {run.config}"],
        tiles=_tiles(result),
        guard=[*guard, *filter(None, [result.parting()])],
        charts_title="Round by round",
        charts=_charts(result, forecast),
        before="" if result.after.of_images or not shown else data_uri(shown[0]),
        classes=_classes(result.before, result.after) if result.after.classes else "",
        pictures=[Picture(f"round {_round_of(p)} of {len(records)}", data_uri(p)) for p in shown],
        extremes=[
            Picture(f"round {_round_of(p)} of {len(records)}", data_uri(p)) for p in extremes if p.is_file()
        ],
        tables=[
            Table(
                "Before and after on held-out noise",
                ["", *(m.name for m in result.measured)],
                measure_rows(result.measured, "+".join(s.reward)),
            ),
            _rounds_table(records),
            settings_table(s.model_dump()),
        ],
    )
    return write_page(run.path / "report.html", page)


def settings_table(values: dict[str, Any]) -> Table:
    """A table of all settings that are not empty."""
    rows = [[k, ", ".join(map(str, v)) if isinstance(v, list) else str(v)] for k, v in values.items()]
    return Table("Settings", ["setting", "value"], [r for r in rows if r[1]], folded=True, text=True)


def _round_of(path: Path) -> int:
    return int(path.stem.partition("_")[2])


def _thin(paths: list[Path]) -> list[Path]:
    """At most MOST_PICTURES paths, evenly spaced, with the first and the last."""
    if len(paths) <= MOST_PICTURES:
        return paths
    step = (len(paths) - 1) / (MOST_PICTURES - 1)
    return [paths[round(k * step)] for k in range(MOST_PICTURES)]


def _tiles(result: "Result") -> list[tuple[str, str]]:
    before, after, summary = result.before, result.after, result.summary()
    tiles = [
        ("reward", f"{before.reward.mean:.3f} → {after.reward.mean:.3f}"),
        ("diversity", f"{before.diversity.mean:.3g} → {after.diversity.mean:.3g}"),
        ("effective sample size", f"{summary['ess']:.0f} of {result.settings.rollout}"),
        ("rollout", f"{summary['images_per_s_rollout']:.0f} samples/s"),
        ("training", f"{summary['images_per_s_train']:.0f} samples/s"),
        ("time", f"{result.seconds:.0f} s"),
    ]
    if after.w2_coupled is not None:
        tiles.insert(1, ("coupled W2 to the reference", interval(after.w2_coupled)))
    if line := result.forecast():
        tiles.append(("forecast from round 1", line.split(",")[0].removeprefix("forecast ")))
    return tiles


def _charts(result: "Result", forecast: dict[str, Any] | None) -> list[str]:
    """Charts over rounds. A rollout comes from the policy before its round; held-out samples give the last point."""
    records, after, n = result.records, result.after, len(result.records)
    starts, done = [r["round"] - 1 for r in records], [r["round"] for r in records]
    expected = forecast["own"].get("by_round", []) if forecast else []

    def get(key: str) -> list[float]:
        return [math.nan if r.get(key) is None else r[key] for r in records]

    half = [1.96 * r["reward_std"] / math.sqrt(result.settings.rollout) for r in records]
    reward = [*get("reward_mean"), after.reward.mean]
    low = [*(m - h for m, h in zip(reward, half, strict=False)), after.reward.low]
    high = [*(m + h for m, h in zip(reward, half, strict=False)), after.reward.high]
    w2 = Series("measured", [0, *done], [0.0, *get("w2_coupled")])
    return [
        chart("Mean reward, 95 %", [Series("measured", [*starts, n], reward, y_low=low, y_high=high),
                                    _expected(expected, "reward", "reward_error"),
                                    Series("held-out prompts", done, get("eval_reward_mean"), "b")],
              "rounds trained", whole_x=True),
        *_against_held_out(result),
        chart("Coupled W2 to the reference", [w2, _expected(expected, "w2_coupled", "w2_error")],
              "rounds trained", whole_x=True),
        chart("Reward against coupled W2", _front(reward, get("w2_coupled"), forecast), "coupled W2"),
        chart("Diversity, mean pairwise distance",
              [Series("measured", [*starts, n], [*get("diversity"), after.diversity.mean]),
               _expected(expected, "diversity")], "rounds trained", whole_x=True),
        *_velocity_norms(records),
        chart(f"Effective sample size of {result.settings.rollout}",
              [Series("", done, get("ess"))], "round", whole_x=True),
        chart("Throughput, samples a second", [Series("rollout", done, get("images_per_s_rollout"), "a"),
                                               Series("training", done, get("images_per_s_train"), "b")],
              "round", whole_x=True),
        chart("Loss", [Series("flow matching", done, get("loss_fm"), "a"),
                       *([Series("W2", done, get("loss_w2"), "b")] if records[0]["loss_w2"] is not None else [])],
              "round", whole_x=True),
    ]  # fmt: skip


def _velocity_norms(records: Sequence[Record]) -> list[str]:
    """The norm of the velocity over the reference's by t, after the first, the middle and the last round."""
    shown = {k: records[k] for k in (0, len(records) // 2, -1)}
    norms = {r["round"]: r["velocity_norm"] for r in shown.values() if r.get("velocity_norm")}
    lines = [
        Series(f"round {number}", [(k + 0.5) / len(ratios) for k in range(len(ratios))],
               [math.nan if ratio is None else ratio for ratio in ratios], style)
        for (number, ratios), style in zip(norms.items(), "abc", strict=False)
    ]  # fmt: skip
    return [chart("Norm of the velocity over the reference's", lines, "t")] if lines else []


def _against_held_out(result: "Result") -> list[str]:
    """The rounds by their reward and their held-out reward, with the round after which the two part."""
    records = result.records
    if records[0].get("holdout_mean") is None:
        return []
    labels = [""] * len(records)
    labels[0], labels[-1] = "round 1", f"round {len(records)}"
    if (at := parting(records, result.settings.rollout)) is not None:
        labels[at] = f"they part: round {records[at]['round']}"
    line = Series(
        "", [r["reward_mean"] for r in records], [r["holdout_mean"] for r in records], labels=labels
    )
    return [chart("Held-out reward against reward", [line], "reward")]


def _classes(before: "Measures", after: "Measures") -> str:
    """A bar chart of the share of each class in the held-out samples before and after training."""
    groups = []
    for m, style in ((before, "before"), (after, "a")):
        parts = ([100 * getattr(v, end) for v in m.classes.values()] for end in ("mean", "low", "high"))
        y, low, high = parts
        groups.append(Series(m.name, range(len(y)), y, style, low, high))
    return bar_chart(f"Share of each class in {after.n} held-out samples, %", groups, [*after.classes])


def _front(reward: list[float], w2: list[float], forecast: dict[str, Any] | None) -> list[Series]:
    """The run's rounds, and the least W2 at which any method has a reward."""
    found = [Series("measured", [0.0, *w2], reward)]
    if limit := forecast and forecast.get("limit"):
        found.append(Series("least W2 of any method", limit["w2_low"], limit["reward"], "forecast"))
    return found


def _expected(rounds: list[dict[str, float]], key: str, error: str = "") -> Series:
    """The forecast of one figure, with intervals of two standard errors each side."""
    x, y = [r["round"] for r in rounds], [r[key] for r in rounds]
    bars: dict[str, Any] = {}
    if error:
        bars["y_low"] = [r[key] - 2 * r[error] for r in rounds]
        bars["y_high"] = [r[key] + 2 * r[error] for r in rounds]
    return Series("forecast", x, y, "forecast", **bars)


def _rounds_table(records: list[Record]) -> Table:
    """The records of metrics.jsonl, rounded; only keys that hold a number in every round."""
    keys = [k for k in records[0] if all(isinstance(r.get(k), int | float) for r in records)]
    rows = [[f"{r[k]:.4g}" for k in keys] for r in records]
    return Table("Every round", keys, rows, folded=True)
