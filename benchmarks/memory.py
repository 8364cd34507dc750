"""Peak memory of fine-tuning the CIFAR-10 U-Net, each way in a process of its own.

`python -m orwcfm_fast.benchmarks.memory --batch 16`: a short rollout and two gradient steps of the
plain loop, of ours in float32 and bfloat16, and with LoRA. `peak` is, on a GPU, what torch allocated at most, else the
process's largest resident set less what it held after its imports; `held` is weights, gradients, optimiser state and
copies of weights.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.benchmarks.plain_loop import PlainLoop, torchcfm_network
from orwcfm_fast.benchmarks.ways import CPU, LORA_RANK, bench_policy
from orwcfm_fast.errors import WorkError
from orwcfm_fast.method import noise
from orwcfm_fast.method.anchors import velocities
from orwcfm_fast.method.coupling import couple
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.networks.inference import InferenceCopy
from orwcfm_fast.networks.lora import add_lora, peft
from orwcfm_fast.settings import Finetune

WAYS = ("plain", "fp32", "bf16", "lora")
EVALUATIONS = 4  # their number does not change a rollout's peak


def peak_bytes(device: torch.device) -> int:
    """The most bytes that this process has held at once so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # a child process inherits getrusage's figure: that of a large parent would begin at its peak
    with suppress(OSError, IndexError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def plain(batch: int, device: torch.device) -> int:
    """Run the plain loop; the bytes that it holds."""
    policy = bench_policy("cifar10", "fp32")
    network = torchcfm_network(policy.model, policy.network.state_dict()).to(device)
    shape = policy.shape
    del policy
    loop = PlainLoop(network, lambda x: x.flatten(1).mean(1), shape, 1.0, 0.5, batch, EVALUATIONS)
    for _ in range(2):
        loop.step()
    loop.end_epoch()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    copies = [p for n in (network, loop.reference, loop.behaviour) for p in n.parameters()]
    return bytes_of([*copies, *grads, *optimizer_state(loop.optimizer)])


def ours(way: str, batch: int, device: torch.device) -> int:
    """Run our rollout and two steps; the bytes held, with those of the gradients, which are freed after each step."""
    policy = bench_policy("cifar10", "bf16" if way == "bf16" else "fp32", device)
    if way == "lora":
        add_lora(policy.network, Finetune(lora=LORA_RANK))
    s = Finetune(batch=batch, rollout=batch, solver="euler", nfe=EVALUATIONS)
    reference = policy.frozen_copy()
    learner = PolicyOptimizer(policy, s)
    inference = InferenceCopy(policy)
    seed = torch.tensor(0, device=device)
    for step in range(2):
        x1 = sample(inference.refresh(), start_noise(policy, batch, 0), s, batch).clone()
        index = noise.indices(step * batch, batch, device)
        drawn = couple(x1, torch.ones(batch, device=device), 1.0, seed, index)
        learner.step(replace(drawn, anchor=velocities(reference, drawn, learner.sizes)), seed)
    copies = [p for one in (policy, reference, inference.policy) for p in one.network.parameters()]
    return bytes_of([*copies, *optimizer_state(learner.optimizer)]) + bytes_of(learner.parameters)


def child(way: str, batch: int, device: torch.device) -> None:
    if way == "lora":
        peft()  # the library's own memory is not the step's
    before = peak_bytes(device)
    held = plain(batch, device) if way == "plain" else ours(way, batch, device)
    print(json.dumps({"way": way, "batch": batch, "peak": peak_bytes(device) - before, "held": held}))


def measure(batch: int, device: torch.device = CPU) -> list[dict[str, Any]]:
    """One row a way, with ratios to the plain loop."""
    rows: list[dict[str, Any]] = []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the child processes
    for way in WAYS:
        command = [sys.executable, "-m", "orwcfm_fast.benchmarks.memory", "--child", way]
        command += ["--batch", str(batch), "--device", str(device)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise WorkError(f"memory of {way} at batch {batch}: {done.stderr.strip().splitlines()[-1:]}")
        rows.append(json.loads(done.stdout))
        first = rows[0]
        rows[-1] |= {f"{k}_ratio": rows[-1][k] / first[k] for k in ("peak", "held")}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--child", choices=WAYS)
    parser.add_argument("--device", type=torch.device, default=CPU)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.batch, arguments.device)
        return
    rows = measure(arguments.batch, arguments.device)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
