"""Nothing let in: files that would run code, or that lie about their size, for every loader there is."""

import hashlib
import io
import json
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.checkpoints.torch_files import read_pt
from orwcfm_fast.data.cifar import read_batch
from orwcfm_fast.data.datasets import load_data
from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import RewardOptions

CPU = torch.device("cpu")


class Canary:
    """Writes the file `canary` where its pickle is run."""

    def __reduce__(self):
        return os.system, ("touch canary",)


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """The working directory of each test here; the canary must never be written in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trap").write_bytes(pickle.dumps(Canary()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of pickle protocols
        yield
    assert not (tmp_path / "canary").exists(), "code from a file was run"


def test_the_canary_sings_where_a_pickle_is_run(tmp_path):
    pickle.loads(Path("trap").read_bytes())
    assert Path("canary").exists()
    Path("canary").unlink()


def zipped(pickled: bytes, entries: dict[str, bytes] | None = None, how: int = zipfile.ZIP_STORED) -> bytes:
    """A .pt as torch lays it out, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in {"x/version": b"3\n", "x/byteorder": b"little", **(entries or {})}.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_file(content: object, **more) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **more)
    return buffer.getvalue()


def lying_storage() -> bytes:
    """A tensor of 16 numbers that claims 2³⁰."""
    whole = zipfile.ZipFile(io.BytesIO(torch_file({"net_model": {"a": torch.zeros(16)}})))
    name = next(n for n in whole.namelist() if n.endswith("data.pkl"))
    pickled = whole.read(name).replace(b"K\x10", b"J\x00\x00\x00\x40")
    rest = {n.replace(n.split("/")[0], "x", 1): whole.read(n) for n in whole.namelist() if n != name}
    return zipped(pickled, {n: d for n, d in rest.items() if n not in ("x/version", "x/byteorder")})


HOSTILE_PT = {
    "a bare pickle": pickle.dumps({"net_model": Canary()}),
    "torch's zip": torch_file({"net_model": Canary()}),
    "torch's old format": torch_file({"net_model": Canary()}, _use_new_zipfile_serialization=False),
    "in the optimiser's place": torch_file({"net_model": {"a": torch.zeros(1)}, "optim": Canary()}),
    "as a key": zipped(pickle.dumps({"net_model": {"a": 1}, "z": [Canary()]})),
    "by another name": zipped(b"cos\nsystem\n(S'touch canary'\ntR."),
    "by a builtin": zipped(b"c__builtin__\neval\n(S\"open('canary', 'w')\"\ntR."),
    "by build": zipped(b"ctorch._utils\n_rebuild_tensor_v2\n}S'__setstate__'\ncos\nsystem\nsb."),
    "compressed": zipped(pickle.dumps({}), {"x/data/0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED),
    "claims a storage of 4 GiB": lying_storage(),
    "a huge memo": zipped(b"\x80\x02}r\xff\xff\xff\x7f."),
    "a long name": zipped(b"\x80\x02X\xff\xff\xff\x7fabc."),
    "nothing": b"",
    "an empty archive": b"PK\x05\x06" + bytes(18),
    "an archive whose list claims 4 GiB": b"PK\x05\x06"
    + bytes(6)
    + b"\x01\x00"
    + b"\xf0\xff\xff\xff"
    + bytes(6),
}


@pytest.mark.parametrize("name", HOSTILE_PT)
def test_a_hostile_pt_is_refused_in_one_line(name):
    Path("evil.pt").write_bytes(HOSTILE_PT[name])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"checkpoint evil\.pt") as refused:
            Loader(CPU).load("evil.pt")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refused.value)


def safetensors_file(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def one_tensor(**changes) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}).encode()


