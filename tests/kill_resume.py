"""kill -9 at random moments, resume, compare bit for bit. Run by test_kill_resume.py, or by hand:

    python tests/kill_resume.py --all --folder /tmp/runs --out benchmarks/results/kill-resume.json

One parent imports everything once and forks a process for each run, so that a trial costs a second; some trials
start processes of their own as a user would. A byte shared with the child says what it was at when it was killed.
"""

import argparse
import contextlib
import functools
import io
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ORWCFM = Path(sys.executable).with_name("orwcfm")
TIMED = ("seconds", "images_per_s")
PLACES = (
    "elsewhere",
    "rollout",
    "reward",
    "anchors",
    "step",
    "measure",
    "record",
    "checkpoint",
    "evaluation",
    "start-up",
)
SMALL = ("--nfe", "6", "--chunk", "64", "--batch", "32", "--eval-n", "32", "--probe", "16", "--quiet")


@dataclass(frozen=True)
class Kind:
    """A run to be killed: its command without --out, and how many of the 200 trials are of its kind."""

    name: str
    trials: int
    command: tuple[str, ...]
    quick: bool = False  # in the normal suite
    fresh: bool = False  # processes of their own, imports and all


def finetune(base: str, *more: str) -> tuple[str, ...]:
    return ("finetune", "--checkpoint", base, *SMALL, *more)


KINDS = (
    Kind("mlp", 90, finetune("mlp", "--rollout", "256", "--rounds", "3", "--steps-per-round", "16"), quick=True),
    Kind("mlp, steered and guarded", 20, finetune("mlp", "--rollout", "128", "--rounds", "4", "--steps-per-round", "8",
                                                  "--target-w2", "0.3", "--guard", "rollback")),
    Kind("mlp, ot", 20, finetune("mlp", "--rollout", "128", "--rounds", "4", "--steps-per-round", "8",
                                 "--coupling", "ot", "--method", "orw", "--save-every", "2")),
    Kind("unet-digits", 30, finetune("unet", "--rollout", "64", "--rounds", "3", "--steps-per-round", "4"), quick=True),
    Kind("pretrain mlp", 20, ("pretrain", "--data", "moons", "--steps", "200", "--batch", "64", "--save-every", "50",
                              "--quiet"), quick=True),
    Kind("pretrain unet-digits", 10, ("pretrain", "--data", "digits", "--steps", "50", "--batch", "8",
                                      "--save-every", "25", "--quiet")),
    Kind("mlp, processes of their own", 10, finetune("mlp", "--rollout", "256", "--rounds", "20",
                                                     "--steps-per-round", "16"), fresh=True),
)  # fmt: skip


