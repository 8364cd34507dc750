"""N ranks do what one does: same noise, same weights, same gradients; they save, resume, fail and stop as one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from kill_resume import difference
from many_ranks import Launcher

from orwcfm_fast.ranks import buckets

SMALL = ("--rollout", 50, "--chunk", 8, "--batch", 18, "--steps-per-round", 4, "--nfe", 6, "--eval-n", 16)
LOOP = ("finetune", "--checkpoint", "base", *SMALL, "--probe", 6, "--rounds", 3, "--quiet", "--out")
TINY = dict(rollout=50, chunk=8, batch=18, steps_per_round=4, nfe=6, probe=6, rounds=5, tau=3.0)


@pytest.fixture(scope="module")
def launch(cache):
    launcher = Launcher()
    yield launcher
    launcher.close()


def base(run_cli, data: str = "moons", steps: int = 60) -> None:
    made = run_cli("pretrain", "--data", data, "--steps", steps, "--batch", 32, "--out", "base", "--quiet")
    assert made.code == 0, made.err


def records(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def joined(ranks: list[dict], key: str, k: int) -> torch.Tensor:
    return torch.cat([rank[key][k] for rank in ranks])


def same(one: dict, many: list[dict], rounds: int = 5) -> None:
    """The issue's bounds: noise and indices exactly, then 1e-5, and 1e-3 at the end."""
    for k in range(rounds):
        assert torch.equal(joined(many, "x0", k), one["x0"][k])
        assert torch.equal(joined(many, "drawn", k), one["drawn"][k])
    for k in range(len(one["index"])):
        assert torch.equal(joined(many, "index", k), one["index"][k])
    for rank in many:
        assert torch.allclose(rank["w"][0], one["w"][0], rtol=0, atol=1e-5)
        whole = one["gradient"][0]
        assert (rank["gradient"][0] - whole).norm() <= 1e-5 * whole.norm()
        assert (rank["samples"] - one["samples"]).abs().max() <= 1e-3
        assert (rank["parameters"] - one["parameters"]).abs().max() <= 1e-3
        assert rank["records"] == many[0]["records"], "every rank judges by the same figures"
        assert torch.equal(rank["parameters"], many[0]["parameters"])


OTHERS = {
    "as it is": {},
    "plan over all": dict(coupling="ot", micro_batch=4),
    "adapters, kept reference": dict(lora=4, reference_passes=2),
    "fewer samples than ranks": dict(batch=3),
    "steered": dict(target_w2=0.3, guard="rollback", standardize_rewards=True),
}


@pytest.mark.parametrize("what", OTHERS)
def test_ranks_do_what_one_does(launch, run_cli, what):
    base(run_cli)
    (one,) = launch.loop(1, **TINY | OTHERS[what])
    for world in (4,) if OTHERS[what] else (2, 4):
        same(one, launch.loop(world, **TINY | OTHERS[what]))


ALIGNED = TINY | dict(rollout=64, chunk=16, batch=16, probe=16, steps_per_round=16)


@pytest.mark.parametrize("data", ["moons", pytest.param("digits", marks=pytest.mark.soak)])
def test_ranks_end_bit_for_bit_where_one_does_that_adds_the_same_parts(launch, run_cli, data):
    """At 16 steps a round, the default's order, where Adam makes much of the last bits of a sum.

    Parameters that no velocity depends on (biases before a GroupNorm that takes them out) have gradients of pure
    rounding, 1e-9, which Adam takes steps on: with other parts (one rank, the whole batch at once) they are up to
    3e-3 apart after 5 rounds on digits, all others 1e-5, samples 1e-6.
    """
    base(run_cli, data, 30)
    for world in (2, 4):
        (one,) = launch.loop(1, **ALIGNED | dict(micro_batch=16 // world))
        for rank in launch.loop(world, **ALIGNED):
            assert torch.equal(rank["parameters"], one["parameters"])
            assert torch.equal(rank["samples"], one["samples"])


def test_gradients_through_small_buckets_are_the_same(launch, run_cli):
    base(run_cli)
    whole, parts = (launch.loop(4, change, **TINY | dict(rounds=2)) for change in ("", "small buckets"))
    assert whole[0]["parameters"].numel() > 4 * 256
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one["parameters"], other["parameters"])
        assert all(map(torch.equal, one["gradient"], other["gradient"]))


def test_a_gradient_in_another_layout_is_summed_by_its_memory():
    tensors = [torch.randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last), torch.tensor(2.0)]
    found = [*buckets(tensors, 7)]
    assert [sum(map(len, parts)) for parts in found] == [7] * 43
    for parts in found:
        for part in parts:
            part.zero_()
    assert not any(map(torch.any, tensors))


