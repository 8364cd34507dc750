"""Writes the manual's tables of measured figures from their result files: python docs/tables.py; measures nothing.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, and is made by the function of that name
here. A test fails where a page differs from what this would write.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end of table -->)", re.S)
NO_YES = ("no", "yes")
EVEN_DIGITS = 0.49  # standard deviation of that reward on samples of the digits model
RACE_STEPS = (10, 20, 40, 100)
TABLES: dict[str, Callable[[], str]] = {}


def results(name: str) -> Any:
    """The result file of that name, else the newest whose name begins so and ends with its date."""
    folder = ROOT / "benchmarks/results"
    found = [*sorted(folder.glob(f"{name}*-20??-??-??.json")), *folder.glob(f"{name}.json")]
    return json.loads(found[-1].read_text("utf-8"))


def table(make: Callable[[], str]) -> Callable[[], str]:
    """Registers a function under its name, with dashes."""
    TABLES[make.__name__.replace("_", "-")] = make
    return make


def lines(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = [*columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, *rows)).replace(
        "\n", f"\n|{'---|' * len(heads)}\n", 1
    )


def written(text: str) -> str:
    """The text of a page with all its tables made anew."""
    return PLACE.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)


def signed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _methods(data: str = "digits", name: str = "methods") -> dict[tuple[float, str], list[dict[str, Any]]]:
    """What each method came to at each α, a row a seed."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in results(f"{name}-{data}")["runs"]:
        after = row["after"] | {"reward": row["after"]["reward"][0]}
        after["over"] = after["w2_coupled"] / row["least_w2"][1]
        groups.setdefault((row["alpha"], row["method"]), []).append(after)
    return dict(sorted(groups.items(), key=lambda group: (-group[0][0], group[0][1])))


def _median(rows: list[dict[str, Any]], key: str, digits: int) -> str:
    return f"{statistics.median(row[key] for row in rows):.{digits}f}"


MEASURES = (("reward", 3), ("w2_coupled", 2), ("over", 2), ("confidence", 3), ("deviation", 3))


@table
def methods() -> str:
    rows = (
        [f"{alpha:g}", f"`{name}`", f"{len(found)}", *(_median(found, *m) for m in MEASURES)]
        for (alpha, name), found in _methods().items()
    )
    return lines(
        ("α", "method", "seeds", "reward", "coupled W2", "over the least", "confidence", "deviation"), rows
    )


@table
def alphas() -> str:
    groups = _methods()
    chosen = [a for a, name in groups if name == "orw-centred" and a in (2, 1, 0.5, 0.3, 0)]
    shown = [m for m in MEASURES if m[0] in ("reward", "w2_coupled", "confidence")]
    rows = ([f"{a:g}", *(_median(groups[a, "orw-centred"], *m) for m in shown)] for a in chosen)
    return lines(("α", "reward, from 0.494", "coupled W2", "classifier confidence, from 0.967"), rows)


def _equal_drift(data: str) -> str:
    from orwcfm_fast.benchmarks.methods_report import EQUAL_W2, reward_at

    runs = [row for row in results(f"methods-{data}")["runs"] if row["rounds"] == 8]
    rows = []
    for w2 in EQUAL_W2[data]:
        rows.append([f"{w2:g}"])
        for method in ("orw", "orw-centred"):
            found = reward_at([row for row in runs if row["method"] == method], w2)
            assert found
            rows[-1].append(f"{found[0]:.3f} ± {2 * found[1]:.3f}")
    return lines(("coupled W2", "`orw`", "`orw-centred`"), rows)


@table
def wishes() -> str:
    from orwcfm_fast.theory.advice import MANY_PROMPTS, WISHES

    rows = (
        [w.name, f"`{w.command(EVEN_DIGITS).removeprefix('orwcfm finetune ')}`", w.why]
        for w in (*WISHES, MANY_PROMPTS)
    )
    return lines(("wish", "settings", "why"), rows)


@table
def equal_drift() -> str:
    return _equal_drift("digits")


@table
def mnist_equal_drift() -> str:
    return _equal_drift("mnist")


MNIST_COLUMNS = (
    "reward",
    "coupled W2",
    "over the least",
    "confidence",
    "diversity",
    "FID",
    "rarest even class",
)


def _mnist(after: dict[str, Any]) -> list[str]:
    even = min(share for digit, share in after["classes"].items() if int(digit) % 2 == 0)
    return [
        f"{after['reward']:.3f}", f"{after['w2_coupled']:.2f}", f"{after['over']:.2f}", f"{after['confidence']:.3f}",
        f"{after['diversity']:.1f}", f"{after['fid'][0]:.0f}", f"{even:.1%}",
    ]  # fmt: skip


