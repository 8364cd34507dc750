"""Every command, in process: what it does, and how it says no."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orwcfm_fast.device import resolve_device

SMALL = ("--rounds", 2, "--rollout", 64, "--batch", 32, "--steps-per-round", 3, "--eval-n", 64, "--probe", 16)


def test_rewards_that_hardly_differ_are_named_with_what_to_do(run_cli, tiny_run):
    Path("flat.py").write_text(
        "def nearly(x):\n    return 1e-3 * x.mean(1)\n\ndef equal(x):\n    return x.new_ones(len(x))\n"
    )
    run = ("finetune", "--checkpoint", "base", *SMALL, "--reward")
    assert "weights nearly equal (ESS 64 of 64)" in run_cli(*run, "flat.py:nearly").out
    assert "all rewards are equal" in run_cli(*run, "flat.py:equal").out
    told = run_cli(*run, "flat.py:nearly", "--weights", "advantage", "--alpha", 0.5).out
    assert "nearly equal" not in told and "--reward flat.py:nearly --alpha 0.15 (more" in told
    assert "(more reward" not in run_cli(*run, "flat.py:nearly", "--target-w2", 0.5).out


def test_list_names_everything_and_one_kind(run_cli):
    everything = run_cli("list").out
    for name in ("even-digits", "unet-cifar10", "8gaussians", "dopri5"):
        assert name in everything
    assert "unet" not in run_cli("list", "solvers").out


def test_doctor_says_which_kernels_run_and_why(run_cli):
    found = json.loads(run_cli("doctor", "--json").out)
    expected = "Triton" if torch.cuda.is_available() else "reference, because the device is a CPU"
    assert all(expected in why for why in found["kernels"].values())
    assert "torch" in run_cli("doctor").out


def test_a_run_directory_holds_what_is_promised(tiny_run):
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    keys = [
        "reward_mean",
        "reward_std",
        "reward_max",
        "loss_fm",
        "loss_w2",
        "ess",
        "w2_coupled",
        "velocity_gap",
        "diversity",
    ]
    keys += [f"seconds_{p}" for p in ("rollout", "reward", "reference", "policy", "optimizer")]
    assert all(
        np.isfinite(line[key])
        for line in lines
        for key in [*keys, "images_per_s_rollout", "images_per_s_train"]
    )
    assert sorted(p.name for p in (tiny_run / "checkpoints").iterdir()) == ["best", "step_3", "step_6"]
    assert {p.name for p in (tiny_run / "samples").iterdir()} >= {
        "round_000.png",
        "round_002.png",
        "before_after.png",
    }
    assert json.loads((tiny_run / "summary.json").read_text())["after"]["reward"]["mean"] >= 0
    assert (tiny_run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_sample_and_evaluate_speak_of_the_newest_run(run_cli):
    assert run_cli("pretrain", "--data", "moons", "--steps", 20, "--batch", 64, "--out", "base").code == 0
    made = run_cli("finetune", "--checkpoint", "base", *SMALL)
    path = "runs/moons-right-a1-t0.5-001"
    assert made.code == 0 and made.out.splitlines()[0].startswith(f"run {path}")
    assert made.out.splitlines()[-1] == f"run {path}"
    assert (
        run_cli("finetune", "--checkpoint", "base", *SMALL, "--quiet").out.strip()
        == "run " + path[:-3] + "002"
    )
    assert run_cli("sample", "-n", 8).out.splitlines()[0] == "model: " + path[:-3] + "002"
    shown = run_cli("evaluate", "-n", 64)
    assert shown.out.splitlines()[0] == "model: " + path[:-3] + "002" and "W2 exact" in shown.out
    found = json.loads(run_cli("evaluate", path, "base", "-n", 64, "--json").out)
    assert found["reward"] == "right" and [m["name"] for m in found["models"]] == ["reference", path, "base"]
    assert found["models"][0]["w2_coupled"]["mean"] == 0 < found["models"][1]["w2_coupled"]["low"]


def test_same_seed_gives_same_bytes_and_any_chunk_the_same_samples(run_cli, tiny_run):
    for name in ("a", "b"):
        assert run_cli("sample", tiny_run, "-n", 64, "--out", f"{name}.npz").code == 0
        assert run_cli("sample", tiny_run, "-n", 64, "--out", f"{name}.png").code == 0
    assert run_cli("sample", tiny_run, "-n", 64, "--chunk", 7, "--out", "c.npz").code == 0
    assert run_cli("sample", tiny_run, "-n", 64, "--seed", 1, "--out", "d.npz").code == 0
    for kind in ("npz", "png"):
        assert Path(f"a.{kind}").read_bytes() == Path(f"b.{kind}").read_bytes()
    a, c, d = (np.load(f"{name}.npz")["samples"] for name in "acd")
    assert a.shape == (64, 1) and np.abs(a - c).max() < 1e-4 and np.abs(a - d).max() > 0.1


def test_toml_file_gives_settings_and_flags_win(run_cli, tiny_run):
    small = "rollout = 64\nbatch = 32\nsteps-per-round = 2\n"
    Path("c.toml").write_text('alpha = 0.25\ntau = 2\nreward = ["coordinate"]\n' + small)
    more = ("--checkpoint", "base", "--rounds", 1, "--eval-n", 64, "--out", "o")
    made = run_cli("finetune", "--config", "c.toml", "--tau", 1, *more)
    assert made.code == 0, made.err
    written = Path("o/config.toml").read_text()
    for line in ("alpha = 0.25", "tau = 1.0", '"coordinate"', 'solver = "'):
        assert line in written
    assert run_cli("finetune", "--config", "o/config.toml", "--out", "again", "--quiet").code == 0


def test_resume_goes_on_and_ends_as_if_never_stopped(run_cli, tiny_run):
    args = ("finetune", "--checkpoint", "base", *SMALL[2:], "--quiet", "--rounds")
    assert run_cli(*args, 4, "--out", "whole").code == 0
    assert run_cli(*args, 2, "--out", "halves").code == 0
    assert run_cli("finetune", "--resume", "halves", "--rounds", 4, "--quiet").code == 0
    for name in ("model", "optimizer"):
        a, b = (Path(run, "checkpoints/step_12", f"{name}.safetensors") for run in ("whole", "halves"))
        assert a.read_bytes() == b.read_bytes(), name
    rounds = [json.loads(line)["round"] for line in Path("halves/metrics.jsonl").read_text().splitlines()]
    assert rounds == [1, 2, 3, 4]
    assert "rounds = 4" in Path("halves/config.toml").read_text()
    refused = run_cli("finetune", "--resume", "halves", "--alpha", 3)
    assert refused.code == 2 and "--alpha cannot change" in refused.err


@pytest.mark.parametrize("data", ["moons", "digits"])
def test_pretraining_resumes_bit_for_bit(run_cli, data):
    """digits too: a U-Net's channels_last optimiser state must come back in its own layout."""
    args = ("pretrain", "--data", data, "--batch", 8, "--steps", 40, "--save-every", 20, "--quiet")
    assert run_cli(*args, "--out", "whole").code == 0
    assert run_cli(*args, "--out", "cut").code == 0
    shutil.rmtree("cut/checkpoints/step_40")
    assert run_cli("pretrain", "--resume", "cut", "--quiet").code == 0
    finished = run_cli("pretrain", "--resume", "cut")
    assert finished.code == 2 and "already finished" in finished.err
    for name in ("model", "ema", "optimizer"):
        a, b = (Path(run, "checkpoints/step_40", f"{name}.safetensors") for run in ("whole", "cut"))
        assert a.read_bytes() == b.read_bytes(), name