def test_weights_normalised_by_rank_would_differ_visibly(launch, run_cli):
    base(run_cli)
    (one,) = launch.loop(1, **TINY | dict(rounds=1))
    wrong = launch.loop(2, "normalised by rank", **TINY | dict(rounds=1))
    assert (wrong[0]["w"][0] - one["w"][0]).abs().max() > 0.05
    with pytest.raises(AssertionError):
        same(one, wrong, rounds=1)


@pytest.mark.soak
def test_ranks_do_what_one_does_on_digits(launch, run_cli):
    base(run_cli, "digits", 30)
    (one,) = launch.loop(1, **TINY)
    for world in (2, 4):
        same(one, launch.loop(world, **TINY))


TELLS = """
import os
def f(x):
    with open(f"asked_{os.environ.get('RANK', 0)}", "a") as file:
        print(len(x), file=file)
    return x[:, 0]
"""


def test_closing_figures_are_those_of_one_rank_and_every_rank_has_drawn_its_share(launch, run_cli):
    base(run_cli)
    Path("tells.py").write_text(TELLS)
    more = ("--reward", "tells.py:f", "--holdout-reward", "right", "--eval-n", 600, "--rounds", 1)
    found = {}
    for world in (1, 3):  # the second of three has samples with and without a velocity gap
        ended = launch(world, *LOOP, f"on{world}", *more)
        assert not any(ended.codes), ended.err
        summary = json.loads(Path(f"on{world}", "summary.json").read_text())
        found[world] = [summary["before"], summary["after"]]
        asked = [Path(f"asked_{k}").read_text().split() for k in range(world)]
        assert [sizes[-2:] for sizes in asked] == [[str(600 // world)] * 2] * world
    for one, three in zip(found[1], found[3], strict=True):
        assert one.keys() == three.keys() and one["n"] == three["n"] == 600
        for key, value in one.items():
            assert near(three[key], value), (key, value, three[key])
    assert found[1][1]["velocity_gap"] > 0 and found[1][1]["holdout"]


def near(a, b) -> bool:
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(near(a[k], b[k]) for k in b)
    return a == pytest.approx(b, rel=1e-3, abs=1e-5) if isinstance(b, float) else a == b


def test_saved_on_four_ranks_resumed_on_one_two_and_four(launch, run_cli):
    base(run_cli)
    assert not any(launch(4, *LOOP, "whole").codes)
    cut = launch(4, *LOOP, "cut", act="signal")  # on one rank, in the middle of round 2
    assert cut.codes == [130, 143, 130, 130]
    assert "".join(cut.err) == (
        "error: interrupted in round 2, saved at cut/checkpoints/step_6; orwcfm finetune --resume cut\n"
    )
    for world in (1, 2, 4):
        shutil.copytree("cut", f"on{world}")
        ended = launch(world, "finetune", "--resume", f"on{world}", "--quiet")
        assert not any(ended.codes), ended.err
        assert "".join(ended.out) == f"run on{world}\n"
        for mine, theirs in zip(records("whole"), records(f"on{world}"), strict=True):
            assert mine.keys() == theirs.keys()
            for key in (
                "reward_mean",
                "loss_fm",
                "loss_w2",
                "ess",
                "w2_coupled",
                "velocity_gap",
                "diversity",
            ):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-3)
    assert difference(Path("whole"), Path("on4")) == ""
    assert "begun.safetensors" in {p.name for p in Path("cut/checkpoints/step_6").iterdir()}


def test_memory_that_runs_out_on_one_rank_is_known_to_all(launch, run_cli):
    base(run_cli)
    assert not any(launch(3, *LOOP, "run", act="out of memory").codes)
    found = records("run")
    assert any("micro-batch of 3" in text for text in found[0]["guard"])
    assert [r["micro_batch"] for r in found] == [3, 3, 3]


FAILS = """
import os
calls = []
def f(x):
    calls.append(1)
    if os.environ["RANK"] == "2" and len(calls) == {call}:
        raise ValueError("boom")
    return x[:, 0]
"""
ON_2 = "error: rank 2: reward bad.py:f, round {round}: ValueError: boom (bad.py:7)"


def test_what_fails_on_one_rank_ends_all_with_one_line(launch, run_cli):
    base(run_cli)
    Path("bad.py").write_text(FAILS.format(call=1))
    failed = launch(4, *LOOP, "bad", "--reward", "bad.py:f")
    assert failed.codes == [1] * 4 and "".join(failed.err) == ON_2.format(round=1) + "\n"
    assert not Path("bad").exists(), "a run that came to nothing leaves nothing"
    Path("bad.py").write_text(FAILS.format(call=2))
    failed = launch(4, *LOOP, "bad", "--reward", "bad.py:f")
    saved = "; the run is saved at bad/checkpoints/step_4\n"
    assert failed.codes == [1] * 4 and "".join(failed.err) == ON_2.format(round=2) + saved
    failed = launch(2, *LOOP, "bug", act="bug")
    assert (
        failed.codes == [1, 1] and "".join(failed.err) == "error: RuntimeError: lost (--debug shows where)\n"
    )


def test_ranks_that_disagree_say_so_once(launch, run_cli):
    base(run_cli)
    for act, words in (
        ("other packages", "torch is "),
        ("other settings", "alpha is 1.0 on rank 0 and 3.0 on rank 1"),
    ):
        refused = launch(3, *LOOP, "run", act=act)
        error = "".join(refused.err)
        assert refused.codes == [2, 2, 2] and error.count("\n") == 1
        assert error.startswith(f"error: the ranks disagree: {words}")
        assert not Path("run").exists()


def test_a_killed_rank_is_lost_to_the_others_and_the_same_command_goes_on(launch, run_cli):
    base(run_cli)
    assert not any(launch(2, *LOOP, "whole").codes)
    killed = launch(2, *LOOP, "cut", act="kill")  # in the middle of round 2
    assert killed.codes == [1, -9]
    assert (
        killed.err[0] == "error: lost another rank, which ended or cannot be reached; torchrun says which\n"
    )
    assert not any(launch(2, *LOOP, "cut").codes)
    assert difference(Path("whole"), Path("cut")) == ""
    other = launch(2, *LOOP, "cut", "--alpha", 3)
    assert other.codes == [2, 2]
    assert "".join(other.err) == "error: --out cut: holds a run with --alpha 1.0, not 3.0; choose another\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((*LOOP, "run", "--overwrite"), "--overwrite: a restart by torchrun would replace what was trained"),
        (LOOP[:-1], "--max-restarts: name the run with --out DIR"),
        ((*LOOP, "run", "--probe", 2), "--probe 2: is less than a sample for each of 3 ranks"),
        (("sweep", "--rounds", 1), "sweep: works in one process; torchrun is for finetune"),
        ((*LOOP, "run", "--alhpa", 3), "No such option"),
    ],
)
def test_what_ranks_cannot_do_is_refused_in_one_line(launch, run_cli, args, words):
    if "--probe" in args:
        base(run_cli, steps=2)
    refused = launch(3, *args, TORCHELASTIC_MAX_RESTARTS="2")
    error = "".join(refused.err)
    assert refused.codes == [2, 2, 2] and words in error and error.count("\n") == 1, error
    assert not Path("run").exists()


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


KILLS = """
import os, signal
from orwcfm_fast.step import Learner

step, calls = Learner.step, []

def counted(*args):
    calls.append(1)
    if len(calls) == 6 and (os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT")) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)

Learner.step = counted

def f(x):
    return x[:, 0]
"""


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


def test_commands_of_the_readme_are_torchruns_and_ours():
    from torch.distributed.run import parse_args

    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8").replace("\\\n", " ")
    commands = [line.split("torchrun ", 1)[1].split() for line in text.splitlines() if "torchrun --n" in line]
    assert len(commands) == 2
    for command in commands:
        found = parse_args(command)
        assert found.module and found.training_script == "orwcfm_fast.cli"
        assert found.training_script_args == ["finetune", "--out", "runs/a"]