@table
def mnist() -> str:
    rows = (
        [f"{alpha:g}", f"`{name}`", *_mnist(after)]
        for (alpha, name), (after, *_) in _methods("mnist").items()
    )
    return lines(("α", "method", *MNIST_COLUMNS), rows)


@table
def mnist_longer() -> str:
    at = (0, "orw-centred")
    rounds = {12: _methods("mnist")[at], 16: _methods("mnist", "longer")[at]}
    return lines(("rounds", *MNIST_COLUMNS), ([f"{n}", *_mnist(after)] for n, (after, *_) in rounds.items()))


@table
def mnist_forecast() -> str:
    rows = []
    for run in sorted(results("methods-mnist")["runs"], key=lambda run: (run["method"], -run["alpha"])):
        at = run["forecast"]
        half = (at["forecast_high"] - at["forecast_low"]) / 2
        rows.append([
            f"`{run['method']}`", f"{run['alpha']:g}", f"{at['forecast']:.3f} ± {half:.3f}",
            _bold(f"{at['reached']:.3f}", not at["inside"]), f"{at['w2_low']:.2f} to {at['w2_high']:.2f}",
            _bold(f"{at['w2_reached']:.2f}", not at["w2_inside"]), f"{at['ess']:.0f}",
        ])  # fmt: skip
    return lines(
        ("method", "α", "reward, forecast", "reached", "coupled W2, forecast", "reached", "ESS of the forecast"), rows
    )  # fmt: skip


@table
def mnist_rounds() -> str:
    """Rollouts of the rounds at α = 0."""
    runs = {run["method"]: run["by_round"] for run in results("methods-mnist")["runs"] if run["alpha"] == 0}
    keys = (("reward_mean", 3), ("w2_coupled", 2), ("confidence", 3), ("fid", 0))
    # a rollout is drawn before the round's steps, its W2 is of the probe after them
    for run in runs.values():
        w2 = [0.0, *(row["w2_coupled"] for row in run)]
        run[:] = [row | {"w2_coupled": before} for row, before in zip(run, w2, strict=False)]
    rows = (
        [f"{k}", *(f"{run[k][key]:.{digits}f}" for run in runs.values() for key, digits in keys)]
        for k in range(len(next(iter(runs.values()))))
    )
    heads = ("reward", "coupled W2", "confidence", "FID")
    return lines(("rounds trained", *(f"{head}, `{name}`" for name in runs for head in heads)), rows)


@table
def variants() -> str:
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in results("variants-digits")["runs"]:
        after = row["after"] | {"reward": row["after"]["reward"][0]}
        groups.setdefault((row["alpha"], row["variant"]), []).append(after)
    rows = (
        [f"{alpha:g}", change, f"{len(found)}"]
        + [f"{statistics.mean(row[key] for row in found):.{d}f}" for key, d in MEASURES if key != "over"]
        for (alpha, change), found in sorted(groups.items(), key=lambda g: (-g[0][0], g[0][1] != "as it is"))
    )
    return lines(("α", "change", "seeds", "reward", "coupled W2", "confidence", "deviation"), rows)


def _race(goal: str, data: str = "digits") -> str:
    from orwcfm_fast.benchmarks import race_report

    found = results(f"race-{data}")
    rows = (race_report.cells(row) for row in race_report.ranked(found, goal))
    return lines(race_report.columns(found, goal), rows)


@table
def race_soon() -> str:
    return _race("soon")


@table
def race_near() -> str:
    return _race("near")


@table
def race_steps() -> str:
    """Of the soonest entrants, reward and share of the diversity after so many steps: means, linear between looks."""
    import numpy as np

    def after(row: dict[str, Any], steps: int, key: str) -> list[float]:
        return [
            float(np.interp(steps, [x["steps"] for x in one], [x[key] for x in one])) for one in row["runs"]
        ]

    def cell(row: dict[str, Any], steps: int) -> str:
        start, then = (after(row, k, "diversity") for k in (0, steps))
        kept = statistics.mean(b / a for a, b in zip(start, then, strict=True))
        return f"{statistics.mean(after(row, steps, 'reward')):.3f}, {kept:.2f}"

    rows = (
        [row["name"], *(cell(row, k) for k in RACE_STEPS)]
        for row in results("race-digits")["rows"]
        if row["goal"] == "soon" and row["name"] in ("raft", "nft", "orw-centred, no anchor")
    )
    return lines(("reward, diversity kept", *(f"after {k} steps" for k in RACE_STEPS)), rows)


