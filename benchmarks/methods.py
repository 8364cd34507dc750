"""Methods side by side on digits: reward, drift, confidence and width, on held-out noise, by method, α and seed.

    python -m orwcfm_fast.benchmarks.methods --method orw-centred --method orw --alpha 1 --alpha 0.3 --seeds 3 --out F

Each run is written as soon as it is done; runs that F holds already are not repeated. Beside each stands the least W2
at which any method could have its reward (`theory.limit`); at the end, reward at equal W2.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.benchmarks.forecasts import digits
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.device import device_name
from orwcfm_fast.evaluation.evaluate import evaluate
from orwcfm_fast.evaluation.held_out import evaluator_for
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Finetune
from orwcfm_fast.theory.limit import limit_line

CPU = torch.device("cpu")
HELD_OUT = 4096
LIMIT = 8192  # samples of the limit line
EQUAL_W2 = (1.3, 1.9)


def run(base: Policy, **change: Any) -> dict[str, Any]:
    """Fine-tune a copy of the base with these settings; its figures beside the base's."""
    s = Finetune(**change, guard="off")
    reward = make_reward("even-digits")
    trainer = build_trainer(base.trainable_copy(), reward, s, reference=base)
    began = time.perf_counter()
    records = [*trainer.train(s.rounds)]
    seconds = time.perf_counter() - began
    models = {"before": base, "after": trainer.policy}
    measured = evaluate(
        models, base, evaluator_for("digits", reward, "even-digits"), s, HELD_OUT, BatchSizes(chunk=512)
    )
    row: dict[str, Any] = {**change, "seconds": seconds}
    for m in measured:
        row[m.name] = {
            "reward": [m.reward.mean, m.reward.low, m.reward.high],
            "w2_coupled": m.w2_coupled.mean if m.w2_coupled else None,
            "w2_exact": m.w2_exact.mean if m.w2_exact else None,
            "confidence": m.confidence,
            "deviation": m.pixel_std,
            "diversity": m.diversity.mean,
            "classes": {name: share.mean for name, share in m.classes.items()},
        }
    row["by_round"] = [[r["reward_mean"], r["w2_coupled"]] for r in records]
    return row


def reward_at(runs: Sequence[dict[str, Any]], w2: float) -> tuple[float, float] | None:
    """Mean reward at this coupled W2, and its standard error: of held-out samples, or of seeds where that is larger.

    Each seed's front is a straight line from its start through its runs. None where no seed's runs reach so far.
    """
    found, errors = [], []
    for seed in sorted({r["seed"] for r in runs}):
        own = sorted((r["after"]["w2_coupled"], r["after"]["reward"]) for r in runs if r["seed"] == seed)
        start = next(r["before"]["reward"] for r in runs if r["seed"] == seed)
        for (w, low), (w_next, high) in pairwise([(0.0, start), *own]):
            if w <= w2 <= w_next:
                share = (w2 - w) / (w_next - w)
                found.append(low[0] + share * (high[0] - low[0]))
                errors.append((high[2] - high[1]) / 4)
    if not found:
        return None
    held_out = sum(errors) / len(errors) / math.sqrt(len(errors))
    return statistics.mean(found), max(
        held_out, statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", action="append", required=True)
    parser.add_argument("--alpha", type=float, action="append", required=True)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(CPU),
        "versions": checkpoint.versions(),
        "held_out": HELD_OUT,
    }
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {**about, "runs": []}
    base = Loader(CPU, "fp32").default().policy
    line = limit_line(*digits(LIMIT))

    def keep() -> None:
        for row in found["runs"]:
            row["least_w2"] = line.least_w2(row["after"]["reward"][0])
        given.out.write_text(json.dumps(found, indent=1) + "\n")

    for method, alpha, seed in product(given.method, given.alpha, range(given.seeds)):
        change = {"method": method, "alpha": alpha, "tau": given.tau, "rounds": given.rounds, "seed": seed}
        if any(change.items() <= row.items() for row in found["runs"]):
            continue
        found["runs"].append(run(base, **change))
        keep()
        after = found["runs"][-1]["after"]
        print(
            f"{method} α={alpha:g} seed {seed}: reward {after['reward'][0]:.3f}, W2 {after['w2_coupled']:.2f}",
            flush=True,
        )
    keep()
    for w2, method in product(EQUAL_W2, given.method):
        own = [r for r in found["runs"] if r["method"] == method and r["rounds"] == given.rounds]
        if at := reward_at(own, w2):
            print(f"{method} at a coupled W2 of {w2}: reward {at[0]:.3f} ± {2 * at[1]:.3f}")


if __name__ == "__main__":
    main()
