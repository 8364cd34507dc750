"""Forecasts from samples of a model, exact answers in 1-D and 2-D, and finished runs compared with both."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.held_out import evaluator_for
from orwcfm_fast.method import noise
from orwcfm_fast.method.rollout import Rollout, sample, start_conditions, start_noise
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import RewardSum
from orwcfm_fast.settings import Finetune, Predict, build, read_toml
from orwcfm_fast.theory import Density, GaussianMixture, GridDensity, Recursion, exact_recursion, refit
from orwcfm_fast.theory.alpha_search import AlphaInterval, alpha_for
from orwcfm_fast.theory.forecast import Forecast, forecast_many
from orwcfm_fast.theory.limit import LEAST_SAMPLES, LimitLine, limit_line

if TYPE_CHECKING:
    from orwcfm_fast.runs.run import Run

REFITTED = 500_000  # samples that a network's own density is made of


def known_density(data: str) -> GaussianMixture | GridDensity:
    """The density that a 1-D or 2-D dataset was drawn from.

    Raises:
        UserError: it is not known in closed form.
    """
    if data == "two-gaussians":
        return GaussianMixture([0.5, 0.5], [-1.5, 1.5], 0.3)
    if data == "8gaussians":
        angle = torch.arange(8) * (math.pi / 4)
        return GaussianMixture([1 / 8] * 8, 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.2)
    if data == "moons":
        arc = torch.linspace(0, math.pi, 100)
        outer, inner = (
            torch.stack([arc.cos(), arc.sin()], 1),
            torch.stack([1 - arc.cos(), 0.5 - arc.sin()], 1),
        )
        return GaussianMixture(
            [1 / 200] * 200, 2 * (torch.cat([outer, inner]) - torch.tensor([0.5, 0.25])), 0.1
        )
    if data == "checkerboard":
        cell = torch.arange(96) // 16 - 1  # squares −1 … 4 of 16 cells each; 0 … 3 are the board
        inside = (cell >= 0) & (cell < 4)
        dark = (cell[:, None] + cell[None, :]) % 2 == 0
        return GridDensity(((-3.0, 3.0), (-3.0, 3.0)), (dark & inside[:, None] & inside[None, :]).double())
    raise UserError(
        f"--exact: the density of '{data}' is not known; it is of two-gaussians, 8gaussians, moons, checkerboard"
    )


@dataclass(frozen=True)
class Reference:
    """Samples [S, *shape] of the model before training, their features [S, F], rewards [M] of these and more."""

    samples: Tensor
    rewards: Tensor
    features: Tensor


def draw_reference(policy: Policy, reward: RewardSum, s: Predict) -> Reference:
    """Samples of the policy: `scored` of them for the mean reward, the first `n` to carry the forecast."""
    if policy.conditions and len(policy.conditions) > 1:
        raise UserError(MANY_PROMPTS)
    reward.check_prompts(policy)
    x = sample(policy, start_noise(policy, max(s.n, s.scored), s.seed, noise.FORECAST), s, s.chunk)
    seen = policy.decode(x)
    with torch.inference_mode():
        features = evaluator_for(policy.data, reward, reward.name).features(seen[: s.n])
    prompts = policy.prompts_of(start_conditions(policy, len(x), s))
    return Reference(x[: s.n], reward.scores(seen, prompts=prompts).total, features)


def forecast_grid(reference: Reference, s: Predict) -> list[Forecast]:
    """One forecast for each pair of α and τ."""
    pairs = [(a, t) for t in s.tau for a in s.alpha]
    return forecast_many(
        reference.samples, reference.rewards[: s.n], pairs, s.rounds, method=s.method, weighting=s.weights,
        normalize=s.normalize_weights, features=reference.features, scored=reference.rewards, seed=s.seed,
    )  # fmt: skip


def wanted_alpha(reference: Reference, s: Predict) -> AlphaInterval:
    """The interval of α for --want-reward or --want-w2 at the first τ."""
    return alpha_for(
        reference.samples, reference.rewards[: s.n], s.tau[0], s.rounds, want_reward=s.want_reward,
        want_w2=s.want_w2, method=s.method, weighting=s.weights, normalize=s.normalize_weights,
        scored=reference.rewards, seed=s.seed,
    )  # fmt: skip


def own_density(policy: Policy, s: Predict) -> GridDensity:
    """The density of the policy's own samples in 1-D or 2-D, estimated from REFITTED of them."""
    each = REFITTED // 10

    def drawn(k: int) -> Tensor:
        return sample(policy, start_noise(policy, each, s.seed, noise.FORECAST, k * each), s, each)

    return refit(drawn(k) for k in range(10))


