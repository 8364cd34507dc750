"""The report of a sweep: reward against W2 and against diversity, with intervals, beside the forecast."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orwcfm_fast.evaluation.evaluate import Measures
from orwcfm_fast.evaluation.intervals import Interval
from orwcfm_fast.files import write_text
from orwcfm_fast.reporting.charts import Series, chart
from orwcfm_fast.reporting.report import Page, Picture, Table, data_uri, settings_table, write_page
from orwcfm_fast.reporting.table import interval, measure_rows
from orwcfm_fast.settings import Finetune, Sweep, build
from orwcfm_fast.theory.forecast import Forecast
from orwcfm_fast.theory.limit import LimitLine

STYLES = "abcde"
MEASURED = ("reward", "w2_coupled", "diversity")
FORECAST = ("reward", "reward_error", "w2_coupled", "w2_error", "diversity", "within_reach")


@dataclass(frozen=True)
class Outcome:
    """A finished run of a sweep: its settings, its measures before and after, and the forecast made for it."""

    path: Path
    settings: Finetune
    before: Measures
    after: Measures
    seconds: float
    forecast: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path, forecast: dict[str, Any] | None) -> "Outcome":
        """Read the run's summary.json."""
        found = json.loads((path / "summary.json").read_text())
        before, after = (Measures.from_dict(found[key]) for key in ("before", "after"))
        return cls(path, build(Finetune, found["settings"]), before, after, found["seconds"], forecast)

    def figure(self, key: str) -> Interval:
        """One of MEASURED, of the model after training."""
        return getattr(self.after, key)

    def expected(self, key: str) -> float:
        """One of FORECAST; NaN where there is no forecast, or where the forecast is not valid."""
        known = self.forecast and self.forecast["within_reach"]
        return float(self.forecast[key]) if self.forecast and known else math.nan


def plain_forecast(f: Forecast) -> dict[str, Any]:
    """The last round of a forecast as a dict that JSON can hold."""
    values = {key: getattr(f.final, key) for key in FORECAST if key != "within_reach"}
    return values | {"within_reach": f.within_reach, "limit": f.limit and f.limit.to_dict()}


def _limit(groups: dict[str, list[Outcome]]) -> LimitLine | None:
    """The least W2 of each reward, from the first run whose forecast knows it."""
    known = (o.forecast.get("limit") for runs in groups.values() for o in runs if o.forecast)
    found = next(filter(None, known), None)
    return LimitLine.from_dict(found) if found else None


def write_fronts(folder: Path, settings: Sweep, outcomes: Sequence[Outcome]) -> None:
    """Write fronts.csv, fronts.png and report.html to the sweep's directory."""
    varied = [text.partition("=")[0].strip().lstrip("-").replace("-", "_") for text in settings.set]
    write_text(folder / "fronts.csv", _csv(outcomes, varied))
    groups = _groups(outcomes, varied)
    _plot(folder / "fronts.png", groups)
    _page(folder, settings, outcomes, groups)


def pareto_front(outcomes: Sequence[Outcome], cost: str, sign: int) -> set[Path]:
    """Runs that no other run beats in both reward and `cost`.

    Args:
        sign: 1 where less of the cost is better, −1 where more is.
    """
    kept, highest = set(), -math.inf
    for o in sorted(outcomes, key=lambda o: (sign * o.figure(cost).mean, -o.after.reward.mean)):
        if o.after.reward.mean > highest:
            highest = o.after.reward.mean
            kept.add(o.path)
    return kept


def _groups(outcomes: Sequence[Outcome], varied: Sequence[str]) -> dict[str, list[Outcome]]:
    """Runs that differ in α alone, by increasing α, under the settings that they share."""
    groups: dict[str, list[Outcome]] = {}
    for o in sorted(outcomes, key=lambda o: o.settings.alpha):
        more = [f"{key} {_text(getattr(o.settings, key))}" for key in varied]
        groups.setdefault(", ".join([f"τ={o.settings.tau:g}", *more]), []).append(o)
    return groups


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _csv(outcomes: Sequence[Outcome], varied: Sequence[str]) -> str:
    """A line for the model before training, then one for each run."""
    by_w2, by_diversity = pareto_front(outcomes, "w2_coupled", 1), pareto_front(outcomes, "diversity", -1)
    figures = [name for key in MEASURED for name in (key, f"{key}_low", f"{key}_high")]
    names = ["run", "alpha", "tau", *varied, "n", *figures, *(f"forecast_{key}" for key in FORECAST)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, "on_reward_w2_front", "on_reward_diversity_front", "seconds"])

    def numbers(m: Measures) -> list[float]:
        values = [getattr(m, key) for key in MEASURED]
        return [x for v in values for x in (v.mean, v.low, v.high)]

    start = outcomes[0].before
    empty = [""] * len(FORECAST)
    writer.writerow(
        ["reference", "", "", *("" for _ in varied), start.n, *numbers(start), *empty, "", "", ""]
    )
    for o in outcomes:
        settings = [o.settings.alpha, o.settings.tau, *(_text(getattr(o.settings, k)) for k in varied)]
        expected = [o.forecast[key] for key in FORECAST] if o.forecast else empty
        fronts = [int(o.path in by_w2), int(o.path in by_diversity)]
        row = [o.path.name, *settings, o.after.n, *numbers(o.after), *expected, *fronts, round(o.seconds, 1)]
        writer.writerow(row)
    return file.getvalue()


