"""Ranks as torchrun itself starts them, on one host and on two, and starts them again."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from kill_resume import difference
from many_ranks import LOOP, base


@pytest.fixture
def torchrun():
    """torchrun(*args) in a process of its own, ended with the test if not before."""
    begun = []

    def start(*args: object, within: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
        command = [*within, sys.executable, "-m", "torch.distributed.run", *map(str, args)]
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        begun.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=variables))
        return begun[-1]

    yield start
    for process in begun:
        process.terminate()  # it ends its ranks
        process.wait(60)


def reward_with_step(condition: str, action: str) -> str:
    """Text of a reward whose import makes each rank do something before its sixth step where a condition holds."""
    return f"""
import os, signal, time
from orwcfm_fast.method.step import PolicyOptimizer

step, calls = PolicyOptimizer.step, []

def counted(*args):
    calls.append(1)
    if len(calls) == 6 and {condition}:
        {action}
    return step(*args)

PolicyOptimizer.step = counted

def f(x):
    return x[:, 0]
"""


KILLS = reward_with_step(
    '(os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT")) == ("1", "0")',
    "os.kill(os.getpid(), signal.SIGKILL)",
)
WAITS = reward_with_step('not os.path.exists("inside")', 'open("inside", "w").close(); time.sleep(3)')


@pytest.mark.slow
def test_torchrun_restarts_a_run_of_which_a_rank_was_killed(launch, run_cli, torchrun):
    base(run_cli)
    Path("kills.py").write_text(KILLS)
    more = ("--reward", "kills.py:f")
    assert not any(launch(2, *LOOP, "whole", *more).codes)
    ranks = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "-m", "orwcfm_fast.cli")
    out, err = (process := torchrun(*ranks, *LOOP, "run", *more)).communicate(timeout=120)
    assert process.returncode == 0, err
    assert "exitcode: -9" in err and err.count("error: ") <= 1, (
        "torchrun may end the others before they notice"
    )
    assert out == "run run\n"
    assert difference(Path("whole"), Path("run")) == ""


@pytest.mark.slow
def test_sigterm_to_torchrun_during_a_step_saves_and_the_same_command_goes_on(launch, run_cli, torchrun):
    base(run_cli)
    Path("waits.py").write_text(WAITS)
    more = ("--reward", "waits.py:f")
    ranks = ("--standalone", "--nproc-per-node", 2, "-m", "orwcfm_fast.cli")
    process = torchrun(*ranks, *LOOP, "run", *more)
    while not Path("inside").exists():
        assert process.poll() is None
        time.sleep(0.02)
    began = time.monotonic()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 60 and process.returncode != 0
    assert "interrupted" in err and "saved at run/checkpoints/" in err, err
    assert not any(launch(2, *LOOP, "whole", *more).codes)
    assert not any(launch(2, *LOOP, "run", *more).codes)
    assert difference(Path("whole"), Path("run")) == ""


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable, as ip netns names with their addresses."""
    names = [f"orwcfm-{os.getpid()}-{k}" for k in "ab"]

    def ip(*args: str) -> None:
        subprocess.run(["ip", *args], check=True, capture_output=True, text=True)

    if shutil.which("ip") is None:
        pytest.skip("no ip command; iproute2 has it")
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for k, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{k + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield [(name, f"10.77.0.{k + 1}") for k, name in enumerate(names)]
    for name in names:
        ip("netns", "del", name)


@pytest.mark.soak
def test_two_hosts_complete_a_run(launch, run_cli, torchrun, two_hosts):
    base(run_cli)
    assert not any(launch(2, *LOOP, "whole").codes)
    meet = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint {two_hosts[0][1]}:29400 --rdzv-id job".split()
    hosts = [
        torchrun(
            *meet, "--rdzv-conf", f"is_host={k == 0}", "--local-addr", address,
            "-m", "orwcfm_fast.cli", *LOOP, "run",
            within=("ip", "netns", "exec", name), GLOO_SOCKET_IFNAME="cable",
        )
        for k, (name, address) in enumerate(two_hosts)
    ]  # fmt: skip
    ended = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], ended
    assert sorted(out for out, _ in ended) == ["", "run run\n"], "one of all ranks speaks"
    assert difference(Path("whole"), Path("run")) == ""


def test_commands_of_the_manual_are_torchruns_and_ours():
    from torch.distributed.run import parse_args

    text = (Path(__file__).parents[2] / "docs/many-gpus.md").read_text("utf-8").replace("\\\n", " ")
    commands = [line.split("torchrun ", 1)[1].split() for line in text.splitlines() if "torchrun --n" in line]
    assert len(commands) == 3
    for command in commands:
        found = parse_args(command)
        assert found.module and found.training_script == "orwcfm_fast.cli"
        own = [a for a in found.training_script_args if a != "--shard"]
        assert own == ["finetune", "--out", "runs/a"]
