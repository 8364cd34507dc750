"""torch.compile as a choice: the same loop but for rounding, and one line where nothing can be compiled."""

import os
import subprocess
import sys

import pytest
import torch

from orwcfm_fast.errors import UserError
from orwcfm_fast.method.checks import check_trainable
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.settings import Finetune

SETTINGS = Finetune(rollout=64, chunk=64, batch=32, steps_per_round=8, warmup=2, nfe=4)


def right(x):
    return torch.sigmoid(3 * x[:, 0])


def rounds(compile, **change):
    policy = make_policy("mlp", "moons", (2,), torch.device("cpu"))
    trainer = Trainer(policy, right, SETTINGS.model_copy(update={"compile": compile, **change}))
    return [*trainer.train(2)], trainer


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"lora": 2}], ids=str)
def test_a_compiled_network_takes_the_rounds_that_it_takes_without(change):
    (plain, one), (compiled, other) = rounds(False, **change), rounds(True, **change)
    assert other.policy.network._compiled_call_impl is not None
    for a, b in zip(plain, compiled, strict=True):
        assert b["reward_mean"] == pytest.approx(a["reward_mean"], abs=1e-4)
        assert b["loss_fm"] == pytest.approx(a["loss_fm"], rel=1e-3)
    keys = [list(trainer.policy.network.state_dict()) for trainer in (one, other)]
    assert keys[0] == keys[1], "a checkpoint is the same with and without"


def test_a_model_in_shards_is_not_compiled():
    class Two:
        world = 2

    policy = make_policy("mlp", "moons", (2,), torch.device("cpu"))
    with pytest.raises(UserError, match="--compile: is not for a model in shards"):
        check_trainable(policy, SETTINGS.model_copy(update={"compile": True, "shard": True}), Two())


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so(tmp_path):
    weights = make_policy("mlp", "moons", (2,), torch.device("cpu")).network.state_dict()
    torch.save(weights, tmp_path / "model.pt")
    command = [sys.executable, "-P", "-m", "orwcfm_fast.cli", "finetune", "--compile", "--rounds", "1"]
    command += [
        "--checkpoint",
        str(tmp_path / "model.pt"),
        "--model",
        "mlp",
        "--data",
        "moons",
        "--reward",
        "right",
    ]
    command += ["--out", str(tmp_path / "run")]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(tmp_path / "no-compiler")}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **cache})
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(
        "error: --compile: torch.compile does not work"
    )
    assert not (tmp_path / "run").exists()