def _plot(path: Path, groups: dict[str, list[Outcome]]) -> None:
    """Plot both fronts side by side, the forecast dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = ("coupled W2 to the reference", "diversity (mean pairwise distance)")
    for axis, key, label in zip(panels, ("w2_coupled", "diversity"), labels, strict=True):
        for i, (name, runs) in enumerate(groups.items()):
            x, y = [o.figure(key) for o in runs], [o.after.reward for o in runs]
            axis.errorbar(
                [v.mean for v in x], [v.mean for v in y], xerr=[v.high - v.mean for v in x],
                yerr=[v.high - v.mean for v in y], marker="o", markersize=4, capsize=2, color=f"C{i}", label=name,
            )  # fmt: skip
            for o, a, b in zip(runs, x, y, strict=True):
                axis.annotate(
                    f"α={o.settings.alpha:g}",
                    (a.mean, b.mean),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=8,
                )
            if any(o.forecast for o in runs):
                axis.plot(
                    [o.expected(key) for o in runs], [o.expected("reward") for o in runs],
                    "--", marker="o", markerfacecolor="none", color=f"C{i}", alpha=0.6, label=f"{name}, forecast",
                )  # fmt: skip
        if key == "w2_coupled" and (limit := _limit(groups)):
            axis.fill_betweenx(
                limit.reward, limit.w2_low, limit.w2, color="0.85", label="least W2 of any method"
            )
        axis.set(xlabel=label, ylabel="mean reward")
        axis.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def _page(folder: Path, s: Sweep, outcomes: Sequence[Outcome], groups: dict[str, list[Outcome]]) -> None:
    first, n = outcomes[0], outcomes[0].after.n
    rounds = sorted({o.settings.rounds for o in outcomes})
    shown = [o for o in sorted(outcomes, key=lambda o: -o.settings.alpha) if _last(o)]
    page = Page(
        title=folder.name,
        lines=[
            f"{'+'.join(s.reward)} on {s.data}: {len(outcomes)} runs of {', '.join(map(str, rounds))} rounds, "
            f"α in {_set(o.settings.alpha for o in outcomes)}, τ in {_set(o.settings.tau for o in outcomes)}",
            f"bars: 95 % over {n} held-out samples; to see how much training itself varies, add --set seed=0,1,2",
            f"to repeat it: orwcfm sweep --config {folder / 'config.toml'}",
        ],
        tiles=[
            ("reward before", interval(first.before.reward)),
            ("highest reward", f"{max(o.after.reward.mean for o in outcomes):.3f}"),
            ("diversity before", interval(first.before.diversity)),
            ("total time", f"{sum(o.seconds for o in outcomes):.0f} s"),
        ],
        charts_title="Fronts",
        charts=[
            chart("Reward against coupled W2", _series(groups, "w2_coupled"), "coupled W2 to the reference"),
            chart("Reward against diversity", _series(groups, "diversity"), "mean pairwise distance"),
            *(_by_alpha(groups, key, title) for key, title in (
                ("reward", "Reward by α"), ("diversity", "Diversity by α"), ("w2_coupled", "Coupled W2 by α"),
            )),
        ],
        slider="run",
        before="" if first.after.of_images else data_uri(first.path / "samples" / "round_000.png"),
        pictures=[Picture(o.path.name, data_uri(_last(o))) for o in shown],
        tables=[
            Table(
                "All runs on held-out noise",
                ["", "before", *(o.path.name for o in outcomes)],
                measure_rows([first.before, *(o.after for o in outcomes)], "+".join(s.reward)),
            ),
            settings_table(s.model_dump()),
        ],
    )  # fmt: skip
    write_page(folder / "report.html", page)


def _last(o: Outcome) -> Path:
    return o.path / "samples" / f"round_{o.settings.rounds:03d}.png"


def _set(values) -> str:
    return "{" + ", ".join(f"{v:g}" for v in sorted({*values})) + "}"


def _series(groups: dict[str, list[Outcome]], key: str) -> list[Series]:
    """Reward against another figure: for each group one series measured and one forecast."""
    found = []
    for style, (name, runs) in zip(STYLES * len(groups), groups.items(), strict=False):
        x, y = [o.figure(key) for o in runs], [o.after.reward for o in runs]
        found.append(Series(
            name, [v.mean for v in x], [v.mean for v in y], style, [v.low for v in y], [v.high for v in y],
            [v.low for v in x], [v.high for v in x], [f"α={o.settings.alpha:g}" for o in runs],
        ))  # fmt: skip
        if any(o.forecast for o in runs):
            expected = [o.expected("reward") for o in runs]
            found.append(
                Series(f"{name}, forecast", [o.expected(key) for o in runs], expected, f"{style} forecast")
            )
    if key == "w2_coupled" and (limit := _limit(groups)):
        found.append(
            Series("least W2 of any method", limit.w2_low.tolist(), limit.reward.tolist(), "forecast")
        )
    return found


def _by_alpha(groups: dict[str, list[Outcome]], key: str, title: str) -> str:
    """One figure against α; the values of α stand at equal distances, which they seldom have themselves."""
    alphas = sorted({o.settings.alpha for runs in groups.values() for o in runs})
    place = {alpha: float(i) for i, alpha in enumerate(alphas)}
    found = []
    for style, (name, runs) in zip(STYLES * len(groups), groups.items(), strict=False):
        x, y = [place[o.settings.alpha] for o in runs], [o.figure(key) for o in runs]
        bars = [v.low for v in y], [v.high for v in y]
        found.append(Series(name, x, [v.mean for v in y], style, *bars))
        if any(o.forecast for o in runs):
            found.append(Series(f"{name}, forecast", x, [o.expected(key) for o in runs], f"{style} forecast"))
    return chart(title, found, "α", x_names=[f"{a:g}" for a in alphas])
