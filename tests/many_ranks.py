"""Ranks as torchrun would start them, forked from one process that has imported everything: a launch takes a second.

Run by the fixture `launch`: a JSON line on standard input for a launch, one on standard output when it has ended.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

PRELOADED = (
    "jinja2", "matplotlib.pyplot", "ot", "torch._dynamo", "orwcfm_fast.kernels.anchored_residual",
    "orwcfm_fast.distributed",
    "orwcfm_fast.rewards.digits", "orwcfm_fast.runs.finetune_run", "orwcfm_fast.theory.forecast",
)  # fmt: skip
SMALL = ("--rollout", 50, "--chunk", 8, "--batch", 18, "--steps-per-round", 4, "--nfe", 6, "--eval-n", 16)
LOOP = ("finetune", "--checkpoint", "base", *SMALL, "--probe", 6, "--rounds", 3, "--quiet", "--out")
SEEN: dict[str, Any] = {}  # what `loop` writes
LIMIT = 250  # seconds until a rank that still runs is ended by a signal


def base(run_cli, data: str = "moons", steps: int = 60) -> None:
    made = run_cli("pretrain", "--data", data, "--steps", steps, "--batch", 32, "--out", "base", "--quiet")
    assert made.code == 0, made.err


def records(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Ended:
    """Exit codes of all ranks, and what they said, in order of rank."""

    codes: list[int]
    out: list[str]
    err: list[str]


class Launcher:
    """Starts ranks from outside; `close` ends it."""

    def __init__(self) -> None:
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        environment = os.environ | threads | {"MPLBACKEND": "agg", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, world: int, *args: object, act: str = "", **environment: str) -> Ended:
        """`orwcfm *args` here on so many ranks, each after ACTS[act]() where one is named."""
        assert self._process.stdin and self._process.stdout
        job = {"cwd": os.getcwd(), "world": world, "args": [*map(str, args)], "act": act, "more": environment}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the launcher ended with {self._process.wait(30)}"
        return Ended(**json.loads(line))

    def loop(self, world: int, change: str = "", **settings: object) -> list[dict]:
        """The loop alone, from "base" here or a `model`: what each rank has seen (`trace`) and where it ended."""
        ended = self(world, json.dumps(settings), act=f"loop {change}".strip())
        assert not any(ended.codes) and "Warning" not in "".join(ended.err), ended.err
        return [torch.load(f"trace_{k}.pt") for k in range(world)]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def rank() -> int:
    return int(os.environ["RANK"])


def loop() -> None:
    """Writes to trace_<rank>.pt what this rank drew, took and learned, by round or step, and where it ended."""
    from orwcfm_fast.distributed import joined
    from orwcfm_fast.method import noise, rollout, trainer
    from orwcfm_fast.method.step import PolicyOptimizer
    from orwcfm_fast.rewards import make_reward
    from orwcfm_fast.runs.load import Loader
    from orwcfm_fast.settings import Finetune
    from orwcfm_fast.sharding import whole

    seen = SEEN
    for key in ("x0", "drawn", "reward", "row", "w", "index", "x_t", "gradient", "held_bytes"):
        seen[key] = []

    def tell(owner: object, name: str, what: Callable[..., dict]) -> None:
        original = getattr(owner, name)

        def told(*args, **more):
            result = original(*args, **more)
            for key, value in what(result, *args, **more).items():
                seen[key].append(value)
            return result

        setattr(owner, name, told)

    def of_rollouts(x0, policy, n, seed, purpose=noise.SAMPLE, first=0):
        return {"x0": x0} if purpose == noise.ROLLOUT else {}

    tell(rollout, "start_noise", of_rollouts)
    tell(trainer, "draw", lambda found, *args: {"drawn": found.index})
    tell(
        trainer.Trainer,
        "draw_and_score",
        lambda found, *args: {"reward": found.rollout.reward, "row": found.rollout.condition},
    )
    tell(trainer.Trainer, "signal", lambda found, *args: {"w": found})
    tell(PolicyOptimizer, "step", lambda _, learner, batch, seed: {"index": batch.index, "x_t": batch.x_t})
    update = PolicyOptimizer.update

    def told_first(self, losses):
        seen["gradient"].append(flat(whole(p.grad) for p in self.parameters))
        held = [p.grad for p in self.parameters] + [*self.policy.network.parameters()]
        found = update(self, losses)
        held += [v for state in self.optimizer.state.values() for v in state.values()]
        seen["held_bytes"].append(sum((x.to_local() if hasattr(x, "to_local") else x).nbytes for x in held))
        return found

    PolicyOptimizer.update = told_first  # type: ignore[method-assign]
    s = Finetune(**json.loads(sys.argv[1]))
    with joined() as ranks:
        policy = Loader(torch.device("cpu"), "fp32", how=s).load(s.model or "base").policy
        reward = make_reward(s.reward or (lambda x: x.flatten(1).mean(1)), s)
        loop = trainer.Trainer(policy, reward, s, ranks=ranks)
        seen["records"] = [*loop.train(s.rounds)]
        seen["parameters"] = flat(whole(x) for x in policy.network.state_dict().values())
        seen["samples"] = rollout.sample(policy, rollout.start_noise(policy, 64, 5), s, 64)
        with ranks.together():
            pass
    torch.save(seen, f"trace_{rank()}.pt")
    sys.exit(0)


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def at_step(number: int, which: int, do: Callable[[], object]) -> None:
    """do() before the so-many-th step of one rank."""
    from orwcfm_fast.method.step import PolicyOptimizer

    step, calls = PolicyOptimizer.step, []

    def counted(*args):
        calls.append(1)
        if len(calls) == number and rank() == which:
            do()
        return step(*args)

    PolicyOptimizer.step = counted  # type: ignore[method-assign]


def normalised_by_rank() -> None:
    """The mistake of dividing each rank's weights by their own mean."""
    from orwcfm_fast.method import weighting
    from orwcfm_fast.method.objectives import objective

    world = int(os.environ["WORLD_SIZE"])

    def wrong(reward, *how):
        return torch.cat([weighting.weigh(part, *how) for part in reward.chunk(world)])

    objective.weigh = wrong  # type: ignore[assignment]