def exact_grid(density: Density, reward: Callable[[Tensor], Tensor], s: Predict) -> list[Recursion]:
    """The exact recursion from a density, for each pair of α and τ."""
    return [
        exact_recursion(
            density,
            lambda x: reward(x),
            alpha,
            tau,
            s.rounds,
            method=s.method,
            weighting=s.weights,
            normalize=s.normalize_weights,
        )
        for tau in s.tau
        for alpha in s.alpha
    ]


FORECAST_SAMPLES, FORECAST_ROUNDS, LIMIT_SAMPLES = 512, 12, 2048
MANY_PROMPTS = "no forecast: it would take several prompts for one"
STANDARDIZED = "its rewards are standardised anew each round, which the forecast cannot follow"
BY_ROUND = ("round", "reward", "reward_error", "w2_coupled", "w2_error", "w2_least", "diversity", "ess")


def lower(alpha: float) -> float:
    """The smaller α that is suggested to a run that could have more reward."""
    return round(0.3 * alpha, 4)


def forecast_run(
    rollout: Rollout, settings: Finetune, features: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Any]:
    """Forecast a run from its first rollout, at its own α and at 0.3 times that α; plain values for forecast.json.

    At most 12 rounds: a run that stays near its reference has settled by then.

    Args:
        features: samples [S, *shape] → [S, F] in which diversity is forecast; the samples where None.

    Raises:
        UserError: a run that cannot be forecast.
    """
    if settings.standardize_rewards:
        raise UserError(STANDARDIZED)
    rounds = min(settings.rounds, FORECAST_ROUNDS)
    alphas = [settings.alpha, lower(settings.alpha)] if settings.alpha else [0.0]
    x1 = rollout.x1[:FORECAST_SAMPLES]
    found = forecast_many(
        x1, rollout.reward[:FORECAST_SAMPLES], [(a, settings.tau) for a in alphas], rounds, method=settings.method,
        weighting=settings.weights, normalize=settings.normalize_weights, scored=rollout.reward,
        features=features and features(x1).cpu(), exact_w2=False, seed=settings.seed,
    )  # fmt: skip
    rows = [
        {"alpha": f.alpha, "within_reach": f.within_reach, "doubt": f.doubt, "rewards": [r.reward for r in f.rounds],
         "reward_error": f.final.reward_error, "w2_coupled": f.final.w2_coupled, "w2_least": f.final.w2_least,
         "ess": min(r.ess for r in f.rounds), "by_round": [{k: getattr(r, k) for k in BY_ROUND} for r in f.rounds]}
        for f in found
    ]  # fmt: skip
    limit = None
    if len(x1) >= LEAST_SAMPLES:
        limit = limit_line(rollout.x1[:LIMIT_SAMPLES], rollout.reward[:LIMIT_SAMPLES])
    return {
        "rounds": rounds,
        "own": rows[0],
        "lower_alpha": rows[1] if len(rows) > 1 else None,
        "limit": limit and limit.to_dict(),
    }


def forecast_line(found: dict[str, Any]) -> str:
    """The line before training: what the run is forecast to reach, and what speaks against the forecast."""
    own = found["own"]
    if not own["within_reach"]:
        return f"forecast: {own['doubt']}"
    margin = 2 * own["reward_error"]
    line = (
        f"forecast from round 1: reward {own['rewards'][-1]:.3f} ± {margin:.3f} after {found['rounds']} rounds, "
        f"coupled W2 {own['w2_least']:.2g} to {own['w2_coupled']:.2g}"
    )
    return f"{line}; {own['doubt']}" if own["doubt"] else line


def limit_note(found: dict[str, Any], gain: float, w2: float) -> str:
    """How close a run came to the limit line, in words; empty where it gained nothing or the line is not known.

    gain: the mean reward it added. w2: its coupled W2.
    """
    if found["limit"] is None:
        return ""
    limit = LimitLine.from_dict(found["limit"])
    low, high = limit.least_w2(float(limit.reward[0]) + gain)
    if not (gain > 0 and 0 < low <= w2):  # below the least: a gain within its own error
        return ""
    least = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    return (
        f"coupled W2 {w2:.2f}; the least possible for this gain is {least} (optimal transport): "
        f"{w2 / high:.2f} to {w2 / low:.2f} times the least"
    )


def reached_line(found: dict[str, Any], reached: float, rounds: int) -> str:
    """The line after training: forecast, reached, after how many rounds where these differ, and a lower α."""
    own, other = found["own"], found["lower_alpha"]
    line = f"forecast {own['rewards'][-1]:.2f}" if own["within_reach"] else "forecast beyond reach"
    if found["rounds"] < rounds:
        line += f" after {found['rounds']} rounds"
    line += f", reached {reached:.2f}"
    if found["rounds"] < rounds:
        line += f" after {rounds}"
    if other and other["within_reach"]:
        line += f"; α={other['alpha']:g} would reach about {other['rewards'][-1]:.2f}"
    return line


