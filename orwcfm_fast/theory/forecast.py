"""The outcome of fine-tuning, forecast before training: the exact recursion on an empirical measure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.theory.empirical_recursion import EmpiricalRecursion, Outcome, tilted
from orwcfm_fast.theory.limit import LimitLine, limit_line
from orwcfm_fast.theory.parallel import single_threaded
from orwcfm_fast.theory.recursion import is_centred

REACH = 100.0  # least effective sample size of the masses at which a forecast is still worth saying
PARTS = 4  # disjoint parts of the samples, forecast by themselves: how the figures depend on the samples
LEAST_PART = 32  # samples in each


@dataclass(frozen=True)
class ForecastRound:
    """The forecast after one round; round 0 is the start.

    reward: E[r], with reward_error, one standard error: of the rewards scored, of the trajectories, of the samples
    (disjoint parts of them, forecast by themselves) and of their number (as much as the parts, a quarter as large,
    lie off). w2_coupled: √E‖x − x_ref‖² from common noise, with w2_error likewise; 0 at τ = 0. In many dimensions a
    sample can only turn into another, which is far, so w2_coupled is the most to expect; w2_least: the least W2 at
    which any method has this reward (`theory.limit`). w2: exact W2 between the masses (last round only, else NaN);
    diversity: mean distance of two different samples; ess: effective sample size of the masses.
    """

    round: int
    reward: float
    reward_error: float
    w2_coupled: float
    w2_error: float
    w2_least: float
    w2: float
    diversity: float
    ess: float

    @property
    def within_reach(self) -> bool:
        return self.ess >= REACH


@dataclass(frozen=True)
class Forecast:
    """One setting's rounds 0 … N, its last masses [S] over the samples, and their limit line if they are enough."""

    alpha: float
    tau: float
    rounds: list[ForecastRound]
    masses: Tensor
    limit: LimitLine | None

    @property
    def final(self) -> ForecastRound:
        return self.rounds[-1]

    @property
    def within_reach(self) -> bool:
        """Every round's masses rest on at least REACH samples; beyond, the support cannot follow."""
        return all(r.within_reach for r in self.rounds)

    @property
    def doubt(self) -> str:
        """What speaks against the forecast and what would help, in words; empty where nothing does."""
        least, count = min(r.ess for r in self.rounds), len(self.masses)
        if least < REACH:
            enough = math.ceil(count * REACH / least)
            return (
                f"beyond the forecast's reach: the effective sample size falls to {least:.0f} of {count}, and "
                f"{REACH:.0f} are needed; orwcfm predict -n {enough} has them, or take fewer rounds or a higher α"
            )
        gain, margin = self.final.reward - self.rounds[0].reward, 2 * self.final.reward_error
        if margin > abs(gain) and self.tau != 0:
            return (
                f"the interval of ±{margin:.3f} is wider than the change of {gain:+.3f}; {4 * count:,} samples would "
                "about halve it"
            )
        return ""


def forecast(
    samples: Any, rewards: Any, alpha: float, tau: float, rounds: int = 6, **options: Any
) -> Forecast:
    """`forecast_many` for one setting."""
    return forecast_many(samples, rewards, [(alpha, tau)], rounds, **options)[0]


