"""What the forecast is worth: runs beside what was forecast before them.

`python -m orwcfm_fast.benchmarks.calibration [digits|points|closer|rest …] --out FILE.json [--method orw-centred]`

digits, points: α of 0.1, 0.3, 1 and 3 by three τ, each after 8 and after 14 rounds; a summary says how often what was
reached lies within the forecast's interval. closer: digits at α = 0.1 with more gradient steps a round, and with more
samples, which tells what the network has not learnt from what the forecast gets wrong. rest: τ = 0, where the forecast
says that nothing moves. Every run is measured on noise that neither the forecast nor the training has drawn. Runs that
FILE holds already are not repeated; date and versions are those of the first.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
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
from orwcfm_fast.settings import Finetune, Predict, Pretrain
from orwcfm_fast.theory.forecast import Forecast, ForecastRound
from orwcfm_fast.theory.prediction import draw_reference, forecast_grid

CPU = torch.device("cpu")
ALPHAS, TAUS, AFTER = (0.1, 0.3, 1.0, 3.0), (0.25, 0.5, 1.0), (8, 14)
# digits: what a user runs; points: steps enough that the network fits each round
FIT: dict[str, dict[str, Any]] = {
    "digits": {},
    "points": {"rollout": 8192, "batch": 512, "steps_per_round": 200, "lr": 2e-3, "warmup": 10, "probe": 64},
}
POINTS = FIT["points"]
REWARD = {"digits": "even-digits", "points": "right"}
HELD_OUT = {"digits": 4096, "points": 20_000}
HELD_OUT_SEED = 70_001
PARTS = ("digits", "points", "closer", "rest")
CLOSER = ((256, 0), (256, 4096))  # steps a round and rollout, 0 for the usual one
W2_BELOW = 0.15  # share by which a reached W2 may lie below the forecast's interval


@dataclass(frozen=True)
class Case:
    """One run and its forecast; data: digits, or points (two Gaussians on the line)."""

    data: str
    alpha: float
    tau: float
    method: str
    steps_per_round: int
    rollout: int = 0  # 0: the usual one

    @property
    def named(self) -> dict[str, Any]:
        """What a row says of it."""
        return {key: value for key, value in vars(self).items() if key != "rollout" or value}

    @property
    def settings(self) -> Finetune:
        named = self.named
        more: dict[str, Any] = {key: named[key] for key in ("steps_per_round", "rollout") if key in named}
        given: dict[str, Any] = {
            **FIT[self.data],
            "method": self.method,
            "alpha": self.alpha,
            "tau": self.tau,
            **more,
        }
        return Finetune(**given, rounds=max(AFTER))


def model_of(data: str) -> Policy:
    """The default digits model, or a small one on points trained here."""
    if data == "digits":
        return Loader(CPU, "fp32").default().policy
    points, _ = load_data(data)
    policy = make_policy("mlp", data, tuple(points.shape[1:]), CPU)
    settings = Pretrain(data=data, model="mlp", steps=1500, batch=512)
    return pretrain(policy, points, settings, lambda step, loss: None).averaged()


def forecasts_of(data: str, base: Policy, name: str) -> dict[tuple[float, float], Forecast]:
    """All settings, before any is trained."""
    how = Predict(method=name, alpha=[*ALPHAS], tau=[*TAUS], rounds=max(AFTER))
    reference = draw_reference(base, make_reward(REWARD[data]), how)
    return {(f.alpha, f.tau): f for f in forecast_grid(reference, how)}


def calibrate(case: Case, base: Policy, ahead: Forecast) -> list[dict[str, Any]]:
    """Train, and measure on held-out noise after each number of rounds in AFTER."""
    s, reward = case.settings, make_reward(REWARD[case.data])
    policy, n = base.trainable_copy(), HELD_OUT[case.data]
    x0 = start_noise(base, n, HELD_OUT_SEED)
    x_ref = sample(base, x0, s, s.chunk)
    before, rows = reward(base.decode(x_ref)), []
    rounds = AFTER[0] if case.rollout else s.rounds
    for done, _ in enumerate(build_trainer(policy, reward, s, reference=base).train(rounds), 1):
        if done not in AFTER:
            continue
        x = sample(policy, x0, s, s.chunk)
        after = reward(policy.decode(x))
        rows.append({
            **case.named, "reward": REWARD[case.data], "rounds": done, "before": float(before.mean()),
            "doubt": ahead.doubt,
            **beside(ahead.rounds[done], float(after.mean()), float(after.std()) / math.sqrt(n), coupled_w2(x, x_ref)),
        })  # fmt: skip
    return rows


def beside(at: ForecastRound, reached: float, error: float, w2: float) -> dict[str, Any]:
    """A round's forecast beside the reward that was reached, its standard error, and the coupled W2."""
    low, high = (at.reward + sign * 2 * math.hypot(at.reward_error, error) for sign in (-1, 1))
    return {
        "forecast": at.reward, "forecast_error": at.reward_error, "forecast_low": low, "forecast_high": high,
        "ess": at.ess, "reached": reached, "reached_error": error, "inside": low <= reached <= high,
        "w2_low": at.w2_least, "w2_forecast": at.w2_coupled, "w2_high": at.w2_coupled + 2 * at.w2_error,
        "w2_reached": w2,
        "w2_inside": (1 - W2_BELOW) * at.w2_least <= w2 <= at.w2_coupled + 2 * at.w2_error,
    }  # fmt: skip


