"""A kind of model brings defaults of its own; flags, --config and recipes win over them."""

from pathlib import Path

import pytest

from orwcfm_fast.networks import models
from orwcfm_fast.networks.models import MODELS, defaults_of
from orwcfm_fast.runs.resolve import with_model_defaults
from orwcfm_fast.settings import Finetune, Sample, Sweep, build, read_toml

SMALL = ("--rounds", 1, "--rollout", 32, "--batch", 16, "--steps-per-round", 1, "--probe", 8, "--quiet")


@pytest.mark.parametrize("model", [*MODELS.names(), "diffusers:x"])
def test_defaults_of_a_model_are_settings_with_allowed_values(model):
    own = defaults_of(model)
    assert own.keys() <= Finetune.model_fields.keys()
    assert build(Finetune, own).model_dump(include=own.keys()) == own


def test_what_somebody_set_stays_even_where_it_is_the_declared_default():
    assert with_model_defaults(Finetune(), "unet-cifar10").lr == 2e-4
    assert with_model_defaults(Finetune(lr=1e-3), "unet-cifar10").lr == 1e-3
    assert with_model_defaults(build(Finetune, {"lr": 1e-3}, {}), "diffusers:x").lr == 1e-3
    assert with_model_defaults(Sample(), "diffusers:x").grid == "own", "settings without a rate"
    assert with_model_defaults(Sweep(alpha=[1.0]), "diffusers:x").eval_n == 64
    assert with_model_defaults(Finetune(), "unet-digits") == Finetune()


def test_a_runs_file_holds_the_models_defaults_and_the_flags_on_top(run_cli, tiny_run, monkeypatch):
    monkeypatch.setattr(models.mlp, "defaults", {"lr": 3e-4, "chunk": 20, "eval_n": 24}, raising=False)
    args = ("finetune", "--checkpoint", "base", *SMALL, "--chunk", 16, "--out", "o")
    assert run_cli(*args).code == 0
    written = read_toml(Path("o/config.toml"))
    assert {key: written[key] for key in ("lr", "chunk", "eval_n")} == {"lr": 3e-4, "chunk": 16, "eval_n": 24}
    monkeypatch.setattr(models.mlp, "defaults", {"lr": 5e-4}, raising=False)
    resumed = run_cli("finetune", "--resume", "o", "--rounds", 2, "--quiet")
    assert resumed.code == 0 and read_toml(Path("o/config.toml"))["lr"] == 3e-4, "a run keeps its own"


def test_the_list_of_models_shows_their_defaults(run_cli):
    lines = run_cli("list", "models").out.splitlines()
    after = lines[next(i for i, line in enumerate(lines) if line.startswith("  unet-cifar10")) + 1]
    assert after.split() == ["--lr", "0.0002", "--chunk", "128"]
    assert any("--grid own" in line and "--eval-n 64" in line for line in lines)
