"""Noise in the reward, and what helps against it: `python -m orwcfm_fast.benchmarks.noisy --out F`.

Digits, α = 0.3, eight rounds. Normal noise is added to the rewards that are trained on; the figures are of the reward
without it, on held-out samples. Runs that F holds already are not repeated.
"""

import argparse
import json
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.benchmarks.methods import CPU, Bench, run
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.device import device_name
from orwcfm_fast.rewards import make_reward

SEEDS = (3, 4, 5)
DEVIATION = 2.0  # four times that of the rewards themselves
SETTINGS: tuple[dict[str, Any], ...] = (
    {"noise": 0.0, "tau": 0.5},
    {"noise": DEVIATION, "tau": 0.5},
    {"noise": DEVIATION, "tau": 0.5, "rollout": 4096},
    {"noise": DEVIATION, "tau": 0.25},
)


def with_noise(bench: Bench, deviation: float, seed: int) -> Bench:
    """The bench, training on its reward with noise of that deviation."""
    clean, generator = bench.reward, torch.Generator().manual_seed(seed)

    def noisy(images: Tensor) -> Tensor:
        return clean(images) + deviation * torch.randn(len(images), generator=generator)

    return replace(bench, reward=make_reward(noisy, name="noisy"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench.of("digits")
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(CPU),
        "versions": checkpoint.versions(),
        "held_out": bench.held_out,
        "runs": [],
    }
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else about
    for seed, settings in product(SEEDS[: given.seeds], SETTINGS):
        this = {"seed": seed, "settings": settings}
        if any(this.items() <= row.items() for row in found["runs"]):
            continue
        change = {key: value for key, value in settings.items() if key != "noise"}
        row = run(with_noise(bench, settings["noise"], seed), seed=seed, alpha=0.3, **change)
        found["runs"].append(this | row)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        print(
            f"{this}: reward {row['after']['reward'][0]:.3f}, W2 {row['after']['w2_coupled']:.2f}", flush=True
        )


if __name__ == "__main__":
    main()