BAD = [
    (("finetune", "--alpha", "-1"), "alpha = -1.0: input should be greater than or equal to 0"),
    (("finetune", "--tau", "inf"), "tau"),
    (("finetune", "--nfe", "0"), "nfe"),
    (("pretrain", "--seed", str(2**64)), "seed"),
    (("finetune", "--config", "text.toml"), "rounds = '4'"),
    (("finetune", "--batch", "0"), "batch"),
    (("sample", "-n", "0"), "n = 0"),
    (("finetune", "--solver", "eulr"), "did you mean 'euler'"),
    (("finetune", "--reward", "even-digit"), "did you mean 'even-digits'"),
    (("pretrain", "--data", "8gaussian"), "did you mean '8gaussians'"),
    (("pretrain", "--data", "moons", "--model", "unet-mnits"), "did you mean 'unet-mnist'"),
    (("pretrain", "--data", "moons", "--model", "unet-mnist"), "made for samples 1×28×28"),
    (
        ("finetune", "--data", "moons"),
        "--data moons: needs a model trained on it: orwcfm pretrain --data moons",
    ),
    (("finetune", "--model", "mlp"), "--model mlp: needs a model trained on it"),
    (("sweep", "--data", "moons"), "--data moons: needs a model trained on it"),
    (("finetune", "--checkpoint", "nothere"), "no such run, checkpoint, file or preset"),
    (("sample", "nothere.pt"), "no such run"),
    (("sample", "unet-cifar10"), "no pretrained weights"),
    (("evaluate", "folder"), "neither a run nor a checkpoint"),
    (("finetune", "--config", "unknown.toml"), "unknown setting 'alhpa'; did you mean 'alpha'?"),
    (("finetune", "--config", "type.toml"), "rounds = 'many'"),
    (("finetune", "--config", "broken.toml"), "not a TOML file"),
    (("finetune", "--config", "gone.toml"), "No such file"),
    (("finetune", "--resume", "folder"), "not a run"),
    (("finetune", "--grid", "power:0"), "power:P"),
    (("finetune", "--coupling", "optimal"), "independent"),
    (("finetune", "--device", "cpuu"), "use auto, cpu, cuda"),
    (("sample", "--out", "x.jpg"), ".png or .npz"),
    (("finetune", "--alhpa", "1"), "--alpha"),
    (("list", "reward"), "did you mean 'rewards'"),
    (("evaluate", "cut.pt"), "truncated"),
    (("pretrain", "--data", "folder:gone"), "no such folder"),
]