def at_rest(data: str, base: Policy, alpha: float, name: str, rounds: int = 8) -> dict[str, Any]:
    """τ = 0: how far the loop moves with nothing to learn, in reward and coupled W2."""
    s = Finetune(method=name, alpha=alpha, tau=0.0, rounds=rounds, **FIT[data])
    policy, reward = base.trainable_copy(), make_reward(REWARD[data])
    for _ in build_trainer(policy, reward, s, reference=base).train(rounds):
        pass
    x0 = start_noise(policy, HELD_OUT[data], HELD_OUT_SEED)
    x, x_ref = sample(policy, x0, s, s.chunk), sample(base, x0, s, s.chunk)
    gap = reward(policy.decode(x)) - reward(policy.decode(x_ref))  # on the same noise
    return {
        "data": data, "method": name, "alpha": alpha, "tau": 0.0, "rounds": rounds, "drift": float(gap.mean()),
        "error": float(gap.std()) / math.sqrt(len(gap)), "w2_coupled": coupled_w2(x, x_ref),
    }  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many rewards and W2 lie inside, by data and number of rounds; those of `closer` are left out."""
    rows = [r for r in rows if r.get("steps_per_round") != CLOSER[0][0]]
    found = []
    for data, rounds in sorted({(r["data"], r["rounds"]) for r in rows if "inside" in r}):
        own = [r for r in rows if (r["data"], r["rounds"]) == (data, rounds) and "inside" in r]
        found.append({
            "data": data, "rounds": rounds, "settings": len(own), "reward_inside": sum(r["inside"] for r in own),
            "w2_inside": sum(r["w2_inside"] for r in own),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--method", default="orw-centred")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    parts = arguments.parts or PARTS
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(CPU),
        "versions": checkpoint.versions(),
        "rows": [],
    }
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else about

    def keep(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        found["rows"].append(row)
        found["summary"] = summary(found["rows"])
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")

    for data in ("digits", "points"):
        base = model_of("digits" if data == "digits" else "two-gaussians")
        usual, cases = Finetune(**FIT[data]).steps_per_round, []
        if data in parts:
            cases = [(a, t, usual, 0) for t, a in product(TAUS, ALPHAS)]
        if data == "digits" and "closer" in parts:
            cases += [(ALPHAS[0], TAUS[0], *more) for more in CLOSER]
        if cases:
            ahead = forecasts_of(data, base, arguments.method)
            for alpha, tau, steps, rollout in cases:
                case = Case(data, alpha, tau, arguments.method, steps, rollout)
                if not any(
                    case.named.items() <= row.items() and case.rollout == row.get("rollout", 0)
                    for row in found["rows"]
                ):
                    for row in calibrate(case, base, ahead[alpha, tau]):
                        keep(row)
        if "rest" in parts:
            for name in ("orw-centred", "orw"):
                if not any(
                    {"data": data, "method": name, "tau": 0.0}.items() <= r.items() for r in found["rows"]
                ):
                    keep(at_rest(data, base, 1.0, name))


if __name__ == "__main__":
    main()
