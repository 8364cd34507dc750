"""Checkpoints: whole or none, verified, and nothing foreign runs code."""

import pickle
import tracemalloc

import pytest
import torch

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.checkpoints.torch_files import foreign_weights, read_pt
from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.models import build_network
from orwcfm_fast.runs.load import Loader

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}
    return checkpoint.save(tmp_path / "step_1", {"step": 1}, model=tensors)


def test_the_folders_that_a_checkpoint_lies_in_are_made(tmp_path):
    path = checkpoint.save(tmp_path / "cache" / "pretrained" / "digits", {}, model={"x": torch.ones(2)})
    assert checkpoint.load(path).tensors["model"]["x"].tolist() == [1, 1]


def test_what_is_saved_is_loaded(saved):
    found = checkpoint.load(saved)
    assert found.state["step"] == 1 and "torch" in found.state["versions"]
    assert torch.equal(found.tensors["model"]["a"], torch.arange(6.0).view(2, 3))
    assert found.tensors["model"]["b"].shape == ()


def test_saving_over_an_older_one_leaves_one_whole_checkpoint(saved):
    checkpoint.save(saved, {"step": 2}, model={"a": torch.zeros(1)})
    assert checkpoint.load(saved).state["step"] == 2
    assert [p.name for p in saved.parent.iterdir()] == ["step_1"]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_named(saved, damage):
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        checkpoint.load(saved)


def test_a_changed_digit_of_the_state_is_seen(saved):
    text = (saved / "state.json").read_text()
    (saved / "state.json").write_text(text.replace('"step": 1', '"step": 2'))
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        checkpoint.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": 3}', '{"sha256": {"../x.safetensors": "0"}}'])
def test_a_damaged_state_is_one_clear_error(saved, text):
    (saved / "state.json").write_text(text)
    with pytest.raises(UserError, match="checkpoint"):
        checkpoint.load(saved)


def test_a_failed_write_leaves_the_old_checkpoint_and_no_litter(saved, monkeypatch):
    def fail(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", fail)
    with pytest.raises(OSError):
        checkpoint.save(saved, {"step": 2}, model={"a": torch.zeros(1)})
    assert checkpoint.load(saved).state["step"] == 1
    assert [p.name for p in saved.parent.iterdir()] == ["step_1"]


def test_weights_of_another_architecture_name_keys_and_shapes():
    network = build_network("mlp", (2,))
    weights = build_network("mlp", (3,)).state_dict()
    with pytest.raises(UserError, match=r"net\.0\.weight.*\(128, 19\).*\(128, 18\)"):
        checkpoint.load_weights(network, weights, "x")
    del weights["net.6.bias"]
    with pytest.raises(UserError, match=r"1 missing keys \(first 'net\.6\.bias'\)"):
        checkpoint.load_weights(network, weights, "x")


def test_optimizer_state_comes_back_bit_for_bit():
    torch.manual_seed(0)
    network = build_network("mlp", (2,))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    network(torch.zeros(1), torch.ones(1, 2)).sum().backward()
    optimizer.step()
    other = torch.optim.AdamW(build_network("mlp", (2,)).parameters(), 1e-2)
    checkpoint.load_optimizer(other, checkpoint.optimizer_tensors(optimizer), "x")
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


class Canary:
    def __reduce__(self):
        import os

        return os.system, ("touch canary",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    if how == "pickle":
        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"net_model": Canary()}))
    else:
        torch.save({"net_model": Canary()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refused"):
        read_pt("evil.pt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken"])
def test_what_is_no_checkpoint_is_said_so(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match="not a torch checkpoint"):
        read_pt(tmp_path / "x.pt")


def test_a_truncated_pt_is_said_so(tmp_path):
    torch.save({"net_model": {"a": torch.zeros(10_000)}}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        read_pt(tmp_path / "x.pt")


def test_foreign_weights_prefer_ema_and_drop_the_ddp_prefix():
    found = {"net_model": {"module.a": torch.zeros(1)}, "ema_model": {"module.a": torch.ones(1)}, "step": 3}
    assert foreign_weights(found, "x") == {"a": torch.ones(1)}
    assert foreign_weights(found, "x", ("net_model",)) == {"a": torch.zeros(1)}
    with pytest.raises(UserError, match="net_model"):
        foreign_weights({"step": 3}, "x")


def test_torchcfm_checkpoint_is_recognised_and_loads_into_every_command(tmp_path):
    """The keys and the network of torchcfm's own script, at the digits' size."""
    from torchcfm.models.unet.unet import UNetModelWrapper

    network = UNetModelWrapper(
        dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions="4"
    )
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    weights = {f"module.{k}": v for k, v in network.state_dict().items()}
    found = {"net_model": weights, "ema_model": weights, "optim": optimizer.state_dict(), "step": 7}
    found["sched"] = {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"}
    torch.save(found, tmp_path / "digits_weights_step_7.pt")
    loaded = Loader(CPU, "fp32").load(str(tmp_path / "digits_weights_step_7.pt"))
    assert loaded.policy.model == "unet-digits"
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        assert torch.allclose(loaded.policy.velocity(t, x), network.eval()(t, x), atol=1e-5)


def test_state_names_the_model_or_is_refused(tmp_path):
    for shape in ([], [0], ["x"], [10**9], None):
        state = {"model": "mlp", "data": "moons", "shape": shape}
        saved = checkpoint.save(tmp_path / "saved", state, model={"a": torch.zeros(1)})
        with pytest.raises(UserError, match=r"which model|another architecture"):
            Loader(CPU, "fp32").load(str(saved))


def test_a_checkpoint_is_written_a_tensor_at_a_time_as_safetensors_writes_it(tmp_path):
    """Every dtype, without dimensions, empty, transposed; and no copy of the file in memory."""
    import safetensors

    tensors = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in checkpoint.DTYPES}
    tensors |= {"one number": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.rand(3, 5).T}
    tensors |= {f"large{k}": torch.full((1 << 20,), float(k)) for k in range(8)}
    tracemalloc.start()
    checkpoint.save(tmp_path / "c", {}, model=tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20, "32 MiB are written"
    found = checkpoint.load(tmp_path / "c").tensors["model"]
    with safetensors.safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:  # reads at offsets
        for name, value in tensors.items():
            for read in (found[name], file.get_tensor(name)):
                assert read.dtype == value.dtype and torch.equal(read, value)