HOSTILE_SAFETENSORS = {
    "a pickle": pickle.dumps({"a": Canary()}),
    "a torch file": torch_file({"a": Canary()}),
    "nothing": b"",
    "a header of 2⁶³ bytes": safetensors_file(b"{}", length=2**63),
    "a header longer than the file": safetensors_file(b"{}", length=1000),
    "a header that is no JSON": safetensors_file(b"{{{{"),
    "a deep header": safetensors_file(b"[" * 100_000),
    "a list": safetensors_file(b"[1]"),
    "a tensor of 4 TiB": safetensors_file(one_tensor(shape=[2**40], data_offsets=[0, 2**42]), bytes(16)),
    "negative offsets": safetensors_file(one_tensor(data_offsets=[-16, 0]), bytes(16)),
    "offsets that are texts": safetensors_file(one_tensor(data_offsets="ab"), bytes(16)),
    "a shape that does not fit": safetensors_file(one_tensor(shape=[5]), bytes(16)),
    "a shape that overflows": safetensors_file(one_tensor(shape=[2**63, 2]), bytes(16)),
    "a dtype that is not": safetensors_file(one_tensor(dtype="PICKLE"), bytes(16)),
    "bytes that no tensor has": safetensors_file(one_tensor(), bytes(32)),
}


