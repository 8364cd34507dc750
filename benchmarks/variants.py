"""What was tried beside the loop as it is, each change by itself: `python -m orwcfm_fast.benchmarks.variants --out F`.

Digits, default sizes, on tuning seeds, which no other figure uses: reward, drift and confidence on held-out noise. A
change that does not pay stays here and out of the loop. Runs that F holds already are not repeated.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from orwcfm_fast.benchmarks.methods import CPU, Bench, run
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.device import device_name
from orwcfm_fast.method import coupling, noise
from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.method.minibatches import Minibatches
from orwcfm_fast.method.step import PolicyOptimizer

TUNED_ON = (3, 4, 5)
Change = Callable[[], AbstractContextManager[Any]]


def times(of: Callable[[Tensor], Tensor]) -> Change:
    """t = of(u) of a uniform number u, in place of √u."""

    def drawn(x1: Tensor, seed: Tensor, index: Tensor, late: bool) -> tuple[Tensor, Tensor]:
        t = of(noise.uniform((), seed, index, noise.T))
        x0 = noise.normal(tuple(x1.shape[1:]), seed, index, noise.X0)
        return torch.lerp(x0, x1.float(), t.view(-1, *[1] * (x1.dim() - 1))), t

    return lambda: patch.object(coupling, "interpolate_at_random_times", drawn)


@contextmanager
def averaged_steps() -> Iterator[None]:
    """The policy of a round is the mean of its weights over the round's second half."""
    taken = PolicyOptimizer.step
    means: list[Tensor] = []

    def step(self: PolicyOptimizer, batch: Batch, seed: Tensor) -> Tensor:
        found, of = taken(self, batch, seed), self.settings.steps_per_round
        k = (self.schedule.last_epoch - 1) % of - of // 2
        if k >= 0:
            with torch.no_grad():
                if k == 0:
                    means[:] = [p.clone() for p in self.parameters]
                for mean, p in zip(means, self.parameters, strict=True):
                    mean.lerp_(p, 1 / (k + 1))
                    if k == of - of // 2 - 1:
                        p.copy_(mean)
        return found

    with patch.object(PolicyOptimizer, "step", step):
        yield


@contextmanager
def two_draws() -> Iterator[None]:
    """Each minibatch holds half as many samples, each with two times and noises."""
    made = Minibatches.__init__

    def init(self: Minibatches, *args: Any) -> None:
        made(self, *args)
        self.order = self.order.repeat_interleave(2)[: len(self.order)]

    with patch.object(Minibatches, "__init__", init):
        yield


@contextmanager
def value_head() -> Iterator[None]:
    """Baseline E[w | x_t] by a small network, in place of the mean weight: w − g(t, x_t) on u, g on v_old.

    Both have one minimiser, since E[u | x_t] is v_old under the policy; where g is right the noise is less.
    """
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(65, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)

    def at(batch: Batch) -> Tensor:
        return 1 + head(torch.cat([batch.t[:, None] * 2 - 1, batch.x_t.flatten(1)], 1))[:, 0]

    made, picked = Minibatches.__init__, Minibatches.__getitem__

    def init(self: Minibatches, *args: Any) -> None:
        made(self, *args)
        n = len(self.signal)
        for k in range(300):  # on draws of other noise than the steps'
            pick = torch.randint(n, (256,))
            index = noise.indices((1 << 40) + (self.number * 300 + k) * 256, 256, CPU)
            batch = coupling.couple(self.rollout.x1[pick], self.signal[pick], 0, self.seed, index)
            optimizer.zero_grad()
            (at(batch) - batch.w / self.mean).square().mean().backward()
            optimizer.step()

    def get(self: Minibatches, k: int) -> Batch:
        batch = picked(self, k)
        assert batch.b is not None
        with torch.no_grad():
            g = at(batch).clamp_min(0)
        return replace(batch, w=batch.w + batch.b - g, b=g)

    with patch.multiple(Minibatches, __init__=init, __getitem__=get):
        yield


UNIFORM = {"times": "uniform"}

VARIANTS: dict[str, tuple[Change, dict[str, Any]]] = {
    "as it is": (nullcontext, {}),
    "t of density 2(1 - t)": (times(lambda u: 1 - u.sqrt()), {}),
    "uniform t": (nullcontext, UNIFORM),
    "uniform t, lr 5e-4": (nullcontext, {**UNIFORM, "lr": 5e-4}),
    "uniform t, mean of the last half": (averaged_steps, UNIFORM),
    "uniform t, mean of the last half, no cooldown": (averaged_steps, {**UNIFORM, "cooldown": 0.0}),
    "uniform t, two draws of a sample": (two_draws, UNIFORM),
    "uniform t, value head": (value_head, UNIFORM),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="[default: all]")
    parser.add_argument("--alpha", type=float, action="append", required=True)
    parser.add_argument("--seeds", type=int, default=len(TUNED_ON))
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
    for seed, alpha, name in product(TUNED_ON[: given.seeds], given.alpha, given.variant or VARIANTS):
        this = {"variant": name, "alpha": alpha, "tau": 0.5, "seed": seed}
        if any(this.items() <= row.items() for row in found["runs"]):
            continue
        changed, more = VARIANTS[name]
        with changed():
            row = run(bench, method="orw-centred", alpha=alpha, tau=0.5, rounds=8, seed=seed, **more)
        found["runs"].append(this | row)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        after = row["after"]
        print(
            f"{name}, α={alpha:g}, seed {seed}: reward {after['reward'][0]:.3f}, W2 {after['w2_coupled']:.2f}, "
            f"confidence {after['confidence']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
