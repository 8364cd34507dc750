"""The α that reaches a wanted reward or W2, found by forecasts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orwcfm_fast.errors import UserError
from orwcfm_fast.theory.forecast import REACH, Forecast, forecast_many

ALPHAS = (0.0, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 4.0, 10.0)


@dataclass(frozen=True)
class AlphaInterval:
    """α between low and high is forecast to reach the wanted figure."""

    low: float
    high: float
    forecasts: list[Forecast]


def alpha_for(
    samples: Any,
    rewards: Any,
    tau: float,
    rounds: int = 6,
    *,
    want_reward: float | None = None,
    want_w2: float | None = None,
    alphas: Sequence[float] = ALPHAS,
    **options: Any,
) -> AlphaInterval:
    """The interval of α that reaches a reward, or a coupled W2, after `rounds` rounds.

    Both fall as α rises. Forecasts over `alphas` are interpolated in log α (linearly next to 0). The interval holds
    every α at which the wanted figure lies within two standard errors of the forecast; for W2, between the
    limit line and two standard errors above the forecast.

    Raises:
        UserError: not exactly one wish; a wish that no α reaches, or only beyond the forecast's reach.
    """
    if (want_reward is None) == (want_w2 is None):
        raise UserError("give one of --want-reward and --want-w2")
    if tau <= 0:
        raise UserError(f"τ = {tau:g} does not raise the reward; give τ > 0")
    name, want = ("reward", want_reward) if want_w2 is None else ("W2", want_w2)
    assert want is not None
    alphas = sorted(alphas)
    found = forecast_many(
        samples, rewards, [(alpha, tau) for alpha in alphas], rounds, exact_w2=False, **options
    )
    last = [f.final for f in found]
    if name == "reward":
        values = [(r.reward, r.reward - 2 * r.reward_error, r.reward + 2 * r.reward_error) for r in last]
    else:
        values = [(r.w2_coupled, r.w2_least, r.w2_coupled + 2 * r.w2_error) for r in last]
    start = found[0].rounds[0].reward if name == "reward" else 0.0
    if want <= start:
        raise UserError(f"{name} {want:g} is no more than the model has before training, {start:.3g}")
    lower, upper = [low for _, low, _ in values], [high for _, _, high in values]
    if want > upper[0]:
        raise UserError(
            f"{name} {want:g} is beyond reach: at α = {alphas[0]:g}, {rounds} rounds come to {values[0][0]:.3g}; "
            "more rounds or a higher τ reach further"
        )
    if want < lower[-1]:
        raise UserError(
            f"{name} {want:g}: even α = {alphas[-1]:g} comes to {values[-1][0]:.3g}; use fewer rounds or a lower τ"
        )
    low, high = _crossing(alphas, lower, want), _crossing(alphas, upper, want)
    used = [f for f in found if low <= f.alpha <= high] or [f for f in found if f.alpha <= low][-1:]
    worst = min(r.ess for f in used for r in f.rounds)
    if worst < REACH:
        raise UserError(
            f"{name} {want:g} is beyond the forecast's reach: the effective sample size falls to {worst:.0f} of "
            f"{len(samples)} (at least {REACH:.0f} are needed); give more samples (-n) or fewer rounds"
        )
    return AlphaInterval(low, high, found)


def _crossing(alphas: Sequence[float], values: Sequence[float], want: float) -> float:
    """The α at which values, falling in α, come down to `want`."""
    falling = [min(values[: i + 1]) for i in range(len(values))]
    for i, value in enumerate(falling):
        if value <= want:
            if i == 0:
                return alphas[0]
            share = (falling[i - 1] - want) / (falling[i - 1] - value)
            a, b = alphas[i - 1], alphas[i]
            return a * (b / a) ** share if a > 0 else b * share
    return math.inf