@table
def race_mnist() -> str:
    return _race("soon", "mnist")


@table
def race_trials() -> str:
    """Of each entrant the settings that were chosen, and the span of what all its trials scored."""
    from orwcfm_fast.benchmarks import race_report

    found = results("race-digits")
    rows = []
    for goal, score in (("soon", "mean reward"), ("near", "reward at W2 1.5")):
        for row in race_report.ranked(found, goal):
            own = [trial[goal] for trial in found["trials"] if trial["name"] == row["name"]]
            settings = ", ".join(f"{key} {value:g}" for key, value in row["trial"].items())
            rows.append([row["name"], goal, settings, score, f"{min(own):.3f} to {max(own):.3f}"])
    return lines(("entrant", "chosen for", "settings", "scored by", "all twelve trials"), rows)


def _bold(text: str, so: bool) -> str:
    return f"**{text}**" if so else text


def _calibration(data: str) -> str:
    """A row a setting: forecast and reached reward after 8 and after 14 rounds, W2 after 14; a miss is bold."""
    rows: dict[tuple[float, float], list[str]] = {}
    for row in results(f"calibration-{data}")["rows"]:
        cells = rows.setdefault((row["tau"], row["alpha"]), [f"{row['tau']:g}", f"{row['alpha']:g}"])
        half = (row["forecast_high"] - row["forecast_low"]) / 2
        cells += [f"{row['forecast']:.3f} ± {half:.3f}", _bold(f"{row['reached']:.3f}", not row["inside"])]
        if row["rounds"] == 14:
            forecast = f"{row['w2_low']:.2f} to {row['w2_high']:.2f}"
            cells += [forecast, _bold(f"{row['w2_reached']:.2f}", not row["w2_inside"])]
    rounds = [f"{what} {n} rounds" for n in (8, 14) for what in ("forecast,", "reached,")]
    return lines(("τ", "α", *rounds, "coupled W2, forecast", "reached"), [rows[key] for key in sorted(rows)])


@table
def calibration_digits() -> str:
    return _calibration("digits")


@table
def calibration_points() -> str:
    return _calibration("points")


@table
def calibration_closer() -> str:
    """Digits at α = 0.1, τ = 0.25 after 8 rounds: as it is, and with more steps and samples."""
    from orwcfm_fast.settings import Finetune

    found = [*results("calibration-digits")["rows"], *results("calibration-closer")["rows"]]
    rows = [
        [
            f"{row['steps_per_round']}",
            f"{row.get('rollout') or Finetune().rollout:,}",
            f"{row['reached']:.3f}",
        ]
        for row in found
        if (row["alpha"], row["tau"], row["rounds"]) == (0.1, 0.25, 8)
    ]
    return lines(("steps a round", "rollout", "reward reached"), rows)


@table
def calibration_summary() -> str:
    rows = (
        [{"digits": "digits", "points": "two Gaussians"}[s["data"]], f"{s['rounds']}"]
        + [f"{s[key]} of {s['settings']}" for key in ("reward_inside", "w2_inside")]
        for data in ("digits", "points")
        for s in results(f"calibration-{data}")["summary"]
    )
    return lines(("data", "rounds", "reward inside the interval", "coupled W2 inside"), rows)


@table
def at_rest() -> str:
    rows = (
        [
            {"digits": "digits", "points": "two-gaussians"}[r["data"]],
            f"`{r['method']}`",
            f"{signed(r['drift'], 4)} ± {2 * r['error']:.4f}",
            f"{r['w2_coupled']:.3f}",
        ]
        for r in results("calibration-rest")["rows"]
    )
    return lines(("data", "method", "change of the mean reward", "coupled W2"), rows)


@table
def mnist_model() -> str:
    found = results("mnist-model")
    fid, low, high = found["fid_in_classifier_features"]
    shares = found["class_shares"]
    rows = [
        ("accuracy of the classifier on the 10,000 test digits", f"{found['classifier_on_test_digits']:.2%}"),
        ("its mean confidence in the model's samples", f"{found['confidence']:.3f}"),
        ("share of the rarest and of the most frequent class", f"{min(shares):.1%}, {max(shares):.1%}"),
        ("FID against the test digits in the classifier's features", f"{fid:.1f} ({low:.1f} to {high:.1f})"),
        ("precision, recall", f"{found['precision']:.2f}, {found['recall']:.2f}"),
        ("weights: model, classifier", f"{found['megabytes'][0]:.1f} MB, {found['megabytes'][1]:.1f} MB"),
    ]
    return lines(("of 4,096 samples", ""), rows)


