"""What the forecast is worth: runs trained until they settle, beside what was forecast before them.

`python -m orwcfm_fast.benchmarks.calibration [digits|points|rest …] --out FILE.json`; digits: three rewards by two α
on the default model; points: 2-D data on small models trained here; rest: τ = 0, where nothing should move, and why
with α = 0 it does.
"""

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.data.datasets import load_data
from orwcfm_fast.device import device_name
from orwcfm_fast.evaluation.drift import coupled_w2
from orwcfm_fast.method.pretrain import pretrain
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.networks.policy import Policy, make_policy
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Finetune, Predict, Pretrain, Weights
from orwcfm_fast.theory.prediction import draw_reference, forecast_grid

CPU = torch.device("cpu")
SETTLED = {
    1.0: 8,
    0.3: 14,
}  # rounds by α: the recursion's gap to its fixed point shrinks by 1/(1 + α) a round
POINTS: dict[str, Any] = dict(rollout=8192, batch=512, steps_per_round=200, lr=2e-3, warmup=10, probe=64)
HELD_OUT = {"digits": 2048, "points": 20_000}


@dataclass(frozen=True)
class Case:
    """One run. weights: as in `finetune`; bar: how far off a forecast may be, where one is promised."""

    data: str
    reward: str
    alpha: float
    tau: float
    weights: Weights = "exp"
    bar: float | None = None

    @property
    def settings(self) -> Finetune:
        more = {"steps_per_round": 256} if self.data == "digits" else POINTS
        return Finetune(
            alpha=self.alpha, tau=self.tau, weights=self.weights, rounds=SETTLED[self.alpha], **more
        )


DIGITS = [Case("digits", "even-digits", alpha, 0.5, bar=0.05) for alpha in SETTLED] + [
    Case("digits", reward, alpha, 0.25, "advantage")
    for reward in ("brightness", "jpeg-compressibility")
    for alpha in SETTLED
]
POINT_CASES = [
    Case(data, "right", alpha, 0.5, bar=0.03)
    for data in ("two-gaussians", "8gaussians")
    for alpha in (1.0, 0.3)
]


def model_of(data: str) -> Policy:
    """The default digits model, or a small one trained here."""
    if data == "digits":
        return Loader(CPU, "fp32").default().policy
    points, _ = load_data(data)
    policy = make_policy("mlp", data, tuple(points.shape[1:]), CPU)
    settings = Pretrain(data=data, model="mlp", steps=1500, batch=512)
    return pretrain(policy, points, settings, lambda step, loss: None).averaged()


def calibrate(case: Case, base: Policy) -> dict[str, Any]:
    """Forecast, train, measure on held-out noise; all figures after the same number of rounds."""
    s, reward = case.settings, make_reward(case.reward)
    how = Predict(alpha=[s.alpha], tau=[s.tau], rounds=s.rounds, weights=s.weights)
    (ahead,) = forecast_grid(draw_reference(base, reward, how), how)
    policy = base.trainable_copy()
    for _ in build_trainer(policy, reward, s, reference=base).train(s.rounds):
        pass
    n = HELD_OUT["digits" if case.data == "digits" else "points"]
    x0 = start_noise(policy, n, s.seed)
    x, x_ref = sample(policy, x0, s, s.chunk), sample(base, x0, s, s.chunk)
    after, before = reward(policy.decode(x)), reward(policy.decode(x_ref))
    return {
        "data": case.data, "reward": case.reward, "alpha": case.alpha, "tau": case.tau, "weights": case.weights,
        "rounds": s.rounds, "before": float(before.mean()), "reward_std": float(before.std()),
        "forecast": ahead.final.reward, "forecast_error": ahead.final.reward_error, "ess": ahead.final.ess,
        "reached": float(after.mean()), "reached_error": float(after.std()) / math.sqrt(n),
        "w2_forecast": ahead.final.w2_coupled, "w2_reached": coupled_w2(x, x_ref), "bar": case.bar,
    }  # fmt: skip


