"""The outcome of fine-tuning, forecast before training: the exact recursion on an empirical measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.theory.empirical import Empirical, EmpiricalVelocity
from orwcfm_fast.theory.parallel import in_parallel, single_threaded
from orwcfm_fast.theory.recursion import mass_weights

REACH = 100.0  # least effective sample size of the masses at which a forecast is still worth saying
MASS_FLOOR = 1e-8
PROBE = 512  # trajectories on which coupled W2 is measured
ALPHAS = (0.0, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 4.0, 10.0)


@dataclass(frozen=True)
class ForecastRound:
    """The forecast after one round; round 0 is the start.

    reward: E[r], reward_error: one standard error, of the first samples and of the trajectories;
    w2_coupled: √E‖x − x_ref‖² from common noise, no less than W2, and w2_error; w2: exact W2 between the
    masses (last round only, else NaN); diversity: mean distance of two different samples; ess: effective
    sample size of the masses.
    """

    round: int
    reward: float
    reward_error: float
    w2_coupled: float
    w2_error: float
    w2: float
    diversity: float
    ess: float

    @property
    def within_reach(self) -> bool:
        return self.ess >= REACH


@dataclass(frozen=True)
class Forecast:
    """One setting's rounds 0 … N and its last masses [S] over the samples."""

    alpha: float
    tau: float
    rounds: list[ForecastRound]
    masses: Tensor

    @property
    def final(self) -> ForecastRound:
        return self.rounds[-1]

    @property
    def within_reach(self) -> bool:
        """Every round's masses rest on at least REACH samples; beyond, the support cannot follow."""
        return all(r.within_reach for r in self.rounds)


@dataclass(frozen=True)
class AlphaInterval:
    """α between low and high is forecast to reach the wanted figure, to two standard errors."""

    low: float
    high: float
    forecasts: list[Forecast]


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
    weighting: str = "exp",
    normalize: bool = True,
    features: Any = None,
    scored: Any = None,
    draws: int = 1024,
    exact_w2: bool = True,
    seed: int = 0,
) -> list[Forecast]:
    """What the method makes of a model, from samples of it and their rewards: no network, any dimension.

    The recursion of theory.exact_recursion with q_0 = 1/S Σ δ(s_j). Each round follows, for every sample,
    the current flow back to the noise that makes this sample and v* forward again from there, so that a
    round which changes nothing changes no mass; where it lands it leaves the sample's mass.

    Args:
        samples: [S, …] of the reference. rewards: [S].
        settings: pairs (α, τ); they share noise, so that differences between them are sharper than each.
        scored: [M] rewards of more samples of the reference, all that were scored. The samples' first masses
            are tilted until their mean reward is that of these: most of a forecast's error is its start's.
        features: [S, F] in which diversity is measured; the samples where None.
        draws: least number of trajectories (a multiple of S).
        exact_w2: also the exact W2 (POT) between last and first masses.

    Raises:
        UserError: fewer than 2 samples, values that are not finite, settings out of range.
    """
    samples, rewards = _on_host(samples), _on_host(rewards).double()
    if len(samples) < 2 or rewards.shape != (len(samples),):
        raise UserError(
            f"forecast: {len(samples)} samples with rewards of shape {tuple(rewards.shape)}; needs S, S ≥ 2"
        )
    flat = samples.reshape(len(samples), -1).float()
    if not bool(flat.isfinite().all()) or not bool(rewards.isfinite().all()):
        raise UserError("forecast: samples and rewards must be finite")
    for alpha, tau in settings:
        if not (alpha >= 0 and math.isfinite(alpha) and math.isfinite(tau)) or rounds < 1:
            raise UserError(
                f"forecast: α = {alpha:g}, τ = {tau:g}, {rounds} rounds: α ≥ 0, τ finite, 1 round or more"
            )
    scored = rewards if scored is None else _on_host(scored).double()
    if not bool(scored.isfinite().all()):
        raise UserError("forecast: rewards must be finite")
    spread = flat if features is None else _on_host(features).reshape(len(flat), -1).float()
    with single_threaded() as threads:
        engine = _Engine(
            flat, rewards, scored, torch.cdist(spread, spread).double(), rounds, draws, seed, threads
        )
        return [engine.run(a, t, weighting, normalize, exact_w2) for a, t in settings]


def _on_host(values: Tensor) -> Tensor:
    return torch.as_tensor(values).detach().cpu()


