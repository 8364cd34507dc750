"""Weight files as other trainers save them: the right network's weights, or one line that refuses the file."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from orwcfm_fast.checkpoints.checkpoint import load_weights
from orwcfm_fast.checkpoints.torch_files import named_for, read_weights
from orwcfm_fast.errors import UserError
from orwcfm_fast.runs.load import Loader

Weights = dict[str, torch.Tensor]


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 3), nn.SiLU(), nn.Sequential(nn.Linear(3, 2)))


def under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def averaged(weights: Weights) -> Weights:
    return {"n_averaged": torch.tensor(5), **under("module.", weights)}


def compiled_inside(weights: Weights) -> Weights:
    return {name.replace("2.0.", "2._orig_mod.0."): value for name, value in weights.items()}


# what is saved of the right weights w and of others o; "safetensors" files are made of flat dicts
READ = {
    "bare": lambda w, o: w,
    "net_model": lambda w, o: {"net_model": w, "step": 3, "optim": {"state": {}}},
    "ema_model before net_model": lambda w, o: {"net_model": o, "ema_model": w},
    "DDP": lambda w, o: under("module.", w),
    "torch.compile": lambda w, o: under("_orig_mod.", w),
    "DDP of compiled": lambda w, o: under("module._orig_mod.", w),
    "compiled DDP": lambda w, o: under("_orig_mod.module.", w),
    "wrapped four times": lambda w, o: under("module._orig_mod.module._orig_mod.", w),
    "FSDP": lambda w, o: under("_fsdp_wrapped_module.", w),
    "a compiled layer": lambda w, o: compiled_inside(w),
    "AveragedModel": lambda w, o: averaged(w),
    "state_dict": lambda w, o: {"state_dict": w, "epoch": 4},
    "Lightning": lambda w, o: {"state_dict": under("model.", w), "pytorch-lightning_version": "2.5"},
    "Lightning, compiled": lambda w, o: {"state_dict": under("net._orig_mod.", w)},
    "Lightning, DDP inside": lambda w, o: {"state_dict": under("model.module.", w)},
    "Lightning with a loss": lambda w, o: {"state_dict": {**under("net.", w), "loss.weight": torch.ones(4)}},
    "Lightning with EMA": lambda w, o: {"state_dict": {**under("net.", o), **under("net_ema.", w)}},
    "model": lambda w, o: {"model": w, "optimizer": {"state": {}}, "args": {"lr": 0.1}},
    "model_state_dict": lambda w, o: {"epoch": 7, "model_state_dict": under("module.", w), "loss": 0.1},
    "nested": lambda w, o: {"model": {"state_dict": w}, "iteration": 9},
    "EMA beside": lambda w, o: {"model": o, "ema": under("module.", w)},
    "safetensors": lambda w, o: w,
    "safetensors, DDP": lambda w, o: under("module.", w),
    "safetensors, prefix": lambda w, o: under("diffusion.model.", w),
    "in capitals.SAFETENSORS": lambda w, o: under("_orig_mod.", w),
}
REFUSED = {
    "optimiser alone": (lambda w, o: {"optimizer": {"state": {}}, "epoch": 3}, "no weights found.*optimizer, epoch"),
    "two networks that fit": (lambda w, o: {"state_dict": {**under("a.", w), **under("b.", o)}}, "2 networks that fit"),
    "another architecture": (lambda w, o: {"net_model": {"x.weight": torch.ones(3)}}, "has 1 tensors, needs 4"),
    "one weight missing": (lambda w, o: dict(list(w.items())[:-1]), "1 missing keys"),
    "another width": (lambda w, o: {n: v[:2] for n, v in w.items()}, "should be"),
    "two names for one": (lambda w, o: {**w, **under("module.", o)}, "two of its weights have one name"),
    "a list": (lambda w, o: [w], "holds a list"),
    "a whole module": (lambda w, o: network(0), "its pickle asks for more than tensors"),
}  # fmt: skip


def read(folder: str, name: str, content: Any) -> nn.Sequential:
    capitals = name.endswith(".SAFETENSORS")
    path = Path(folder, "w.SAFETENSORS" if capitals else "w.safetensors" if "safetensors" in name else "w.pt")
    if "safetensors" in path.name.lower():
        safetensors.torch.save_file({n: v.contiguous() for n, v in content.items()}, path)
    else:
        torch.save(content, path)
    into = network(12345)
    load_weights(into, named_for(read_weights(path), into.state_dict().keys(), path), f"checkpoint {path}")
    return into


def fuzz(name: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 1000,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 10_000))
    def one(seed: int) -> None:
        right, other = network(seed).state_dict(), network(seed + 1).state_dict()
        with TemporaryDirectory() as folder:
            if name in READ:
                found = read(folder, name, READ[name](right, other)).state_dict()
                assert all(torch.equal(found[key], right[key]) for key in right)
                return
            make, message = REFUSED[name]
            with pytest.raises(UserError, match=message) as error:
                read(folder, name, make(right, other))
            assert "\n" not in str(error.value)

    one()


@pytest.mark.parametrize("name", [*READ, *REFUSED])
def test_a_file_of_each_kind_is_read_right_or_refused(name):
    fuzz(name, 5)


@pytest.mark.soak
@pytest.mark.parametrize("name", [*READ, *REFUSED])
def test_a_thousand_of_each_kind(name):
    fuzz(name, 1000)


def test_a_bare_safetensors_of_a_preset_loads_and_another_says_what_it_is(digits_model, tmp_path):
    weights = digits_model.network.state_dict()
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({f"model.{k}": v.contiguous() for k, v in weights.items()}, path)
    loaded = Loader(torch.device("cpu"), "fp32").load(str(path)).policy
    assert loaded.model == "unet-digits"
    assert all(torch.equal(v, weights[k]) for k, v in loaded.network.state_dict().items())
    safetensors.torch.save_file({"stem.weight": torch.zeros(4, 5)}, path)
    with pytest.raises(UserError, match=r"1 tensors, the first 'stem.weight' \(4×5\), which fits none of"):
        Loader(torch.device("cpu"), "fp32").load(str(path))