def at_rest_digits(alpha: float, base: Policy, rounds: int = 10) -> dict[str, Any]:
    """τ = 0 on digits: every weight is 1 and the exact recursion stands still."""
    policy, reward = base.trainable_copy(), make_reward("even-digits")
    s = Finetune(alpha=alpha, tau=0.0, rounds=rounds)
    for _ in build_trainer(policy, reward, s, reference=base).train(rounds):
        pass
    x0 = start_noise(policy, HELD_OUT["digits"], s.seed)
    x, x_ref = sample(policy, x0, s, s.chunk), sample(base, x0, s, s.chunk)
    gap = reward(policy.decode(x)) - reward(policy.decode(x_ref))  # on the same noise
    return {
        "data": "digits", "alpha": alpha, "rounds": rounds, "drift": float(gap.mean()),
        "error": float(gap.std()) / math.sqrt(len(gap)),
        "walk": walk(float(reward(policy.decode(x_ref)).std()), rounds, s.rollout, alpha),
        "w2_coupled": coupled_w2(x, x_ref),
    }  # fmt: skip


def walk(std: float, rounds: int, rollout: int, alpha: float) -> float:
    """Standard deviation of E[r] after rounds that each see `rollout` samples of the one before.

    A round keeps 1/(1 + α) of what it was off and adds the mean of `rollout` draws: α = 0 is a random walk.
    """
    keep = 1 / (1 + alpha)
    return keep * std / math.sqrt(rollout) * math.sqrt(sum(keep ** (2 * k) for k in range(rounds)))


STUDY: list[dict[str, Any]] = [
    {},
    {"rollout": 2048},
    {"rollout": 32768},
    {"steps_per_round": 50},
    {"steps_per_round": 800},
    {"nfe": 7},
    {"nfe": 28},
]


def at_rest_points(alpha: float, base: Policy, change: dict[str, Any], seeds: int = 4) -> dict[str, Any]:
    """τ = 0 on two Gaussians over several seeds: how E[r] scatters, and what the modes' width does."""
    s = Finetune(**POINTS | {"alpha": alpha, "tau": 0.0, "rounds": 10, **change})
    drifts, widths = [], []
    for seed in range(seeds):
        policy, own = base.trainable_copy(), s.model_copy(update={"seed": seed})
        for _ in build_trainer(policy, make_reward("right"), own, reference=base).train(own.rounds):
            pass
        x0 = start_noise(policy, HELD_OUT["points"], 9)
        x, x_ref = sample(policy, x0, Finetune(), 20_000), sample(base, x0, Finetune(), 20_000)
        drifts.append(float((x > 0).float().mean() - (x_ref > 0).float().mean()))
        widths.append(float(x[x > 0].std() / x_ref[x_ref > 0].std()))
    return {
        "data": "two-gaussians", "alpha": alpha, "change": change, "rounds": 10, "drifts": drifts,
        "rms": math.sqrt(statistics.mean(d * d for d in drifts)), "walk": walk(0.5, 10, s.rollout, alpha),
        "width_ratio": statistics.mean(widths),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], "digits", "points", "rest"], default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    parts = arguments.parts or ["digits", "points", "rest"]
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(torch.device("cpu")),
        "versions": checkpoint.versions(),
        "rows": [],
    }

    def keep(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        found["rows"].append(row)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")

    models: dict[str, Policy] = {}
    for case in (DIGITS if "digits" in parts else []) + (POINT_CASES if "points" in parts else []):
        models[case.data] = models.get(case.data) or model_of(case.data)
        keep(calibrate(case, models[case.data]))
    if "rest" in parts:
        line = models.get("two-gaussians") or model_of("two-gaussians")
        for change in STUDY:
            keep(at_rest_points(0.0, line, change))
        keep(at_rest_points(1.0, line, {}))
        for alpha in (1.0, 0.0):
            keep(at_rest_digits(alpha, models.get("digits") or model_of("digits")))


if __name__ == "__main__":
    main()