def signed(folder: Path, data: bytes, **state) -> Path:
    """A checkpoint whose checksums are right, whatever is in it."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(data)
    found = {"model": "mlp", "data": "moons", "shape": [2], **state}
    found["sha256"] = {"model.safetensors": hashlib.sha256(data).hexdigest()}
    found[checkpoint.OWN_DIGEST] = checkpoint._own_digest(found)
    (folder / "state.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_a_hostile_checkpoint_is_refused_in_one_line_though_its_checksums_are_right(name):
    folder = signed(Path("evil"), HOSTILE_SAFETENSORS[name])
    with pytest.raises(UserError, match=r"checkpoint evil: model\.safetensors") as refused:
        Loader(CPU).load(str(folder))
    assert "\n" not in str(refused.value)


def test_a_file_larger_than_memory_is_refused_before_it_is_read():
    size = 2**43
    header = one_tensor(shape=[size // 4], data_offsets=[0, size])
    folder = signed(Path("evil"), b"")
    try:
        with (folder / "model.safetensors").open("r+b") as file:
            file.write(safetensors_file(header))
            file.truncate(8 + len(header) + size)
        os.truncate("trap", size)
    except OSError as error:
        pytest.skip(f"no sparse file of that size here: {error}")
    with pytest.raises(UserError, match="more than this machine's memory"):
        Loader(CPU).load(str(folder))
    with pytest.raises(UserError, match="more than this machine's memory"):
        Loader(CPU).load("trap")


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "config.toml"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(name, kind):
    folder = signed(Path("evil"), safetensors_file(b"{}"))
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(UserError, match="evil"):
        Loader(CPU).load("evil")


def test_caches_that_were_replaced_by_pickles_are_made_anew_and_never_opened(monkeypatch, tmp_path):
    from orwcfm_fast.rewards import digits

    cache = Path("cache").absolute()
    monkeypatch.setenv("ORWCFM_CACHE", str(cache))
    signed(cache / "digits-classifier", HOSTILE_PT["torch's zip"])
    monkeypatch.setattr(digits, "train_classifier", lambda network, data, data_dir: 0.99)
    digits.digit_classifier.__wrapped__()
    assert checkpoint.load(cache / "digits-classifier").state["accuracy"] == 0.99
    signed(cache / "pretrained" / "unet-digits", HOSTILE_PT["a bare pickle"])
    monkeypatch.setattr(
        "orwcfm_fast.runs.load.load_data", lambda name: (_ for _ in ()).throw(InterruptedError)
    )
    with pytest.raises(InterruptedError):  # it would pretrain
        Loader(CPU).default()


def test_cifar_pickles_run_nothing_even_with_the_right_checksum(monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = Path("data/cifar-10-batches-py")
    folder.mkdir(parents=True)
    evil = [
        pickle.dumps({"data": Canary(), "labels": [0]}, protocol=2),
        b"cos\nsystem\n(S'touch canary'\ntR.",
    ]
    evil += [b"\x80\x02Pcanary\n.", pickle.dumps({"data": np.array([[Canary()]], object), "labels": [0]})]
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/")
    for data in evil:
        (folder / "data_batch_1").write_bytes(data)
        monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", hashlib.md5(data).hexdigest()]])
        with pytest.raises(UserError, match="cifar10"):
            load_data("cifar10", "data")
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            read_batch(folder / "data_batch_1")


IDX = {
    "a pickle": pickle.dumps(Canary()),
    "nothing": b"",
    "a count of 2³²": struct.pack(">IIII", 2051, 2**32 - 1, 28, 28) + bytes(784),
    "seven dimensions": struct.pack(">IIII", 2055, 1, 28, 28) + bytes(784),
    "numbers of an unknown kind": struct.pack(">IIII", 0xFF03, 1, 28, 28) + bytes(784),
    "no images": struct.pack(">IIII", 2051, 0, 28, 28),
}


@pytest.mark.parametrize("name", IDX)
def test_hostile_mnist_files_are_one_line(name, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(IDX[name])
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 1) + b"\x07")
    with pytest.raises(UserError, match="mnist"):
        load_data("mnist", "data")


def test_mnists_older_pickled_form_runs_nothing(monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    folder = Path("data/MNIST/processed")
    folder.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save((Canary(), Canary()), folder / name)
    with pytest.raises(UserError, match="mnist"):
        load_data("mnist", "data")


def png(width: int, height: int) -> bytes:
    """A PNG header that promises so many pixels."""
    import zlib

    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    "data",
    [pickle.dumps(Canary()), b"", png(2**31 - 1, 2**31 - 1), png(60_000, 60_000), png(10_000, 10_000), png(8, 8),
     b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n(canary) (w) file\n"],
    ids=["pickle", "nothing", "2⁶² pixels", "3.6e9 pixels", "1e8 pixels", "cut off", "PostScript"],
)  # fmt: skip
def test_hostile_pictures_are_one_line(data):
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be read as an image: pictures.a\.png") as refused:
        load_data("folder:pictures")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors", ".npz", ".npy"])
@pytest.mark.parametrize("name", ["a bare pickle", "torch's zip", "by build"])
def test_hostile_clip_weights_run_nothing(name, suffix):
    file = Path("clip" + suffix)
    if suffix in (".npz", ".npy"):
        array = np.array([Canary()], object)
        np.savez(file, array) if suffix == ".npz" else np.save(file, array)
    else:
        file.write_bytes(HOSTILE_PT[name])
    options = RewardOptions(prompt=["a"], negative=["b"], clip_model="ViT-S-32-alt", clip_weights=str(file))
    with pytest.raises(UserError, match="clip-weights") as refused:
        make_reward("clip", options)
    assert "\n" not in str(refused.value)


def test_a_signed_state_of_any_content_is_refused_in_one_line_on_resume(run_cli, tiny_run):
    newest = tiny_run / "checkpoints" / "step_6"
    state = json.loads((newest / "state.json").read_text())
    for change in ({"round": "two"}, {"step": None}, {"round": 10**400}, {"step": 7}):
        changed = {**state, **change}
        changed[checkpoint.OWN_DIGEST] = checkpoint._own_digest(changed)
        (newest / "state.json").write_text(json.dumps(changed))
        result = run_cli("finetune", "--resume", tiny_run, "--rounds", 3)
        assert result.code == 2 and result.err.count("\n") == 1, result.err
        assert "not one to go on from" in result.err or "is damaged" in result.err


def test_read_pt_takes_what_torch_saves():
    torch.save({"net_model": {"a": torch.arange(4.0)}, "step": 3}, "good.pt")
    assert read_pt("good.pt")["net_model"]["a"].tolist() == [0, 1, 2, 3]
