"""Seconds to a wanted reward, ours against the plain loop: `python -m orwcfm_fast.benchmarks.race --out FILE.json`.

The same pretrained digits model, reward, α, τ, raw weights, seed and device. Each loop is looked at every four
gradient steps on 256 held-out samples, with the clock stopped; it is there at the first of three looks in a row that
reach the reward. Then drift and confidence are measured on the same noise.

`--tune` chooses the settings of both, from the same number of trials each, on seeds that the race does not use: those
with the least median seconds of processor time.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.benchmarks.plain_loop import PlainLoop, torchcfm_network
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.device import device_name
from orwcfm_fast.evaluation.drift import coupled_w2
from orwcfm_fast.method.callbacks import Progress, ReportProgress
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.rewards.digits import digit_classifier
from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Finetune, Sampling

Clock = Callable[[], float]
WALL = time.perf_counter
CPU = torch.device("cpu")
ALPHA, TAU, GOAL, HELD_OUT, IN_A_ROW = 1.0, 2.0, 0.65, 256, 3
EPOCH = 24  # plain steps between hard copies
EVERY = 4  # gradient steps between looks
TUNED_ON = (3, 4, 5)
# the best of --tune; the race is run on other seeds
OURS: dict[str, Any] = dict(rollout=128, nfe=8, steps_per_round=4, batch=32, lr=1e-3)
PLAIN: dict[str, Any] = dict(batch=16, lr=1e-3)
SHORT: dict[str, Any] = dict(warmup=2, cooldown=0.9, probe=2)
TRIALS: dict[str, list[dict[str, Any]]] = {
    "ours": [
        dict(rollout=rollout, nfe=nfe, steps_per_round=steps, batch=batch, lr=lr)
        for rollout, batch in ((64, 32), (128, 32), (128, 64))
        for nfe, steps in ((8, 4), (8, 8))
        for lr in (1e-3, 2e-3)
    ],
    "plain": [dict(batch=n, lr=lr) for n in (8, 16, 32, 64) for lr in (5e-4, 1e-3, 2e-3)],
}


@dataclass
class Finish:
    """seconds to the goal (None: not in time); the rest, gradient steps too, at the last look."""

    way: str
    seed: int
    seconds: float | None
    steps: int
    reward: float
    w2_coupled: float
    confidence: float


class Looks:
    """A clock that stops while the samples are looked at."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy,
        seed: int,
        limit: float,
        clock: Clock = WALL,
    ) -> None:
        self.clock = clock
        self.policy, self.seed, self.limit = policy, seed, limit
        self.reward, self.classifier = make_reward("even-digits"), digit_classifier()
        self.x0 = start_noise(policy, HELD_OUT, seed + 1000)
        self.x_ref = sample(reference, self.x0, Sampling(), HELD_OUT)
        self.running = 0.0
        self.seen: list[tuple[float, float]] = []
        self.began = self.clock()

    def look(self) -> bool:
        """Whether the race is over."""
        if self.x0.is_cuda:
            torch.cuda.synchronize()  # steps that are queued count too
        self.running += self.clock() - self.began
        self.x = sample(self.policy, self.x0, Sampling(), HELD_OUT)
        self.seen.append((self.running, float(self.reward(self.policy.decode(self.x)).mean())))
        over = self.there() is not None or self.running > self.limit
        self.began = self.clock()
        return over

    def there(self) -> float | None:
        last = self.seen[-IN_A_ROW:]
        return last[0][0] if len(last) == IN_A_ROW and all(r >= GOAL for _, r in last) else None

    def finish(self, way: str, steps: int) -> Finish:
        confidence = float(self.classifier.probabilities(self.policy.decode(self.x)).max(1).values.mean())
        drift = coupled_w2(self.x, self.x_ref)
        return Finish(way, self.seed, self.there(), steps, self.seen[-1][1], drift, confidence)


def race_plain(base: Policy, seed: int, limit: float, clock: Clock = WALL, **change: Any) -> Finish:
    """The paper's loop from the same weights."""
    torch.manual_seed(seed)
    network = torchcfm_network(base.model, base.network.state_dict()).to(base.device)
    loop = PlainLoop(network, make_reward("even-digits"), base.shape, ALPHA, TAU, **PLAIN | change)
    looks = Looks(Policy(network, base.shape, base.model, base.data), base, seed, limit, clock)
    for step in range(1, 100_000):
        loop.step()
        if step % EPOCH == 0:
            loop.end_epoch()
        if step % EVERY == 0 and looks.look():
            break
    return looks.finish("plain", step)


class Over(Exception):
    """The goal is reached in the middle of a round."""


def race_ours(way: str, base: Policy, seed: int, limit: float, clock: Clock = WALL, **change: Any) -> Finish:
    """`finetune`'s trainer, in rounds short enough for a few minutes."""
    policy = base.trainable_copy()
    own = {"alpha": ALPHA, "tau": TAU, "seed": seed, "normalize_weights": False}
    s = Finetune(**SHORT | OURS | own | change)
    steps = 0

    def watch(progress: Progress) -> None:
        nonlocal steps
        if progress.stage == "step":  # of which `progress.step` are done in this round
            steps = progress.round * s.steps_per_round + progress.step
            if steps and steps % EVERY == 0 and looks.look():
                raise Over

    trainer = build_trainer(
        policy, make_reward("even-digits"), s, reference=base, callbacks=[ReportProgress(watch)]
    )
    looks = Looks(policy, base, seed, limit, clock)
    try:
        for _ in trainer.train(1000):
            pass
    except Over:
        pass
    return looks.finish(way, steps)


def tune(limit: float) -> dict[str, Any]:
    """Every trial of both loops on the tuning seeds, the best first."""
    base = Loader(CPU, "fp32").default().policy

    def seconds(name: str, trial: dict[str, Any], seed: int) -> float:
        if name == "plain":
            found = race_plain(base, seed, limit, time.process_time, **trial)
        else:
            found = race_ours(name, base, seed, limit, time.process_time, **trial)
        return found.seconds or limit

    made: dict[str, Any] = {"seeds": TUNED_ON, "limit": limit, "versions": checkpoint.versions()}
    for name, trials in TRIALS.items():
        rows = [{**trial, "seconds": [seconds(name, trial, seed) for seed in TUNED_ON]} for trial in trials]
        made[name] = sorted(rows, key=lambda row: statistics.median(row["seconds"]))
    return made


def race(seeds: int, limit: float, device: torch.device = CPU) -> dict[str, Any]:
    """Ours in both precisions and the plain loop, alternating, seed by seed."""
    bases = {p: Loader(device, p).default().policy for p in ("fp32", "bf16")}
    finishes, ratios = [], defaultdict[str, list[float]](list)
    for seed in range(seeds):
        ours = [race_ours(f"ours, {p}", base, seed, limit) for p, base in bases.items()]
        plain = race_plain(bases["fp32"], seed, limit)
        finishes += [*ours, plain]
        for one in ours:  # one that is not there in time counts as if it were at the limit
            ratios[one.way].append((plain.seconds or limit) / (one.seconds or limit))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": checkpoint.versions(),
        "goal": GOAL, "alpha": ALPHA, "tau": TAU, "limit": limit, "ours": OURS, "plain": PLAIN,
        "ratios": {way: statistics.median(found) for way, found in ratios.items()},
        "finishes": [asdict(f) for f in finishes],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds a loop may run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true", help="choose the settings instead of racing")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found = tune(arguments.limit) if arguments.tune else race(arguments.seeds, arguments.limit)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
