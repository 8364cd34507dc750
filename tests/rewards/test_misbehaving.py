"""Rewards that write into their input, print, exit or change global state, and leave no trace of it."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.rewards.isolation import GLOBAL_STATE

WRITERS = {
    "add_": lambda x: x.add_(1).flatten(1).mean(1),
    "clamp_": lambda x: x.clamp_(-0.1, 0.1).flatten(1).mean(1),
    "numpy": lambda x: np.multiply(x.numpy(), 2, out=x.numpy()).reshape(len(x), -1).mean(1),
    "data": lambda x: (x.data.zero_(), x.flatten(1).mean(1))[1],
    "resize": lambda x: x.resize_(len(x), 1)[:, 0],
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_reward_writes_into_its_input_reaches_nobody(name):
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    before, seen = x.clone(), []
    reward = make_reward(WRITERS[name])
    reward.terms.append(("second", 1.0, lambda x: (seen.append(x.clone()), x.flatten(1).mean(1))[1]))
    reward.scores(x)
    assert torch.equal(x, before) and torch.equal(seen[0], before)


def test_a_reward_that_returns_one_buffer_again_and_again_keeps_its_scores():
    buffer = torch.empty(2)
    reward = make_reward(lambda x: torch.sum(x, 1, out=buffer))
    reward.sizes.reward_batch = 2
    assert reward(torch.arange(4.0)[:, None]).tolist() == [0, 1, 2, 3]


def test_metadata_that_a_reward_changes_is_its_own():
    from orwcfm_fast.networks.prompts import Prompt

    prompts = [Prompt("a", 1.0, {"goals": [3]})] * 2
    reward = make_reward(lambda x, metadata: [m["goals"].pop() for m in metadata])
    for _ in range(2):
        assert reward.scores(torch.zeros(2, 1), prompts=prompts).total.tolist() == [3, 3]


UNDONE = {
    "gradients off": "torch.set_grad_enabled(False)",
    "no_grad entered": "torch.no_grad().__enter__()",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "default device": "torch.set_default_device('meta')",
    "threads": "torch.set_num_threads(3)",
    "deterministic": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "numpy errors": "np.seterr(all='raise')",
    "folder": "os.chdir('/')",
    "torch seed": "torch.manual_seed(7)",
    "numpy seed": "np.random.seed(7)",
    "seed": "random.seed(7)",
    "SIGINT": "signal.signal(signal.SIGINT, signal.SIG_IGN)",
    "output": "sys.stdout = open('log', 'w')",
}
IMPORTS = "import os, random, signal, sys\nimport numpy as np\nimport torch\n"


def state() -> list:
    found = [read() for read, _ in GLOBAL_STATE] + [signal.getsignal(signal.SIGINT), sys.stdout]
    return [*found, torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize("when", ["at import", "in the call"])
@pytest.mark.parametrize("name", UNDONE)
def test_global_state_is_as_before(name, when, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = f"    {UNDONE[name]}\n" if when == "in the call" else ""
    Path("mine.py").write_text(
        f"{IMPORTS}{'' if called else UNDONE[name]}\ndef f(x):\n{called}    return [0.0] * len(x)\n"
    )
    before = state()
    assert make_reward("mine.py:f")(torch.zeros(3, 2)).tolist() == [0, 0, 0]
    assert state() == before


IN_THE_CALL = {
    **UNDONE,
    "add_": "x.add_(1)",
    "clamp_": "x.clamp_(-0.1, 0.1)",
    "through NumPy": "x.numpy()[:] = 7",
    "resize_": "x.resize_(1)",
    "set_": "x.set_(torch.zeros(1))",
    "requires_grad_": "x.requires_grad_()",
    "deletes": "del x",
    "prints": "print('a', 'b', file=sys.__stdout__)",
    "path": "sys.path.clear()",
}


def fuzz(name: str, examples: int, folder: Path) -> None:
    source = f"    wanted = x.flatten(1).mean(1).clone()\n    {IN_THE_CALL[name]}\n    return wanted, {{}}\n"
    path = folder / "mine.py"
    path.write_text(f"{IMPORTS}\ndef f(x):\n{source}")
    reward = make_reward(f"{path}:f")

    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 1000,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2**62))
    def one(n: int, shape: list[int], seed: int) -> None:
        x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed % 1000))
        before, kept = state(), x.clone()
        found = reward.scores(x, seed=seed).total
        assert torch.equal(found, kept.flatten(1).mean(1)) and torch.equal(x, kept)
        assert state() == before

    one()


@pytest.mark.parametrize("name", IN_THE_CALL)
def test_scores_are_right_whatever_else_the_reward_does(name, tmp_path):
    fuzz(name, 5, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", IN_THE_CALL)
def test_two_thousand_of_each_kind(name, tmp_path):
    fuzz(name, 2000, tmp_path)


@pytest.mark.parametrize("draw", ["torch.rand(len(x))", "np.random.rand(len(x))",
                                  "[random.random() for _ in x]"])  # fmt: skip
def test_a_reward_that_draws_numbers_draws_those_of_the_seed(draw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f"{IMPORTS}\ndef f(x):\n    return {draw}\n")
    for spec in ("mine.py:f", f"process:{sys.executable}:mine.py:f"):
        reward = make_reward(spec)
        first, again, other = (reward.scores(torch.zeros(4, 1), seed=s).total for s in (3, 3, 4))
        assert torch.equal(first, again) and not torch.equal(first, other)
        reward.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [("sys.exit(1)", r"called sys.exit\(1\)"), ("raise SystemExit", r"called sys.exit\(None\)"),
     ("raise ValueError('one\\ntwo')", "ValueError: one")],
)  # fmt: skip
def test_a_reward_that_exits_is_blamed_in_one_line(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("late.py").write_text(f"import sys\n\ndef f(x):\n    {line}\n")
    with pytest.raises(RewardError, match=rf"^reward late.py:f, round 2: {message} \(late.py:4\)$"):
        make_reward("late.py:f").scores(torch.zeros(3, 1), "round 2")
    Path("early.py").write_text(f"import sys\n{line}\n")
    with pytest.raises(UserError, match=rf"^reward 'early.py:f': {message} \(early.py:2\)$"):
        make_reward("early.py:f")


def test_a_helper_beside_the_file_is_found_and_is_the_files_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, number in (("a", 1), ("b", 2)):
        Path(folder).mkdir()
        Path(folder, "utils_of_test.py").write_text(f"NUMBER = {number}\n")
        Path(folder, f"late_{folder}.py").write_text(f"NUMBER = {10 * number}\n")
        lazy = f"    import late_{folder} as late\n    return [utils_of_test.NUMBER + late.NUMBER] * len(x)\n"
        Path(folder, "mine.py").write_text(f"import utils_of_test\n\ndef f(x):\n{lazy}")
    x = torch.zeros(2, 1)
    assert [make_reward(f"{folder}/mine.py:f")(x).tolist() for folder in "ab"] == [[11, 11], [22, 22]]


@pytest.mark.parametrize("info", ["{}", "{'kind': [1, 2, 3]}", "None"])
def test_scores_with_information_are_taken_as_flow_grpos_are(info, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f"def f(x):\n    return [1.0, 2.0, 3.0], {info}\n")
    for spec in ("mine.py:f", f"process:{sys.executable}:mine.py:f"):
        reward = make_reward(spec)
        assert reward(torch.zeros(3, 1)).tolist() == [1, 2, 3]
        reward.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [("torch.full((3,), 1e300, dtype=torch.float64)", "3 of 3 values are not finite"),
     ("torch.zeros(3, dtype=torch.complex64)", "complex"), ("None", "TypeError|RuntimeError"),
     ("'abc'", "ValueError|TypeError"), ("[None] * 3", "TypeError|RuntimeError"),
     ("torch.zeros(3, device='meta')", "NotImplementedError")],
)  # fmt: skip
def test_an_answer_that_is_no_score_is_one_line(answer, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f"import torch\n\ndef f(x):\n    return {answer}\n")
    with pytest.raises(RewardError, match=message) as error:
        make_reward("mine.py:f")(torch.zeros(3, 1))
    assert "\n" not in str(error.value)


def test_scores_that_carry_a_gradient_or_are_sparse_are_plain_numbers():
    for made in (lambda x: torch.nn.Linear(2, 1).requires_grad_()(x.requires_grad_())[:, 0],
                 lambda x: torch.ones(len(x)).to_sparse()):  # fmt: skip
        values = make_reward(lambda x, made=made: torch.enable_grad()(made)(x))(torch.zeros(3, 2))
        assert not values.requires_grad and values.layout == torch.strided


def test_json_on_standard_output_is_json_whatever_the_reward_prints(tiny_run):
    Path("loud.py").write_text(
        "import os, subprocess\nprint('hello')\n\ndef f(x):\n    print('one', len(x))\n    os.write(1, b'two\\n')\n"
        "    subprocess.run(['echo', 'three'])\n    return x[:, 0]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "orwcfm_fast.cli", "evaluate", "base", "--reward", "loud.py:f", "-n", "64", "--json"],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert all(word in done.stderr for word in ("hello", "one", "two", "three"))