def noting_exchanges() -> None:
    """Writes to trace["events"] of each step: | at the end of a part, g for a weight's gradient, b for a bucket."""
    from orwcfm_fast.method import exchange
    from orwcfm_fast.method.step import PolicyOptimizer

    gradient, summed, backward = (
        PolicyOptimizer.gradient, exchange.summed, exchange.ReplicatedGradient.backward
    )  # fmt: skip
    SEEN["events"], now, hooked = [], [], []

    def noted(self, batch, seed, size, engine=None):
        if not hooked:
            hooked.extend(p.register_hook(lambda _: now.append("g")) for p in self.parameters)
        now.clear()
        found = gradient(self, batch, seed, size, engine)
        if engine and engine is self.exchange:
            SEEN["events"].append("".join(now))
        return found

    def of_bucket(state, bucket):
        now.append("b")
        return summed(state, bucket)

    def of_part(*args):
        backward(*args)
        now.append("|")

    PolicyOptimizer.gradient = noted  # type: ignore[method-assign]
    exchange.summed, exchange.ReplicatedGradient.backward = of_bucket, of_part  # type: ignore[method-assign]


def out_of_memory() -> None:
    """The backward pass of the last rank's steps holds no more than four samples at once."""
    from orwcfm_fast.networks.policy import Policy

    velocity = Policy.velocity

    def limited(self, t, x, condition=None):
        v = velocity(self, t, x, condition)
        if rank() == int(os.environ["WORLD_SIZE"]) - 1 and len(x) > 4 and v.requires_grad:
            v.register_hook(no_memory)
        return v

    Policy.velocity = limited  # type: ignore[method-assign]


def no_memory(gradient: torch.Tensor) -> None:
    raise MemoryError


def other_packages() -> None:
    from orwcfm_fast.checkpoints import checkpoint

    own = checkpoint.versions()
    if rank() == 1:
        checkpoint.versions = lambda: own | {"torch": "0.0"}  # type: ignore[assignment]


def hangs() -> None:
    """Rank 1 stops for eight seconds, in which it gives no sign of life; two are enough here to miss it."""
    from orwcfm_fast import heartbeats

    heartbeats.INTERVAL, heartbeats.MISSED = 0.2, 2.0

    def stop() -> None:
        subprocess.Popen(["sh", "-c", f"sleep 8; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)

    at_step(6, 1, stop)


def other_settings() -> None:
    if rank() == 1:
        sys.argv += ["--alpha", "3"]


def raises() -> None:
    raise RuntimeError("lost")


ACTS: dict[str, Callable[[], None]] = {
    "loop": loop,
    "loop normalised by rank": lambda: (normalised_by_rank(), loop()),
    "loop noting exchanges": lambda: (noting_exchanges(), loop()),
    "out of memory": out_of_memory,
    "other packages": other_packages,
    "other settings": other_settings,
    "signal of the first": lambda: at_step(6, 0, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "signal": lambda: at_step(6, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "hang": hangs,
    "kill": lambda: at_step(6, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "bug": lambda: at_step(6, 1, raises),
}


def start(job: dict, number: int, port: int) -> int:
    """Fork one rank, which reads where the others meet from the pipe `port`; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        signal.alarm(LIMIT)
        os.chdir(job["cwd"])
        for handle, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"rank_{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(job["world"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(port, 8).decode().strip()}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"} | job["more"]
        sys.argv = ["orwcfm", *job["args"]]
        if job["act"]:
            ACTS[job["act"]]()
        from orwcfm_fast.cli import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def launch(job: dict) -> Ended:
    """All ranks of a job, from their start to their end.

    Nothing runs beside a fork: a child keeps for ever a lock that another thread held, of the resolver, say, which
    the store asks for the name of each who comes. So the store comes last.
    """
    end = time.monotonic() + 5  # the last job's store is gone, its thread perhaps not quite
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < end:
        time.sleep(0.001)
    assert len(os.listdir("/proc/self/task")) == 1
    port, tell = os.pipe()
    children = [start(job, number, port) for number in range(job["world"])]
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # as torchrun's
    os.write(tell, f"{store.port:<8}".encode() * job["world"])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(port), os.close(tell)
    said = [
        [Path(job["cwd"], f"rank_{k}.{name}").read_text() for k in range(job["world"])]
        for name in ("out", "err")
    ]
    return Ended(codes, *said)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(vars(launch(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