@dataclass(frozen=True)
class Verdict:
    """A finished run, its forecast, and the exact answer where there is one: reward by round."""

    run: "Run"
    settings: Finetune
    reached: list[float]
    final: float
    half_width: float
    w2_coupled: float
    forecast: Forecast
    exact: Recursion | None

    @property
    def line(self) -> str:
        """One line: what was forecast, what was reached, whether the rewards agree, and both for W2."""
        expected = self.forecast.final.reward
        margin = math.hypot(self.half_width, 2 * self.forecast.final.reward_error) + 0.02
        gap = self.final - expected
        if not self.forecast.within_reach:
            word = self.forecast.doubt
        elif abs(gap) <= margin:
            word = f"agrees within {margin:.3f}"
        elif gap < 0:
            word = f"{-gap:.3f} short: more steps a round, or more rounds, would come nearer"
        else:
            word = f"{gap:.3f} above: the loop moved further than the method's own recursion; look at the samples"
        exact = f", exact {self.exact.rounds[-1].reward:.3f}" if self.exact else ""
        last = self.forecast.final
        w2 = f"; coupled W2 {last.w2_least:.2f} to {last.w2_coupled:.2f}, reached {self.w2_coupled:.2f}"
        return f"forecast {expected:.3f}{exact}, reached {self.final:.3f}: {word}{w2}"


def versus(
    run: "Run", load: Callable[[str], Policy], make: Callable[[Finetune], RewardSum], s: Predict
) -> Verdict:
    """Compare a finished run with the forecast made from its reference model.

    Raises:
        UserError: no finished run there.
    """
    path = run.path
    if not run.config.is_file() or not run.summary.is_file():
        raise UserError(f"--versus {path}: not a finished run (no config.toml and summary.json)")
    settings = build(Finetune, read_toml(run.config), where=f"{run.config}: ")
    if settings.standardize_rewards:
        raise UserError(f"--versus {path}: {STANDARDIZED}")
    records = run.read_metrics()
    if (
        len({(r.get("alpha", settings.alpha), r.get("tau", settings.tau)) for r in records}) > 1
        or settings.target_w2
    ):
        raise UserError(
            f"--versus {path}: its α or τ changed on the way (--target-w2, rollback); no forecast follows"
        )
    policy, reward = load(str(run.reference)), make(settings)
    own = s.model_copy(
        update={
            "method": settings.method, "alpha": [settings.alpha], "tau": [settings.tau], "rounds": len(records),
            "weights": settings.weights, "normalize_weights": settings.normalize_weights,
        }
    )  # fmt: skip
    (found,) = forecast_grid(draw_reference(policy, reward, own), own)
    low_dimensional = len(policy.shape) == 1 and policy.shape[0] <= 2
    exact = exact_grid(own_density(policy, own), reward, own)[0] if low_dimensional else None
    try:
        measured = json.loads(run.summary.read_bytes())["after"]
        after = {k: float(v) for k, v in measured["reward"].items()}
        w2 = float(measured["w2_coupled"]["mean"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"--versus {path}: its summary.json is damaged") from None
    reached = [r["reward_mean"] for r in records] + [after["mean"]]
    return Verdict(run, settings, reached, after["mean"], after["high"] - after["mean"], w2, found, exact)


def save_front(path: Path, forecasts: Sequence[Forecast]) -> Path:
    """Reward against coupled W2 after the last round, and reward by round; one colour a τ."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for tau in dict.fromkeys(f.tau for f in forecasts):
        own = sorted((f for f in forecasts if f.tau == tau), key=lambda f: f.final.w2_coupled)
        left.plot(
            [f.final.w2_coupled for f in own], [f.final.reward for f in own], marker="o", label=f"τ={tau:g}"
        )
        for f in own:
            at = (f.final.w2_coupled, f.final.reward)
            left.annotate(f"α={f.alpha:g}", at, (7, -9), textcoords="offset points", fontsize=8)
            right.plot(
                [r.round for r in f.rounds], [r.reward for r in f.rounds], label=f"α={f.alpha:g} τ={tau:g}"
            )
    if limit := forecasts[0].limit:
        left.fill_betweenx(limit.reward, limit.w2_low, limit.w2, color="0.85", label="least W2 of any method")
    left.set(xlabel="coupled W2 to the reference", ylabel="reward", title="forecast after the last round")
    right.set(xlabel="round", ylabel="reward", title="forecast by round")
    left.margins(x=0.12)
    left.legend(frameon=False)
    right.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)
    return path
