"""A reward in an environment of its own: real worker processes, killed, hanging, broken."""

import json
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import torch

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.rewards import make_reward

SMALL = ("--rounds", 3, "--rollout", 64, "--batch", 32, "--steps-per-round", 3, "--eval-n", 64, "--probe", 16)
SMALL += ("--checkpoint", "base", "--out", "o")
FILE = """
import os, signal, sys, time
from pathlib import Path

def call():
    file = Path("calls")
    number = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(number))
    return number

def total(x):
    print("to standard output")
    return x.reshape(len(x), -1).sum(1)

def killed_once(x):
    if call() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return total(x)

def never_back(x):
    if call() >= 2:
        print("out of memory", file=sys.stderr)
        os._exit(7)
    return total(x)

def hangs(x):
    if call() >= 2:
        time.sleep(1000)
    return total(x)

def too_few(x):
    return total(x)[:3]

def raises(x):
    raise KeyError("weights")

def narrow(x):
    if len(x) > 20:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return total(x)
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """spec(function, python): the reward's name, on a file in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("far.py").write_text(FILE)
    Path("far_torch.py").write_text("import torch\n\ndef kind(x):\n    return torch.ones(len(x)) * x[0, 0]\n")
    Path("far_import.py").write_text("import a_package_that_is_not_there\n")
    Path("images.py").write_text("MEANING = 42.0\n")
    Path("far_sibling.py").write_text("import images\n\ndef f(x):\n    return [images.MEANING] * len(x)\n")
    return lambda function, file="far.py", python=sys.executable: f"process:{python}:{file}:{function}"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )  # dead, not yet buried
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_scores_are_those_of_the_function_called_here(spec):
    reward = make_reward([spec("total") + "=2"])
    for shape in (
        (5, 3, 4, 4),
        (64, 1),
        (700, 2, 9, 9),
        (3, 2),
        (400, 3, 64, 64),
    ):  # the last in several parts
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(reward(x), 2 * x.flatten(1).sum(1), atol=1e-3)
    worker = reward.terms[0][2]
    pid = worker._process.pid
    assert make_reward(spec("total")).terms[0][2] is worker, "one worker a function"
    reward.close()
    assert not alive(pid) and worker._process is None
    reward.close()


def test_a_worker_that_runs_out_of_memory_is_asked_of_half(spec):
    reward = make_reward(spec("narrow"))
    x = torch.randn(48, 2)
    assert torch.allclose(reward(x), x.sum(1), atol=1e-6) and reward.sizes.reward_batch == 12
    reward.close()


def test_a_file_that_imports_torch_gets_tensors_and_its_own_neighbours(spec):
    reward = make_reward([spec("kind", "far_torch.py"), spec("f", "far_sibling.py")])
    assert reward(torch.full((4, 2), 3.0)).tolist() == [45.0] * 4
    reward.close()


def test_a_bare_environment_without_numpy_says_what_it_lacks(spec, tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    Path("stdlib.py").write_text("def f(x):\n    return [0.0] * len(x)\n")
    reward = make_reward(spec("f", "stdlib.py", tmp_path / "bare"))  # a folder will do
    with pytest.raises(RewardError, match="round 1: ModuleNotFoundError: No module named 'torch'"):
        reward.scores(torch.zeros(4, 2), "round 1")
    reward.close()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("process:python", "write process:PYTHON:FILE.py:FUNCTION"),
        ("process:/nowhere/python:far.py:total", "/nowhere/python is no Python interpreter"),
        (f"process:{sys.executable}:gone.py:total", "no file gone.py"),
        (f"process:{sys.executable}:far.py:totle", "has no attribute 'totle'"),
        (f"process:{sys.executable}:far_import.py:f", "No module named 'a_package_that_is_not_there'"),
        (f"process:{sys.executable}:gone.module:f", "No module named 'gone'"),
        ("process:/bin/false:far.py:total", "did not start: gone with exit code 1"),
    ],
)
def test_what_cannot_start_is_one_line_before_any_work(spec, argument, message):
    with pytest.raises(UserError) as error:
        make_reward(argument)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_number_of_scores_and_exceptions_are_named(spec):
    for function, message in (
        ("too_few", r"returned shape \(3,\), should be \(8,\)"),
        ("raises", "KeyError: 'weights'"),
    ):
        reward = make_reward(spec(function))
        with pytest.raises(RewardError, match=f"far.py:{function}, round 4: {message}"):
            reward.scores(torch.zeros(8, 2), "round 4")
        reward.close()


def test_a_worker_killed_from_outside_is_started_again(spec, capfd):
    reward = make_reward(spec("total"))
    x = torch.ones(4, 2)
    os.kill(reward.terms[0][2]._process.pid, signal.SIGKILL)
    assert reward(x).tolist() == [2.0] * 4
    assert "was killed by signal 9; started again" in capfd.readouterr().err
    reward.close()


def test_a_run_goes_on_when_its_worker_is_killed(run_cli, tiny_run, spec, capfd):
    made = run_cli("finetune", *SMALL, "--reward", spec("killed_once"))
    assert made.code == 0, made.err
    rounds = [json.loads(line)["round"] for line in Path("o/metrics.jsonl").read_text().splitlines()]
    assert rounds == [1, 2, 3] and Path("o/summary.json").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("never_back", "its worker was gone with exit code 7 (out of memory), 3 times over the same samples"),
        ("hangs", "its worker did not answer within 5 s (--reward-timeout)"),
    ],
)
def test_one_that_never_comes_back_ends_the_run_with_a_checkpoint(run_cli, tiny_run, spec, function, message):
    made = run_cli("finetune", *SMALL, "--reward", spec(function), "--reward-timeout", 5)
    assert made.code == 1 and f"round 2: {message}; the run is saved at o/checkpoints/step_3" in made.err
    assert made.err.splitlines()[-1].startswith("error: reward process:")
    assert Path("o/checkpoints/step_3/state.json").exists()
    Path("far.py").write_text(FILE.replace("call() >= 2", "False"))  # mended
    resumed = run_cli("finetune", "--resume", "o", "--reward", spec(function), "--quiet")
    assert resumed.code == 0, resumed.err


def test_no_worker_outlives_a_run_that_is_killed(spec, tmp_path):
    code = (
        "import os, signal, sys\nfrom orwcfm_fast.rewards import make_reward\n"
        f"reward = make_reward({spec('total')!r})\n"
        "print(reward.terms[0][2]._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(600):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert not alive(pid)
