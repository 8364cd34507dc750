"""The loop on 1, 2 and 4 processes of one machine, gloo between them, beside the simple model of what to expect.

    python -m orwcfm_fast.benchmarks.ranks --machine "2 cores" --out benchmarks/results/ranks-cpu.json

Each process has one thread. The model: rollout and steps take 1/N of the time on N ranks, as long as there are
cores; a step exchanges its gradient once, a round its rollout. Figures are of the fastest round, since other work
on the machine can only slow one down; the exchange is timed by itself.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.benchmarks.ways import bench_policy
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.distributed import joined
from orwcfm_fast.networks.lora import trained_parameters
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.settings import Finetune

LOOP = Finetune(rollout=256, batch=64, steps_per_round=8, rounds=4, probe=8, chunk=64)
WORLDS = (1, 2, 4)
REPEATS = 2
EXCHANGES = 30


def measure() -> dict[str, Any] | None:
    """This launch's fastest round; None on all ranks but the first."""
    with joined() as ranks:
        policy = bench_policy("digits", "fp32")
        trainer = build_trainer(policy, lambda x: x.flatten(1).mean(1), LOOP, ranks=ranks)
        records = [*trainer.train(LOOP.rounds)]
        gradient = torch.zeros(sum(p.numel() for p in trained_parameters(policy.network)))
        seconds = []
        for _ in range(EXCHANGES):
            began = time.perf_counter()
            ranks.total(gradient)
            seconds.append(time.perf_counter() - began)
        if not ranks.first:
            return None
        return {
            "ranks": ranks.world,
            "rollout": max(r["images_per_s_rollout"] for r in records),
            "train": max(r["images_per_s_train"] for r in records),
            "exchange_ms": 1000 * sorted(seconds)[EXCHANGES // 2],
            "gradient_bytes": gradient.nbytes,
            "rollout_bytes": 4 * LOOP.rollout * math.prod(policy.shape),
        }


def launch(world: int) -> dict[str, Any]:
    """`measure` in so many processes, by torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(world),
        ]
        command += ["-m", "orwcfm_fast.benchmarks.ranks", "--out", str(out)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(out.read_text())


def compare(machine: str) -> dict[str, Any]:
    """Every number of ranks in turn, `REPEATS` times; the fastest of each, and its gain over one."""
    found = [launch(world) for _ in range(REPEATS) for world in WORLDS]
    rows = []
    for world in WORLDS:
        mine = [f for f in found if f["ranks"] == world]
        row = mine[0] | {key: max(f[key] for f in mine) for key in ("rollout", "train")}
        rows.append(row | {"exchange_ms": min(f["exchange_ms"] for f in mine)})
    for row in rows:
        row["rollout_gain"] = row["rollout"] / rows[0]["rollout"]
        row["train_gain"] = row["train"] / rows[0]["train"]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": checkpoint.versions(),
        "settings": LOOP.model_dump(include={"rollout", "batch", "steps_per_round", "nfe", "chunk"}),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machine", default="", help="what it ran on, in words")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure() if "RANK" in os.environ else compare(arguments.machine)
    if found:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
