"""The forecast against itself and against exact answers, without training:

`python -m orwcfm_fast.benchmarks.forecasts [coverage|grid|limit|speed|forms …] --out FILE.json`

coverage: 20 disjoint sets of 1,024 samples of the digits model, beside the forecast from 16,384 others. grid: two
Gaussians and eight, four α by three τ, beside the quadrature solver. limit: the limit line on 8,192 samples of
the digits model. speed: seconds of 12 settings from 1,024 samples and of one from 4,096. forms: how far the fixed
points of `orw` and `orw-centred` lie apart, by α.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orwcfm_fast.benchmarks.calibration import CPU, model_of
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.data.datasets import load_data
from orwcfm_fast.device import device_name
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import Reward, make_reward
from orwcfm_fast.settings import Finetune
from orwcfm_fast.theory import exact_recursion
from orwcfm_fast.theory.forecast import forecast, forecast_many
from orwcfm_fast.theory.limit import limit_line
from orwcfm_fast.theory.prediction import known_density

SETS, IN_SET, MANY = 20, 1024, 16_384
ALPHAS, TAUS = (0.1, 0.3, 1.0, 3.0), (0.25, 0.5, 1.0)
Rows = Iterator[dict[str, Any]]


def scored(policy: Policy, reward: Reward, n: int) -> tuple[Tensor, Tensor]:
    """n samples of a model, and their rewards."""
    s = Finetune()
    x = sample(policy, start_noise(policy, n, 0), s, s.chunk)
    with torch.inference_mode():
        return x, reward(policy.decode(x)).double()


def digits(n: int) -> tuple[Tensor, Tensor]:
    """n samples of the default digits model, and their rewards."""
    return scored(model_of("digits"), make_reward("even-digits"), n)


def coverage(alpha: float = 0.3, tau: float = 0.5, rounds: int = 8) -> Rows:
    """One row a set: whether its interval holds the forecast from many samples, for reward and coupled W2."""
    x, r = digits(SETS * IN_SET + MANY)
    many = forecast(x[-MANY:], r[-MANY:], alpha, tau, rounds, exact_w2=False, parts=False).final
    for k in range(SETS):
        of = slice(k * IN_SET, (k + 1) * IN_SET)
        own = forecast(x[of], r[of], alpha, tau, rounds, exact_w2=False).final
        yield {
            "part": "coverage", "reward": own.reward, "reward_error": own.reward_error, "reward_many": many.reward,
            "reward_inside": abs(own.reward - many.reward) <= 2 * own.reward_error, "w2_least": own.w2_least,
            "w2": own.w2_coupled, "w2_error": own.w2_error, "w2_many": many.w2_coupled,
            "w2_inside": own.w2_least <= many.w2_coupled <= own.w2_coupled + 2 * own.w2_error,
        }  # fmt: skip


def grid(rounds: int = 4, n: int = 2048) -> Rows:
    """One row a cell: how many standard errors the forecast lies off the quadrature solver."""
    reward = make_reward("right")
    for data in ("two-gaussians", "8gaussians"):
        points, _ = load_data(data)
        x = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(1))[:n]]
        scored = reward(points)
        found = forecast_many(x, reward(x), [(a, t) for t in TAUS for a in ALPHAS], rounds, scored=scored)
        for f in found:
            exact = exact_recursion(known_density(data), reward, f.alpha, f.tau, rounds, check=False).rounds[
                -1
            ]
            yield {
                "part": "grid", "data": data, "alpha": f.alpha, "tau": f.tau, "reward": f.final.reward,
                "exact": exact.reward, "off": (f.final.reward - exact.reward) / f.final.reward_error,
                "w2_coupled": f.final.w2_coupled, "w2_error": f.final.w2_error, "w2": f.final.w2, "exact_w2": exact.w2,
            }  # fmt: skip


def limit(n: int = 8192) -> Rows:
    """The least W2 of some rewards, extrapolated and on the samples."""
    x, r = digits(n)
    began = time.perf_counter()
    line = limit_line(x, r)
    seconds = time.perf_counter() - began
    for reward in (0.6, 0.614, 0.65, 0.72, 0.745, 0.83, 0.9):
        low, high = line.least_w2(reward)
        yield {"part": "limit", "reward": reward, "w2_low": low, "w2": high, "n": n, "seconds": seconds}


def speed() -> Rows:
    """Seconds on the threads that torch has."""
    x, r = digits(4096)
    for n, settings, rounds in ((1024, [(a, t) for t in TAUS for a in ALPHAS], 8), (4096, [(0.3, 0.5)], 14)):
        began = time.perf_counter()
        forecast_many(x[:n], r[:n], settings, rounds, exact_w2=False)
        yield {
            "part": "speed", "n": n, "settings": len(settings), "rounds": rounds,
            "seconds": time.perf_counter() - began, "threads": torch.get_num_threads(),
        }  # fmt: skip


def forms() -> Rows:
    """E[r] and W2 of both fixed points on two Gaussians at τ = 0.5, and the W2 between their densities."""
    density, reward = known_density("two-gaussians"), make_reward("right")
    for alpha in (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0):
        paper, centred = (
            exact_recursion(
                density, reward, alpha, 0.5, 60, method=method, cells=(128,), settle=1e-5, check=False
            ).rounds[-1]
            for method in ("orw", "orw-centred")
        )
        span: Any = density.bounds
        low, high = (span() if callable(span) else span)[0]
        levels = np.arange(0.5, 8192) / 8192
        places = []
        for r in (paper, centred):
            shares = np.concatenate([[0.0], (r.density / r.density.sum()).cumsum(0).numpy()])
            places.append(np.interp(levels, shares, np.linspace(low, high, len(shares))))
        apart = math.sqrt(float(np.mean((places[0] - places[1]) ** 2)))
        yield {
            "part": "forms", "alpha": alpha, "reward_orw": paper.reward, "reward_centred": centred.reward,
            "w2_orw": paper.w2, "w2_centred": centred.w2, "w2_between": apart, "rounds": centred.round,
        }  # fmt: skip


PARTS: dict[str, Callable[[], Rows]] = {
    "coverage": coverage, "grid": grid, "limit": limit, "speed": speed, "forms": forms,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(CPU),
        "versions": checkpoint.versions(),
        "rows": [],
    }
    for name in arguments.parts or PARTS:
        for row in PARTS[name]():
            print(json.dumps(row), flush=True)
            found["rows"].append(row)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
