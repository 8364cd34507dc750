"""W2 to the exact recursion within each mode: `python -m orwcfm_fast.benchmarks.modes --out FILE.json`.

Two Gaussians: the trained loop after six rounds beside `exact_recursion` of the same method, from the density of the
same pretrained network. W2 is divided by that of two exact samples of the same size, so 1 is the best that can be
measured. At τ = 0 the reward has no say: what is left there is the cost of training a network on its own samples.
"""

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.benchmarks.calibration import CPU, POINTS, model_of
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.device import device_name
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.settings import Finetune
from orwcfm_fast.theory import exact_recursion, refit

ROUNDS, DRAWS, TAU = 6, 20, 0.5
OF_MODE = 5000  # samples of both modes together
MORE: dict[str, Any] = {"rollout": 32768, "batch": 1024, "steps_per_round": 400, "cooldown": 0.9}
CASES: list[tuple[str, float, float, dict[str, Any]]] = [
    (method, alpha, tau, more)
    for method in ("orw-centred", "orw")
    for alpha, tau in ((1.0, TAU), (0.3, TAU), (0.0, TAU), (0.0, 0.0))
    for more in ({}, MORE)
]


def w2(a: Tensor, b: Tensor) -> float:
    """W2 between two samples [N] on the line, of the same size."""
    return float((a.sort().values - b.sort().values).square().mean().sqrt())


def ratio(found: Tensor, exact: Tensor, n: int, generator: torch.Generator) -> float:
    """Mean W2 between n of `found` and n of `exact`, divided by that between n and n of `exact`."""

    def some(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:n]]

    apart, floor = [], []
    for _ in range(DRAWS):
        one = some(exact)
        apart.append(w2(some(found), one))
        floor.append(w2(some(exact), one))
    return statistics.mean(apart) / statistics.mean(floor)


def measure(
    base: Policy, density: Any, method: str, alpha: float, tau: float, more: dict[str, Any]
) -> dict[str, Any]:
    """One setting of the trained loop: E[r], and the ratio of W2 within the left and within the right mode."""
    reward = make_reward("right")
    s = Finetune(
        **POINTS | {"method": method, "alpha": alpha, "tau": tau, "rounds": ROUNDS, "cooldown": 0.5} | more
    )
    policy = base.trainable_copy()
    for _ in build_trainer(policy, reward, s, reference=base).train(ROUNDS):
        pass
    x = sample(policy, start_noise(policy, 100_000, 9), s, 50_000).flatten()
    exact = exact_recursion(
        density, lambda p: (p[:, 0] > 0).float(), alpha, tau, ROUNDS, method=method, check=False
    )
    pool = exact.sample(exact.rounds[-1].round, 400_000, seed=1).flatten()
    generator = torch.Generator().manual_seed(2)
    ratios = []
    for side in (-1, 1):
        inside = pool[side * pool > 0]
        n = int(OF_MODE * len(inside) / len(pool))
        ratios.append(ratio(x[side * x > 0], inside, n, generator))
    return {
        "method": method, "alpha": alpha, "tau": tau, **more, "reached": float((x > 0).float().mean()),
        "exact": exact.rounds[-1].reward, "w2_ratio": ratios,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    base = model_of("two-gaussians")
    density = refit(
        sample(base, start_noise(base, 250_000, 5, first=k * 250_000), Finetune(), 50_000) for k in range(4)
    )
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(CPU),
        "versions": checkpoint.versions(),
        "rows": [],
    }
    for case in CASES:
        found["rows"].append(measure(base, density, *case))
        print(json.dumps(found["rows"][-1]), flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