class _Engine:
    """What all settings share: samples, noise, and the first round's way back to it."""

    def __init__(
        self, flat, rewards, scored, distance, rounds: int, draws: int, seed: int, threads: int
    ) -> None:
        self.flat, self.rewards, self.distance, self.threads = flat, rewards, distance, threads
        self.measure = Empirical(flat, seed)
        self.index = torch.arange(len(flat)).repeat(math.ceil(draws / len(flat)))
        self.ends = [self.measure.noised(self.measure.end, self.index) for _ in range(rounds)]
        self.probe = torch.randperm(len(self.index), generator=self.measure.generator)[:PROBE]
        self.start = tilted(rewards, float(scored.mean()))
        self.start_error = float(scored.std()) / math.sqrt(len(scored))
        self.still = self.velocity(self.start, torch.ones_like(self.start), 0.0)
        self.first = self.still.flow(self.ends[0], forward=False, threads=threads)

    def velocity(self, masses: Tensor, weights: Tensor, alpha: float) -> EmpiricalVelocity:
        return EmpiricalVelocity(self.measure, masses, weights, self.start, alpha)

    def run(self, alpha: float, tau: float, weighting: str, normalize: bool, exact_w2: bool) -> Forecast:
        masses, variance, count = self.start, self.start_error**2, len(self.flat)
        log = [self.summary(0, masses, self.start_error, (0.0, 0.0))]
        for number, end in enumerate(self.ends, 1):
            weights = mass_weights(self.rewards, masses, tau, weighting, normalize)
            resting = self.velocity(masses, torch.ones_like(masses), 0.0)
            noise = self.first if number == 1 else resting.flow(end, forward=False, threads=self.threads)
            policy = self.velocity(masses, weights, alpha)
            x = policy.flow(noise, forward=True, threads=self.threads)
            carried = masses[self.index] * (count / len(self.index))
            shares = in_parallel(policy.landing, x, self.threads)
            moved = shares @ self.rewards.float() - self.rewards[self.index]
            variance += float((carried * (moved - (carried * moved).sum())).square().sum())
            masses = (carried.float() @ shares).double().clamp_min(MASS_FLOOR / count)
            masses = masses / masses.sum()
            coupled = self.coupled(policy, x[self.probe], noise[self.probe], carried[self.probe])
            log.append(self.summary(number, masses, math.sqrt(variance), coupled))
        if exact_w2:
            log[-1] = replace(log[-1], w2=_exact_w2(self.flat, masses, self.start))
        return Forecast(alpha, tau, log, masses)

    def summary(
        self, number: int, masses: Tensor, error: float, coupled: tuple[float, float]
    ) -> ForecastRound:
        collision = float(masses.square().sum())
        diversity = float(masses @ self.distance @ masses) / max(1 - collision, 1e-12)
        w2 = math.nan if number else 0.0
        return ForecastRound(
            number, float(masses @ self.rewards), error, *coupled, w2, diversity, 1 / collision
        )

    def coupled(
        self, policy: EmpiricalVelocity, x: Tensor, noise: Tensor, mass: Tensor
    ) -> tuple[float, float]:
        """√E‖x_policy − x_ref‖² from common noise, and its standard error."""
        anchor = self.still.flow(noise, forward=True, threads=self.threads)
        ends = (v.mean(self.measure.end, at) for v, at in ((policy, x), (self.still, anchor)))
        squares = torch.sub(*ends).square().sum(1).double()
        mass = mass / mass.sum()
        mean = float(mass @ squares)
        error = float((mass * (squares - mean)).square().sum().sqrt())
        return math.sqrt(mean), error / (2 * math.sqrt(mean) + 1e-12)


def tilted(rewards: Tensor, mean: float) -> Tensor:
    """Masses ∝ exp(λ·r) [S] whose mean reward is `mean`: the least change of equal masses that gets there.

    Equal masses where no λ does: rewards that are all alike, or a mean beyond them.
    """
    count = len(rewards)
    equal = torch.full((count,), 1 / count, dtype=torch.float64)
    scale = float(rewards.std(correction=0))
    if scale == 0 or not float(rewards.min()) < mean < float(rewards.max()):
        return equal
    low, high = -50 / scale, 50 / scale
    for _ in range(100):
        middle = (low + high) / 2
        masses = torch.softmax(middle * rewards, 0)
        low, high = (middle, high) if float(masses @ rewards) < mean else (low, middle)
    return masses


def _exact_w2(samples: Tensor, masses: Tensor, start: Tensor) -> float:
    import ot

    cost = torch.cdist(samples.double(), samples.double()).square().numpy()
    return math.sqrt(max(0.0, float(ot.emd2(masses.numpy(), start.numpy(), cost, numItermax=1_000_000))))


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

    Both fall as α rises. Forecasts over `alphas` are interpolated in log α (linearly next to 0); the interval
    holds every α at which the wanted figure lies within two standard errors of the forecast.

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
    values = [(r.reward, r.reward_error) if name == "reward" else (r.w2_coupled, r.w2_error) for r in last]
    start = found[0].rounds[0].reward if name == "reward" else 0.0
    if want <= start:
        raise UserError(f"{name} {want:g} is no more than the model has before training, {start:.3g}")
    upper, lower = [v + 2 * e for v, e in values], [v - 2 * e for v, e in values]
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
            f"{name} {want:g} is beyond the forecast's reach: its masses rest on {worst:.0f} of {len(samples)} "
            f"samples (at least {REACH:.0f} are needed); give more samples or fewer rounds"
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
