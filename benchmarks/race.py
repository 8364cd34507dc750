"""Every method and the plain loop from the same pretrained model: reward by seconds, by drift and by diversity.

    orwcfm bench race                          short: those whose settings were chosen before, one seed, minutes
    orwcfm bench race --full --out FOLDER      equally many trials for each, then the chosen settings on other seeds
    orwcfm bench race-mnist                    from the MNIST model that ships, the settings for much reward soon

Settings are chosen on tuning seeds, once for much reward soon and once for much reward near the pretrained model; then
they run on seeds that nothing was chosen on. The plain loop has four times the seconds of the others (`PATIENCE`);
drift and confidence are everybody's at the common limit.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from orwcfm_fast.benchmarks import entrants
from orwcfm_fast.benchmarks.entrants import (
    AFTER,
    AT_DIVERSITY,
    AT_W2,
    FOR_REWARDS,
    GOALS,
    TRIALS,
    Look,
    Looks,
    Trial,
)
from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.device import device_name
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.runs.load import Loader

TUNED_ON, RUN_ON = (3, 4, 5), (0, 1, 2)
TUNING_SECONDS, SECONDS = 10.0, 30.0
TUNING_GROWTH, GROWTH = 1.7, 1.3


class Track(NamedTuple):
    """The race on one data set.

    Attributes:
        seconds: of the short form.
        growth, held_out: of the looks, see `Looks`.
        goals: those that are raced for.
    """

    seconds: float
    growth: float
    held_out: int
    goals: tuple[str, ...]


TRACKS = {
    "digits": Track(8.0, GROWTH, entrants.HELD_OUT, tuple(GOALS)),
    "mnist": Track(30.0, 2.0, 96, ("soon",)),  # a look takes as long as some steps
}
LATE = 1.1  # a look that was due at the limit comes after the step under way
# what the full form chose, in the newest benchmarks/results/race-digits-*.json
CHOSEN: dict[str, dict[str, Trial]] = {
    "orw-centred": {
        "soon": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.002, "alpha": 0.3, "tau": 2.0},
        "near": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.0005, "alpha": 1.0, "tau": 2.0},
    },
    "orw-centred, no anchor": {
        "soon": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.002, "alpha": 0.0, "tau": 2.0},
        "near": {"rollout": 512, "steps_per_round": 16, "batch": 64, "lr": 0.0005, "alpha": 0.0, "tau": 2.0},
    },
    "orw": {
        "soon": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.002, "alpha": 0.3, "tau": 2.0},
        "near": {"rollout": 512, "steps_per_round": 16, "batch": 64, "lr": 0.0005, "alpha": 1.0, "tau": 2.0},
    },
    "nft": {
        "soon": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.002, "nft_beta": 0.1},
        "near": {"rollout": 512, "steps_per_round": 16, "batch": 64, "lr": 0.0005, "nft_beta": 1.0},
    },
    "awm": {
        "soon": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.001, "kl": 0.001},
        "near": {"rollout": 512, "steps_per_round": 16, "batch": 64, "lr": 0.0005, "kl": 0.001},
    },
    "adrpo": {
        "soon": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.002, "adrpo_beta0": 1.0},
        "near": {"rollout": 512, "steps_per_round": 16, "batch": 64, "lr": 0.0005, "adrpo_beta0": 1.0},
    },
    "ram": {
        "soon": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.002, "ram_m": 0.5},
        "near": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.0005, "ram_m": 0.5},
    },
    "raft": {
        "soon": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.002, "raft_best_of": 4},
        "near": {"rollout": 512, "steps_per_round": 16, "batch": 64, "lr": 0.0005, "raft_best_of": 4},
    },
    "rwr": {
        "soon": {"rollout": 128, "steps_per_round": 4, "batch": 32, "lr": 0.002},
        "near": {"rollout": 512, "steps_per_round": 16, "batch": 64, "lr": 0.0005},
    },
    "plain": {
        "soon": {"batch": 32, "lr": 0.004, "alpha": 1.0, "tau": 2.0},
        "near": {"batch": 32, "lr": 0.002, "alpha": 1.0, "tau": 2.0},
    },
}


class Job(NamedTuple):
    """One run of one entrant."""

    name: str
    trial: Trial
    seed: int
    limit: float
    growth: float
    device: str
    data: str
    held_out: int


@cache
def _base(device: str, data: str) -> Policy:
    precision = "auto" if device.startswith("cuda") else {"digits": "fp32", "mnist": "bf16"}[data]
    loader = Loader(torch.device(device), precision)
    return loader.default().policy if data == "digits" else loader.load("unet-mnist-small").policy


def _run(job: Job, base: Policy | None = None) -> list[Look]:
    own, clock = base or _base(job.device, job.data), entrants.clock_of(torch.device(job.device))

    def looks(policy: Policy) -> Looks:
        return Looks(policy, own, job.seed, job.limit, job.growth, clock, job.held_out)

    return entrants.run(job.name, own, job.trial, job.seed, looks)


def run_all(jobs: Sequence[Job], base: Policy | None, watch: Callable[[str], None]) -> list[list[Look]]:
    """Every job's looks; on a CPU as many at once as it has cores, with a thread each, unless the base is given."""
    found: list[list[Look]] = []
    if base or jobs[0].device.startswith("cuda"):
        return _watched(jobs, (_run(job, base) for job in jobs), watch, found)
    _base(jobs[0].device, jobs[0].data)  # cached on disk before others look for it
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return _watched(jobs, pool.map(_run, jobs), watch, found)


def _watched(jobs, runs, watch, found):
    for k, (job, looks) in enumerate(zip(jobs, runs, strict=True), 1):
        found.append(looks)
        watch(f"{k} of {len(jobs)}: {job.name}")
    return found