def forecast_many(
    samples: Any,
    rewards: Any,
    settings: Sequence[tuple[float, float]],
    rounds: int = 6,
    *,
    method: str = "orw-centred",
    weighting: str = "exp",
    normalize: bool = True,
    features: Any = None,
    scored: Any = None,
    draws: int = 1024,
    exact_w2: bool = True,
    parts: bool = True,
    seed: int = 0,
) -> list[Forecast]:
    """What the method makes of a model, from samples of it and their rewards: no network, any dimension.

    The recursion of `exact_recursion` with q_0 = 1/S Σ δ(s_j), as `EmpiricalRecursion` solves it. Runs on the
    device of the samples.

    Args:
        samples: [S, …] of the reference. rewards: [S].
        settings: pairs (α, τ); they share noise, so that differences between them are sharper than each.
        method: "orw-centred" or "orw".
        scored: [M] rewards of more samples of the reference, all that were scored. The samples' first masses
            are tilted until their mean reward is that of these.
        features: [S, F] in which diversity is measured; the samples where None.
        draws: least number of trajectories (a multiple of S).
        exact_w2: also the exact W2 (POT) between last and first masses.
        parts: also forecast four disjoint parts of the samples, from which errors know what samples do; a quarter
            of the time more.

    Raises:
        UserError: fewer than 2 samples, values that are not finite, settings out of range, another method.
    """
    samples = torch.as_tensor(samples).detach()
    flat = samples.reshape(len(samples), -1).float()
    rewards = _values(rewards, flat)
    centred = is_centred(method)
    if len(samples) < 2 or rewards.shape != (len(samples),):
        raise UserError(
            f"forecast: {len(samples)} samples with rewards of shape {tuple(rewards.shape)}; needs S, S ≥ 2"
        )
    scored = rewards if scored is None else _values(scored, flat)
    if not all(bool(v.isfinite().all()) for v in (flat, rewards, scored)):
        raise UserError("forecast: samples and rewards must be finite")
    for alpha, tau in settings:
        if not (alpha >= 0 and math.isfinite(alpha) and math.isfinite(tau)) or rounds < 1:
            raise UserError(
                f"forecast: α = {alpha:g}, τ = {tau:g}, {rounds} rounds: α ≥ 0, τ finite, 1 round or more"
            )
    spread = flat
    if features is not None:
        spread = torch.as_tensor(features).detach().reshape(len(flat), -1).float().to(flat.device)
    mean, error = float(scored.mean()), float(scored.std()) / math.sqrt(len(scored))
    with single_threaded() as threads:

        def recursion(x: Tensor, r: Tensor, least: int) -> EmpiricalRecursion:
            return EmpiricalRecursion(x, r, tilted(r, mean), least, seed, threads)

        whole = recursion(flat, rewards, draws)
        pieces = []
        enough = len(flat) >= PARTS * LEAST_PART
        if parts and enough:
            order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed)).to(flat.device)
            pieces = [recursion(flat[own], rewards[own], draws // PARTS) for own in order.chunk(PARTS)]
        distance = torch.cdist(spread, spread).double()
        limit = limit_line(flat, rewards) if enough else None
        found = []
        for alpha, tau in settings:
            of_whole, *of_pieces = (
                e.run(alpha, tau, rounds, weighting, normalize, centred) for e in (whole, *pieces)
            )
            log = [
                _summary(
                    number,
                    outcome,
                    [p[number] for p in of_pieces],
                    error,
                    distance,
                    limit,
                    float(rewards.mean()) - mean,
                )
                for number, outcome in enumerate(of_whole)
            ]
            masses = of_whole[-1].masses
            if exact_w2:
                log[-1] = replace(log[-1], w2=_exact_w2(flat, masses, whole.start))
            found.append(Forecast(alpha, tau, log, masses, limit))
        return found


def _values(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values).detach().double().to(like.device)


def _summary(
    number: int, outcome: Outcome, parts: Sequence[Outcome], start_error: float, distance: Tensor,
    limit: LimitLine | None, offset: float,
) -> ForecastRound:  # fmt: skip
    """offset: the samples' own mean reward, from which their limit line starts, less that of all scored."""
    masses = outcome.masses
    collision = float(masses.square().sum())
    diversity = float(masses @ distance @ masses) / max(1 - collision, 1e-12)
    reward_error = math.hypot(
        start_error, outcome.reward_error, *_support([p.reward for p in parts], outcome.reward)
    )
    w2_error = math.hypot(outcome.w2_error, *_support([p.w2_coupled for p in parts], outcome.w2_coupled))
    least = limit.least_w2(outcome.reward + offset)[0] if limit and number else 0.0
    if not least < outcome.w2_coupled:  # also where the line ends before
        least = outcome.w2_coupled
    return ForecastRound(
        number, outcome.reward, reward_error, outcome.w2_coupled, w2_error, least,
        math.nan if number else 0.0, diversity, 1 / collision,
    )  # fmt: skip


def _support(parts: Sequence[float], whole: float) -> tuple[float, float]:
    """Standard errors that the samples leave: by the scatter of the parts, and by how far the whole lies off them."""
    if not parts:
        return 0.0, 0.0
    return statistics.stdev(parts) / math.sqrt(len(parts)), whole - statistics.mean(parts)


def _exact_w2(samples: Tensor, masses: Tensor, start: Tensor) -> float:
    import ot

    cost = torch.cdist(samples.double(), samples.double()).square().cpu().numpy()
    found = ot.emd2(masses.cpu().numpy(), start.cpu().numpy(), cost, numItermax=1_000_000)
    return math.sqrt(max(0.0, float(found)))