@pytest.mark.parametrize(
    ("args", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_bad_input_is_one_clear_line_and_exit_code_2(run_cli, tmp_path, args, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "unknown.toml").write_text("alhpa = 1")
    (tmp_path / "type.toml").write_text('rounds = "many"')
    (tmp_path / "text.toml").write_text('rounds = "4"')
    (tmp_path / "broken.toml").write_text("alpha = = 1")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut off")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    result = run_cli(*args)
    assert result.code == 2, result.out + result.err
    assert message in result.err and result.err.startswith("error: ") and result.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    ("flag", "other", "own"), [("data", "moons", "two-gaussians"), ("model", "unet-mnist", "mlp")]
)
def test_weights_of_another_model_or_data_than_named_are_refused(run_cli, base, flag, other, own):
    refused = run_cli("finetune", "--checkpoint", base, f"--{flag}", other, "--out", "o")
    words = f"error: --{flag} {other}: checkpoint base is of {own}; leave --{flag} out\n"
    assert refused.code == 2 and refused.err == words and not Path("o").exists()


def test_a_gpu_that_is_named_is_the_one_that_is_worked_on(monkeypatch):
    """Events, streams and graphs are the current device's."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [resolve_device(name) for name in ("cpu", "cuda", "cuda:1")][2] == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_so(run_cli):
    result = run_cli("finetune", "--device", "cuda")
    assert result.code == 2 and "0 CUDA GPUs; use --device cpu" in result.err


def test_an_out_that_is_not_empty_needs_overwrite(run_cli, tiny_run):
    args = ("finetune", "--checkpoint", "base", *SMALL, "--quiet", "--out")
    refused = run_cli(*args, "run")
    assert refused.code == 2 and "--overwrite" in refused.err and "--resume run" in refused.err
    assert run_cli(*args, "run", "--overwrite").code == 0
    kept = Path("run/metrics.jsonl").read_text()
    failed = run_cli(
        *args, "run", "--overwrite", "--coupling", "ot", "--method", "orw", "--reward", "gone.py:f"
    )
    assert failed.code == 2 and Path("run/metrics.jsonl").read_text() == kept
    Path("zero.py").write_text("def f(x):\n    return 1 / 0\n")
    failed = run_cli(*args, "run", "--overwrite", "--reward", "zero.py:f")
    assert failed.code == 1 and Path("run/metrics.jsonl").read_text() == kept, "the old run is back"
    os.mkdir("notes")
    Path("notes/config.toml").write_text('title = "not ours"')
    Path("notes/thesis.txt").touch()
    refused = run_cli(*args, "notes", "--overwrite")
    assert refused.code == 2 and "not a run" in refused.err and os.path.exists("notes/thesis.txt")


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_an_unwritable_place_is_one_line(run_cli, tiny_run):
    result = run_cli("finetune", "--checkpoint", "base", *SMALL, "--out", "/proc/nothing/run")
    assert result.code == 2 and "--out /proc/nothing/run" in result.err


REWARDS = """
import torch
calls = 0
def nan(x):
    global calls
    calls += 1
    r = torch.zeros(len(x))
    if calls > 1: r[:12] = float("nan")
    return r
def shape(x): return x
def raises(x): raise KeyError("weights")
def negative(x): return torch.linspace(-1, 1, len(x))
"""


@pytest.mark.parametrize(
    ("spec", "more", "code", "message", "left"),
    [
        ("r.py:nan", (), 1, "round 2: 12 of 64 values are NaN; the run is saved at o/checkpoints/step_3", True),
        ("r.py:shape", (), 1, "reward r.py:shape, round 1: returned shape (64, 1), should be (64,)", False),
        ("r.py:raises", (), 1, "reward r.py:raises, round 1: KeyError: 'weights' (r.py:11)", False),
        ("r.py:negative", ("--weights", "linear"), 2, "rewards must not be negative", False),
    ],
)  # fmt: skip
def test_a_failing_reward_is_named_and_nothing_half_written(
    run_cli, tiny_run, spec, more, code, message, left
):
    Path("r.py").write_text(REWARDS)
    result = run_cli("finetune", "--checkpoint", "base", *SMALL, "--reward", spec, "--out", "o", *more)
    assert result.code == code and message in result.err and result.err.count("\n") == 1
    assert os.path.exists("o") == left


def test_mnist_without_network_or_files_says_where_to_put_them(run_cli, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    result = run_cli("pretrain", "--data", "mnist", "--data-dir", "data", "--steps", 1)
    assert (
        result.code == 2 and "MNIST/raw/train-images-idx3-ubyte" in result.err and "--data-dir" in result.err
    )
    assert not os.path.exists("runs")


def test_another_architecture_is_named_with_keys_and_shapes(run_cli, tiny_run):
    torch.save({"net_model": {"w": torch.zeros(3)}}, "other.pt")
    result = run_cli("sample", "other.pt", "--model", "unet-digits")
    assert result.code == 2 and "missing keys" in result.err and "1 unknown keys (first 'w')" in result.err
    result = run_cli("sample", "other.pt")
    assert result.code == 2 and "name its preset with --model" in result.err
