"""What a velocity of a pipeline costs beside its transformers.

    python -m orwcfm_fast.benchmarks.door FOLDER --prompts FILE --out RESULT

A velocity goes through the pipeline's own `__call__` (orwcfm_fast.networks.flow); the door is all of its time that is
not spent inside a transformer: Python, schedule, guidance, packing. FOLDER is a pipeline of diffusers, or its name on
the Hub.
"""

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.device import device_name, resolve_device
from orwcfm_fast.method.rollout import start_noise
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Finetune

TIMES = 20


def door(policy: Policy, rows: int = 1, times: int = TIMES) -> dict[str, Any]:
    """Seconds of a velocity of so many samples, of which inside the transformers, and the share that is the door's."""
    assert policy.pipeline
    device, inside, began = policy.device, [0.0], [0.0]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(*_: Any) -> None:
        began[0] = now()

    def after(*_: Any) -> None:
        inside[0] += now() - began[0]

    x, condition = start_noise(policy, rows, 0), torch.zeros(rows, dtype=torch.int64)
    hooks = [
        hook
        for part in policy.pipeline.denoisers.values()
        for hook in (part.register_forward_pre_hook(before), part.register_forward_hook(after))
    ]
    found = []
    try:
        with torch.no_grad():
            policy.velocity(0.5, x, condition)  # learns the pipeline, and fills caches
            for k in range(times):
                inside[0], start = 0.0, now()
                policy.velocity((k + 1) / (times + 1), x, condition)
                found.append((now() - start, inside[0]))
    finally:
        for hook in hooks:
            hook.remove()
    total, within = (statistics.median(part) for part in zip(*found, strict=True))
    return {
        "parameters": sum(p.numel() for p in policy.network.parameters()), "rows": rows, "seconds": total,
        "inside": within, "door": statistics.median(1 - b / a for a, b in found),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline")
    parser.add_argument("--prompts", required=True, help="file of prompts, of which the first is used")
    parser.add_argument("--rows", type=int, action="append", help="samples at once, repeatable [default: 1]")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = resolve_device("auto")
    model = f"diffusers:{given.pipeline}"
    how = Finetune(model=model, prompts=given.prompts)
    policy = Loader(device, "auto", how=how).load(model).policy
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": checkpoint.versions(),
        "rows": [door(policy, rows) for rows in given.rows or [1]],
    }
    for row in found["rows"]:
        print(
            f"{row['rows']} samples: {1000 * row['seconds']:.1f} ms a velocity, {100 * row['door']:.1f} % the door's"
        )
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