def race(
    full: bool = False,
    watch: Callable[[str], None] = lambda text: None,
    device: torch.device | None = None,
    data: str = "digits",
    seconds: float = 0.0,
    names: Sequence[str] = (),
    held_out: int = 0,
    base: Policy | None = None,
) -> dict[str, Any]:
    """The race, full or short.

    Args:
        watch: told of every run that is over.
        data: digits; mnist in the short form, where the plain loop has no network of its own.
        seconds: of each run; 0: SECONDS, in the short form those of the data.
        names: of the entrants; where empty all, in the short form those whose settings were chosen.
        held_out: samples of each look; 0: those of the data.
        base: start from this model instead of the pretrained one.

    Returns:
        date, device, versions, seconds by the clock on the wall, the trials and the settings chosen, and a row for
        every entrant and goal.
    """
    track, began = TRACKS[data], time.perf_counter()
    where = (str(device or "cpu"), data, held_out or track.held_out, base)
    names = names or [name for name in (TRIALS if full else CHOSEN) if data == "digits" or name != "plain"]
    chosen, trials = choose(names, where, watch) if full else ({name: _settings(name) for name in names}, [])
    limit, seeds = seconds or (SECONDS if full else track.seconds), RUN_ON if full else RUN_ON[:1]
    plan = [(n, t) for n in names for t in {repr(t): t for t in (chosen[n][g] for g in track.goals)}.values()]
    runs = _runs(plan, seeds, (limit, track.growth), where, lambda text: watch(f"racing, {text}"))
    rows = [
        {
            "name": n, "goal": goal, "trial": t, **measures(r, limit, data),
            "runs": [[asdict(x) for x in one] for one in r],
        }
        for goal in track.goals
        for (n, t), r in zip(plan, runs, strict=True)
        if chosen[n][goal] == t
    ]  # fmt: skip
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(torch.device(where[0])),
        "versions": checkpoint.versions(), "wall_seconds": round(time.perf_counter() - began),
        "data": data, "reward": entrants.REWARD, "limit": limit, "seeds": [*seeds], "tuned_on": [*TUNED_ON],
        "chosen": chosen, "trials": trials, "rows": rows,
    }  # fmt: skip


def choose(names: Sequence[str], where: tuple, watch: Callable[[str], None]):
    """({name: {goal: trial}}, every trial with what it scored for each goal, a mean over the tuning seeds)."""
    plan = [(name, trial) for name in names for trial in TRIALS[name]]
    pace = (TUNING_SECONDS, TUNING_GROWTH)
    runs = _runs(plan, TUNED_ON, pace, where, lambda text: watch(f"choosing settings, {text}"))
    trials: list[dict[str, Any]] = [
        {
            "name": name,
            "trial": trial,
            **{g: statistics.mean(of(x, _patience(name) * TUNING_SECONDS) for x in own) for g, of in GOALS.items()},
        }
        for (name, trial), own in zip(plan, runs, strict=True)
    ]  # fmt: skip
    chosen = {
        name: {goal: max((t for t in trials if t["name"] == name), key=lambda t: t[goal])["trial"] for goal in GOALS}
        for name in names
    }  # fmt: skip
    return chosen, trials


def _runs(plan, seeds, pace, where, watch) -> list[list[list[Look]]]:
    """The runs of every (name, trial), a list over the seeds for each; pace: limit and growth of `Looks`."""
    (limit, growth), (*same, base) = pace, where
    jobs = [Job(n, t, seed, _patience(n) * limit, growth, *same) for n, t in plan for seed in seeds]
    runs = run_all(jobs, base, watch)
    return [runs[k : k + len(seeds)] for k in range(0, len(runs), len(seeds))]


def _settings(name: str) -> dict[str, Trial]:
    """Chosen, else the first that would be tried."""
    return CHOSEN.get(name) or dict.fromkeys(GOALS, TRIALS[name][0])


def _patience(name: str) -> float:
    return entrants.PATIENCE.get(name, 1.0)


def measures(runs: Sequence[Sequence[Look]], limit: float, data: str = "digits") -> dict[str, Any]:
    """Of the runs of one entrant: each measure as [mean, twice its standard error over the seeds].

    Seconds and rewards after seconds are of the whole runs, the others of the looks up to the limit. seconds_to: the
    median of the seeds; None where fewer than half of them came there.
    """
    early = [[look for look in looks if look.seconds <= LATE * limit] for looks in runs]
    found: dict[str, Any] = {"seconds_to": {}}
    for reward in FOR_REWARDS:
        times = [entrants.seconds_to(looks, reward) for looks in runs]
        median = statistics.median(math.inf if t is None else t for t in times)
        found["seconds_to"][f"{reward:g}"] = None if median == math.inf else median
    of: dict[str, tuple[Sequence[float], Callable[[Sequence[Look], float], float], Any]] = {
        "reward_after": ([s for s in AFTER if s <= limit], entrants.reward_after, runs),
        "reward_at_w2": (AT_W2[data], entrants.reward_at_w2, early),
        "reward_at_diversity": (AT_DIVERSITY, entrants.reward_at_diversity, early),
    }
    for key, (levels, read, looks) in of.items():
        found[key] = {f"{level:g}": _interval(read(own, level) for own in looks) for level in levels}
    for key in ("reward", "w2", "confidence"):
        found[key] = _interval(getattr(looks[-1], key) for looks in early)
    found["diversity"] = _interval(looks[-1].diversity / looks[0].diversity for looks in early)
    return found


def _interval(values: Iterable[float]) -> list[float]:
    """Mean, and twice its standard error; 0 for a single value."""
    own = list(values)
    return [statistics.mean(own), 2 * statistics.stdev(own) / len(own) ** 0.5 if len(own) > 1 else 0.0]
