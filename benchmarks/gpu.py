"""What only a GPU can show, part by part: `python -m orwcfm_fast.benchmarks.gpu --out DIR`, or benchmarks/gpu.sh.

Each part writes <name>.json as soon as it is done; one that fails writes its error and the next one runs.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.benchmarks import cases, kernels, loop
from orwcfm_fast.benchmarks.clock import copying, seconds_of
from orwcfm_fast.benchmarks.race import race
from orwcfm_fast.benchmarks.ways import alternate, bench_policy, forward_flop, matrix_rate
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.device import device_name
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Finetune

GPU_TESTS = ("tests/kernels", "tests/method", "-m", "gpu")


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the dry run's are a CPU's."""

    device: torch.device
    copied: int
    shapes: tuple[tuple[int, ...], ...]
    maps: tuple[tuple[int, ...], ...]
    data: str
    batches: tuple[int, ...]
    rollout: int
    repeats: int
    round: dict[str, Any]
    race: dict[str, Any]
    test_arguments: tuple[str, ...]
    pretrained: bool = True  # the digits model; else it is as initialised


def sizes(dry: bool) -> Sizes:
    if dry:
        small: dict[str, Any] = dict(rollout=8, batch=4, steps_per_round=2, nfe=4, probe=2, eval_n=8)
        shapes: tuple[tuple[int, ...], ...] = ((4, 1, 8, 8), (2, 3, 32, 32))
        collected = (*GPU_TESTS, "--collect-only")
        return Sizes(
            torch.device("cpu"), 2**20, shapes, ((2, 32, 8, 8),), "digits", (2,), 4, 1, small,
            dict(seconds=0.5, held_out=4), collected, pretrained=False,
        )  # fmt: skip
    shapes = (cases.DIGITS, cases.CIFAR, (16, 16, 128, 128), (2**28 // (3072 * 4), 3, 32, 32))
    maps = ((128, 128, 32, 32), (128, 256, 16, 16), (128, 384, 32, 32))
    return Sizes(
        torch.device("cuda"), 2**28, shapes, maps, "cifar10", (64, 128, 512), 512, 3, {},
        dict(seconds=8.0), GPU_TESTS,
    )  # fmt: skip


def digits_model(s: Sizes, precision: str) -> Policy:
    if s.pretrained:
        return Loader(s.device, precision).default().policy
    return bench_policy("digits", precision, s.device)


def machine(s: Sizes) -> dict[str, Any]:
    """Versions, and the ceilings: bytes a second of a copy, FLOP/s of matrix products and convolutions."""
    copy = seconds_of(copying(s.copied, s.device), s.device)
    return {
        "copy_gb_per_s": s.copied / copy / 1e9,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        **{f"matrix_{d}": matrix_rate(getattr(torch, d), s.device) for d in ("bfloat16", "float32")},
    }


def gpu_tests(s: Sizes) -> dict[str, Any]:
    """Exit code of the tests that need a GPU, and the end of what they print."""
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *s.test_arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"exit_code": done.returncode, "output": (done.stdout + done.stderr)[-4000:]}


def ops(s: Sizes) -> dict[str, Any]:
    """Every op in bf16 and fp32: eager, compiled, compiled with the gradient by hand, ours."""
    samples = [op for op in cases.OPS if not cases.OPS[op].maps]
    chosen = [cases.Case(op, d, shape) for shape in s.shapes for d in ("bf16", "fp32") for op in samples]
    chosen += [cases.Case("group_norm_silu", d, shape) for shape in s.maps for d in ("bf16", "fp32")]
    return kernels.run(s.device, compiled=s.device.type == "cuda", training_step=False, chosen=chosen)


def steps(s: Sizes) -> dict[str, Any]:
    """Samples a second trained on, each way, at each batch size."""
    found = {}
    for batch in s.batches:
        ready = loop.LoopBenchmark(s.data, batch, 0.03, s.device)
        found[str(batch)] = alternate(ready.trainings(), s.repeats, s.device)
    return found


def rollouts(s: Sizes) -> dict[str, Any]:
    """Samples a second drawn, each way, and FLOP of a forward pass of one sample."""
    ready = loop.LoopBenchmark(s.data, s.rollout, 0.03, s.device)
    flop = forward_flop(ready.policies["fp32"])
    return {
        "flop": flop,
        "nfe": ready.settings.nfe,
        "rates": alternate(ready.rollouts(), s.repeats, s.device),
    }


def rounds(s: Sizes) -> dict[str, Any]:
    """Seconds of a second round of digits, and of the network of `data`, by phase; what was replayed from graphs."""
    found: dict[str, Any] = {}
    policies = {"digits": digits_model(s, "auto"), s.data: bench_policy(s.data, "auto", s.device)}
    for name, policy in policies.items():
        policy = policy.trainable_copy()
        trainer = build_trainer(policy, lambda x: x.flatten(1).mean(1), Finetune(**s.round, graph="auto"))
        records = [*trainer.train(2)]
        found[name] = {k: v for k, v in records[1].items() if k.startswith(("seconds_", "images_per_s_"))}
        if trainer.graphs:
            choices = trainer.graphs.choices
            found[name]["graphs"] = {"chosen": choices.chosen, "seconds": choices.seconds}
    return found


def race_on_digits(s: Sizes) -> dict[str, Any]:
    """The default method and the plain loop, one seed."""
    own = None if s.pretrained else digits_model(s, "fp32")
    return race(device=s.device, names=("orw-centred", "plain"), base=own, **s.race)


PARTS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "1-machine": machine,
    "2-tests": gpu_tests,
    "3-ops": ops,
    "4-steps": steps,
    "5-rollouts": rollouts,
    "6-rounds": rounds,
    "7-race": race_on_digits,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="every part on the CPU, with tiny sizes")
    arguments = parser.parse_args()
    if not (arguments.dry_run or torch.cuda.is_available()):
        parser.error("no NVIDIA GPU here; try --dry-run")
    if arguments.dry_run:
        torch.set_num_threads(1)  # of so small tensors, on a machine that may do other things
    run(arguments.out, sizes(arguments.dry_run))


def run(out: Path, s: Sizes, parts: dict[str, Callable[[Sizes], dict[str, Any]]] = PARTS) -> None:
    """Run the parts in order; none voids another."""
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        began = time.perf_counter()
        head = {"device": device_name(s.device), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            found = part(s)
        except Exception:
            found = {"error": traceback.format_exc()}
        seconds = time.perf_counter() - began
        result = {**head, "versions": checkpoint.versions(), "seconds": seconds, **found}
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {'failed' if 'error' in found else 'done'} in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
