"""Measures as text: the rows of the evaluation table, the same on the terminal and in a report."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orwcfm_fast.evaluation.evaluate import Measures
    from orwcfm_fast.evaluation.intervals import Interval


def interval(value: "Interval | None") -> str:
    """'estimate ± half width' with two digits of the half width; – for None."""
    if value is None:
        return "–"
    half = (value.high - value.low) / 2
    if half == 0:
        return f"{value.mean:.3g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{value.mean:.{digits}f} ± {half:.{digits}f}"


def number(value: float | None) -> str:
    """Three significant digits; – for None."""
    return "–" if value is None else f"{value:.3g}"


def measure_rows(measures: Sequence["Measures"], reward: str) -> list[list[str]]:
    """One row for each figure: its name, then its value for every model. Figures that no model has are left out."""
    first, n = measures[0], measures[0].n
    where = f", {first.features}" if first.features else ""
    rows = [
        [f"reward {reward} (95 %, n={n})", *(interval(m.reward) for m in measures)],
        *([f"  {name}", *(interval(m.rewards[name]) for m in measures)] for name in first.rewards),
        *([f"holdout {name}", *(interval(m.holdout[name]) for m in measures)] for name in first.holdout),
        ["W2 coupled, ≥ W2", *(interval(m.w2_coupled) for m in measures)],
        ["W2 exact on samples", *(interval(m.w2_exact) for m in measures)],
        ["  floor: two reference samples", *(interval(m.w2_floor) for m in measures)],
        ["velocity gap ∫E‖v−v_ref‖²dt", *(number(m.velocity_gap) for m in measures)],
        ["  times e^2L bounds W2²; L", *(number(m.lipschitz) for m in measures)],
        [f"diversity (pairwise distance{where})", *(interval(m.diversity) for m in measures)],
        [f"Vendi score{where}", *(interval(m.vendi) for m in measures)],
        [f"FID against {first.against}", *(interval(m.fid) for m in measures)],
        ["  KID", *(interval(m.kid) for m in measures)],
        ["  precision", *(interval(m.precision) for m in measures)],
        ["  recall", *(interval(m.recall) for m in measures)],
        ["modes covered", *(interval(m.modes) for m in measures)],
        ["  share of samples on the data", *(interval(m.on_data) for m in measures)],
        ["standard deviation per coordinate", *(number(m.pixel_std) for m in measures)],
        ["classifier confidence", *(number(m.confidence) for m in measures)],
    ]
    return [row for row in rows if any(cell != "–" for cell in row[1:])]