class Place:
    """What a forked run is doing, in memory that its parent sees: a byte for each of its threads."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 2)

    def read(self) -> str:
        training, writing = self._shared[:2]
        return PLACES[writing or training]

    def within(self, place: str, owner: object, name: str) -> None:
        original, number = getattr(owner, name), PLACES.index(place)

        @functools.wraps(original)
        def told(*args, **more):
            thread = int(threading.current_thread() is not threading.main_thread())
            before, self._shared[thread] = self._shared[thread], number
            try:
                return original(*args, **more)
            finally:
                self._shared[thread] = before

        setattr(owner, name, told)

    def clear(self) -> None:
        self._shared[:2] = bytes(2)

    def watch(self) -> None:
        """Tell the place in every part of the loop; what they do is left alone."""
        from orwcfm_fast import rewards
        from orwcfm_fast.checkpoints import checkpoint
        from orwcfm_fast.method import pretrain, step, trainer
        from orwcfm_fast.runs import finetune_run, pretrain_run, run

        self.within("start-up", finetune_run.Finetuning, "prepare")
        self.within("start-up", pretrain_run.PretrainRun, "new")
        self.within("rollout", trainer, "draw")
        self.within("reward", rewards.RewardSum, "scores")
        self.within("anchors", trainer.Trainer, "anchors")
        self.within("step", step.PolicyOptimizer, "step")
        self.within("step", pretrain.Pretrainer, "step")
        self.within("measure", trainer.Trainer, "measure")
        self.within("record", run.Run, "append")
        self.within("checkpoint", checkpoint, "save")
        self.within("evaluation", finetune_run.Finetuning, "finish")


def start(kind: Kind, args: tuple[str, ...], log: Path) -> int:
    """Begin `orwcfm *args` in the current folder; its process id."""
    if kind.fresh:
        with log.open("ab") as file:
            return subprocess.Popen([ORWCFM, *args], stdout=file, stderr=file).pid
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from orwcfm_fast.cli import load_app

        load_app()(list(args))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_to_end(kind: Kind, args: tuple[str, ...], log: Path) -> tuple[int, float]:
    began = time.perf_counter()
    _, status = os.waitpid(start(kind, args, log), 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - began


def run_killed(kind: Kind, args: tuple[str, ...], log: Path, after: float) -> bool:
    """kill -9 after so many seconds; whether it was still running."""
    child = start(kind, args, log)
    time.sleep(after)
    if os.waitpid(child, os.WNOHANG)[0]:
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def difference(whole: Path, other: Path) -> str:
    """The first way in which two finished runs differ; empty where every bit is the same."""
    steps = [sorted(p.name for p in (run / "checkpoints").glob("step_*")) for run in (whole, other)]
    if steps[0] != steps[1]:
        return f"checkpoints {steps[0]} and {steps[1]}"
    for step in steps[0]:
        for file in (whole / "checkpoints" / step).glob("*.safetensors"):
            if file.read_bytes() != (other / "checkpoints" / step / file.name).read_bytes():
                return f"{step}/{file.name}"
    records = [
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (whole, other)
    ]
    if records[0] != records[1]:
        return "metrics.jsonl"
    pictures = [{p.name: p.read_bytes() for p in (run / "samples").iterdir()} for run in (whole, other)]
    if pictures[0] != pictures[1]:
        return "samples"
    if (whole / "summary.json").exists():
        ends = [json.loads((run / "summary.json").read_text()) for run in (whole, other)]
        if any(ends[0][k] != ends[1][k] for k in ("before", "after", "best", "rounds")):
            return "summary.json"
    return ""


@dataclass
class Tally:
    """What came of the trials."""

    trials: int = 0
    equal: int = 0
    kills: int = 0
    kinds: Counter = field(default_factory=Counter)
    killed_in: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def trial(kind: Kind, whole: Path, seconds: float, dice: random.Random, place: Place, tally: Tally) -> None:
    """One run, killed once or more, resumed each time, compared at its end."""
    run, log = Path("trial"), Path("trial.log")
    shutil.rmtree(run, ignore_errors=True)
    log.unlink(missing_ok=True)
    begin, resume = (*kind.command, "--out", str(run)), (kind.command[0], "--resume", str(run), "--quiet")
    # a fresh process spends its first seconds on imports, where nothing can be lost
    earliest = 0.6 * seconds if kind.fresh else 0.0
    place.clear()
    while not run_killed(kind, begin, log, dice.uniform(earliest, seconds)):
        shutil.rmtree(run)
    while True:
        tally.kills += 1
        tally.killed_in["in a process of its own" if kind.fresh else place.read()] += 1
        place.clear()
        args = resume if (run / "config.toml").exists() else begin
        if dice.random() > 0.25 or not run_killed(kind, args, log, dice.uniform(earliest, seconds)):
            break
    code, _ = run_to_end(kind, resume if (run / "config.toml").exists() else begin, log)
    # a run killed in the last lines of its last process had nothing left to do
    finished = code == 2 and "already finished" in log.read_text()
    found = "" if code == 0 or finished else f"exit code {code}: {log.read_text().strip()[-300:]}"
    found = found or difference(whole, run)
    tally.trials += 1
    tally.kinds[kind.name] += 1
    if found:
        tally.failures.append(f"{kind.name}, trial {tally.trials}: {found}")
    else:
        tally.equal += 1


def import_all() -> None:
    """What every child would else import."""
    import matplotlib.figure  # noqa: F401
    import ot  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401  (torch's optimisers ask for it)

    from orwcfm_fast.runs import (
        pretrain_run,  # noqa: F401
    )


def warm_up(models: list[str]) -> None:
    """What every child would else do first: fonts, the classifier; no backward, which may start threads."""
    from orwcfm_fast.cli import load_app

    for model in models:
        for command in ("sample", "evaluate"):
            with contextlib.redirect_stdout(io.StringIO()):
                load_app()([command, model, "-n", "8", "--nfe", "4", "--quiet"], standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="200 trials; else one of each quick kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="empty, for the runs")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    out = options.out and options.out.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(options.folder)
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    from orwcfm_fast.checkpoints.checkpoint import versions

    base = Kind("base", 0, ())
    place, dice, tally, began = Place(), random.Random(options.seed), Tally(), time.perf_counter()
    bases = {"mlp": "two-gaussians", "unet": "digits"}
    import_all()
    for name, data in bases.items():
        args = ("pretrain", "--data", data, "--steps", "40", "--batch", "32", "--out", name, "--quiet")
        code, _ = run_to_end(base, args, Path("base.log"))
        assert code == 0, Path("base.log").read_text()
    warm_up([*bases])
    place.watch()
    for kind in KINDS if options.all else [k for k in KINDS if k.quick]:
        whole = Path(f"whole {kind.name}")
        code, seconds = run_to_end(kind, (*kind.command, "--out", str(whole)), Path("whole.log"))
        assert code == 0, Path("whole.log").read_text()
        for _ in range(kind.trials if options.all else 1):
            trial(kind, whole, seconds, dice, place, tally)
        print(
            f"{kind.name}: {tally.equal} of {tally.trials} equal so far",
            *tally.failures,
            sep="\n",
            flush=True,
        )
    result = {
        "what": "runs killed by kill -9 at random moments and resumed to the end, against uninterrupted ones: "
        "checkpoints, metrics but seconds, pictures and measures of samples, bit for bit",
        "trials": tally.trials,
        "equal": tally.equal,
        "kills": tally.kills,
        "by_kind": dict(tally.kinds),
        "killed_in": dict(tally.killed_in),
        "failures": tally.failures,
        "seed": options.seed,
        "device": "cpu",
        "seconds": round(time.perf_counter() - began),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
