"""Datasets: shapes, ranges, determinism; files of the true format are read, broken ones named."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

from orwcfm_fast.data.datasets import DATA, load_data
from orwcfm_fast.errors import UserError


@pytest.mark.parametrize("name", ["digits", "two-gaussians", "8gaussians", "moons", "checkerboard"])
def test_what_ships_has_its_shape_and_is_always_the_same(name):
    x, labels = load_data(name)
    again, _ = load_data(name)
    assert tuple(x.shape[1:]) == DATA.get(name).shape and x.dtype == torch.float32 and torch.equal(x, again)
    assert labels is not None and len(labels) == len(x)


def test_digits_are_the_1797_real_ones():
    x, labels = load_data("digits")
    assert x.shape == (1797, 1, 8, 8) and float(x.min()) == -1 and float(x.max()) == 1
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_toy_densities_are_what_they_say():
    x, side = load_data("two-gaussians")
    assert abs(float(x[side == 1].mean()) - 1.5) < 0.01 and abs(float(x[side == 0].std()) - 0.3) < 0.01
    x, _ = load_data("8gaussians")
    assert abs(float(x.norm(dim=1).mean()) - 2.01) < 0.02
    x, _ = load_data("checkerboard")
    cell = (x + 2).floor().long()
    assert bool(((cell.sum(1) % 2) == 0).all()), "every square has the same colour"
    assert float(x.min()) >= -2 and float(x.max()) <= 2


def test_mnist_files_in_idx_format_are_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, 5, 28, 28) + pixels.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 5) + bytes([7, 2, 1, 0, 4]))
    x, labels = load_data("mnist", str(tmp_path))
    assert x.shape == (5, 1, 28, 28) and labels.tolist() == [7, 2, 1, 0, 4]
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8)[:, 0], torch.as_tensor(pixels))


def python2_batch(pixels: np.ndarray, label: int) -> bytes:
    """One image and its label as Python 2 and its NumPy pickled the published files."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86"
    )
    dtype = (
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    )
    content = b"T" + struct.pack("<I", pixels.size) + pixels.tobytes()
    return b"\x80\x02}(U\x04data" + array + dtype + content + b"tbU\x06labels]K" + bytes([label]) + b"au."


def test_cifar_batches_are_read_only_when_they_are_the_true_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    batches = [python2_batch(pixels[i], i) for i in range(5)]
    for i, batch in enumerate(batches):
        (folder / f"data_batch_{i + 1}").write_bytes(batch)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="data_batch_1"):
        load_data("cifar10", str(tmp_path))
    true = [[f"data_batch_{i + 1}", hashlib.md5(batch).hexdigest()] for i, batch in enumerate(batches)]
    monkeypatch.setattr(CIFAR10, "train_list", true)
    x, labels = load_data("cifar10", str(tmp_path))
    assert x.shape == (5, 3, 32, 32) and labels is not None and labels.tolist() == [0, 1, 2, 3, 4]
    red = ((x[2, 0] + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(red, torch.as_tensor(pixels[2, :1024]).view(32, 32))


def test_a_folder_of_images_is_cropped_and_resized(tmp_path):
    from PIL import Image

    (tmp_path / "deep").mkdir()
    Image.new("RGB", (64, 40), (255, 0, 0)).save(tmp_path / "deep" / "b.png")
    Image.new("L", (10, 10), 255).save(tmp_path / "a.jpg")
    x, _ = load_data(f"folder:{tmp_path}")
    assert x.shape == (2, 3, 32, 32) and x[1, :, 0, 0].tolist() == [1, -1, -1]
    (tmp_path / "c.png").write_bytes(gzip.compress(b"no image"))
    with pytest.raises(UserError, match=r"c\.png"):
        load_data(f"folder:{tmp_path}")
    with pytest.raises(UserError, match=r"no \.png"):
        (tmp_path / "empty").mkdir()
        load_data(f"folder:{tmp_path / 'empty'}")