@table
def forms() -> str:
    rows = (
        [f"{r['alpha']:g}"]
        + [f"{r[key]:.3f}" for key in ("reward_orw", "reward_centred", "w2_orw", "w2_centred", "w2_between")]
        for r in results("forecasts-cpu")["rows"]
        if r["part"] == "forms"
    )
    columns = (
        "reward, `orw`",
        "`orw-centred`",
        "W2 from the start, `orw`",
        "`orw-centred`",
        "W2 between the two",
    )
    return lines(("α", *columns), rows)


@table
def forecast_checks() -> str:
    rows = results("forecasts-cpu")["rows"]
    parts = {
        name: [row for row in rows if row["part"] == name] for name in ("coverage", "grid", "limit", "speed")
    }
    inside = [sum(row[key] for row in parts["coverage"]) for key in ("reward_inside", "w2_inside")]
    worst = max(parts["grid"], key=lambda row: abs(row["off"]))
    cells = [
        (
            "sets of 1,024 samples whose interval holds the forecast from 16,384 others: reward, W2",
            f"{inside[0]} and {inside[1]} of {len(parts['coverage'])}",
        ),
        (
            f"farthest from the quadrature solver in {len(parts['grid'])} settings of one and two dimensions",
            f"{abs(worst['off']):.1f} standard errors",
        ),
        ("the limit line from 8,192 samples", f"{parts['limit'][0]['seconds']:.1f} s"),
    ]
    for row in parts["speed"]:
        settings = f"{row['settings']} setting{'s' * (row['settings'] > 1)}"
        cells.append(
            (f"{settings} of {row['rounds']} rounds from {row['n']:,} samples", f"{row['seconds']:.0f} s")
        )
    return lines(("", ""), cells)


@table
def ranks() -> str:
    rows = []
    for row in results("ranks-cpu")["rows"]:
        cells = [f"{row[k]:.0f} (×{row[f'{k}_gain']:.2f})" for k in ("rollout", "train")]
        exchange = "none" if row["ranks"] == 1 else f"{row['exchange_ms']:.1f}"
        rows.append([f"{row['ranks']}{', on 2 cores' if row['ranks'] > 2 else ''}", *cells, exchange])
    return lines(("processes", "rollout, images/s", "training, images/s", "exchange of a gradient, ms"), rows)


@table
def scaling() -> str:
    rows = []
    for row in results("scaling-on-paper")["rows"]:
        at = {t["ranks"]: t for t in row["rounds"]}
        trained = row["trained"] + ", sharded" * row["sharded"]
        cells = [row["model"], trained, f"{row['velocity_tflop']:.0f}", f"{at[1]['total'] / 3600:.1f} h"]
        for t in (at[8], at[64], at[256], at[1024]):
            seconds = f"{t['total']:,.0f}" if t["total"] >= 100 else f"{t['total']:.3g}"
            cells.append(f"{seconds} s (×{t['faster']:.0f})")
        rows.append([*cells, f"{row['pays_to']}", f"{at[256]['reward_servers']}"])
    return lines(
        ("model", "trained", "TFLOP a velocity", "1 GPU", "8", "64", "256", "1,024", "pays up to", "servers at 256"),
        rows,
    )  # fmt: skip


@table
def families() -> str:
    rows = (
        [
            name,
            r["pipeline"],
            r["kind"],
            f"{r['velocity']:.0e}",
            f"{r['picture']:.0e}",
            NO_YES[r["rows_share"]],
        ]
        for name, r in results("families").items()
    )
    return lines(("family", "pipeline", "makes", "velocity", "picture", "rows share calls"), rows)


@table
def learning() -> str:
    rows = []
    for name, r in results("families-learning").items():
        cells = [
            f"{signed(m, 4)} ({signed(low, 4)} to {signed(high, 4)})"
            for low, m, high in (r["before"], r["after"])
        ]
        rows.append([name, *cells, f"{r['export_error']:.0e}"])
    return lines(("family", "reward before", "after 10 rounds", "pictures"), rows)


@table
def large_models() -> str:
    rows = []
    for recipe, planned in results("large-models-on-paper").items():
        rows.append([f"`{recipe}`", f"{planned[0]['weights'] / 2**30:.0f}"])
        for row in planned:
            how = f" ({row['micro_batch']}, {row['chunk']})" if row["fits"] else " needed"
            rows[-1].append(f"{row['peak'] / 2**30:.0f}{how}")
    return lines(("recipe", "transformer", "of 24", "of 80", "of 141"), rows)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text("utf-8")), "utf-8")
