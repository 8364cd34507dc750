"""Endpoint error of solvers and grids on trained models, by network evaluations.

`python -m orwcfm_fast.benchmarks.solvers [MODEL …]`: models as `orwcfm sample` takes them (default: the digits
model), and small ones of 2-D data, trained here in half a minute each: `--data 8gaussians --data moons`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orwcfm_fast.data.datasets import load_data, source
from orwcfm_fast.method.noise import SAMPLE
from orwcfm_fast.method.pretrain import pretrain
from orwcfm_fast.method.rollout import start_noise
from orwcfm_fast.method.samplers import SOLVERS, solve
from orwcfm_fast.networks.policy import Policy, make_policy
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Pretrain

EVALUATIONS = (8, 10, 12, 16, 20)
GRIDS = ("uniform", "power:1.15", "power:1.3", "power:1.5")


@dataclass(frozen=True)
class Row:
    """rmse: over samples and their elements, to the converged end point; ratio: to 99-step Euler's."""

    solver: str
    grid: str
    nfe: int
    rmse: float
    ratio: float


def measure(
    policy: Policy,
    samples: int,
    seed: int = 0,
    evaluations: Sequence[int] = EVALUATIONS,
    grids: Sequence[str] = GRIDS,
) -> list[Row]:
    """Every fixed-step solver that fits on every grid, against RK4 with 400 evaluations; the first row is
    99-step Euler. The network runs in the policy's precision, the converged solution with it."""
    x0 = start_noise(policy, samples, seed, SAMPLE)
    with torch.inference_mode():
        exact = solve(policy.velocity, x0, "rk4", 400)

        def rmse(solver: str, nfe: int, grid: str) -> float:
            return (solve(policy.velocity, x0, solver, nfe, grid) - exact).square().mean().sqrt().item()

        euler = rmse("euler", 99, "uniform")
        rows = [Row("euler", "uniform", 99, euler, 1.0)]
        for name in SOLVERS.names():
            if SOLVERS.get(name).adaptive:
                continue
            for nfe in evaluations:
                if nfe >= SOLVERS.get(name).min_nfe:
                    errors = [(grid, rmse(name, nfe, grid)) for grid in grids]
                    rows += [Row(name, grid, nfe, error, error / euler) for grid, error in errors]
    return rows


def table(rows: Sequence[Row]) -> str:
    """Ratios to 99-step Euler: a line for a solver and grid, a column for a number of evaluations."""
    counts = sorted({row.nfe for row in rows[1:]})
    lines = [f"99-step Euler: RMSE {rows[0].rmse:.5f}; below, ratios to it by network evaluations"]
    lines.append(f"{'solver':10}{'grid':12}" + "".join(f"{n:>8}" for n in counts))
    for solver, grid in dict.fromkeys((row.solver, row.grid) for row in rows[1:]):
        found = {row.nfe: row.ratio for row in rows[1:] if (row.solver, row.grid) == (solver, grid)}
        cells = "".join(f"{found[n]:8.2f}" if n in found else " " * 8 for n in counts)
        lines.append(f"{solver:10}{grid:12}{cells}")
    return "\n".join(lines)


def toy_policy(data: str, steps: int = 2000) -> Policy:
    """The default model of a small dataset, trained now."""
    samples, _ = load_data(data)
    policy = make_policy(source(data)[0].model, data, tuple(samples.shape[1:]), torch.device("cpu"))
    settings = Pretrain(data=data, steps=steps)
    return pretrain(policy, samples, settings, lambda step, loss: None).averaged()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="runs, checkpoints or presets")
    parser.add_argument("--data", action="append", default=[], help="2-D data to train a small model on")
    parser.add_argument("--samples", type=int, default=256)
    arguments = parser.parse_args()
    loader = Loader(torch.device("cpu"), precision="float32")
    models = arguments.models or ([] if arguments.data else ["unet-digits"])
    for name, policy in [
        *((spec, loader.load(spec).policy) for spec in models),
        *((data, toy_policy(data)) for data in arguments.data),
    ]:
        print(f"\n{name}: {arguments.samples} samples")
        print(table(measure(policy, arguments.samples)))


if __name__ == "__main__":
    main()
