"""CIFAR-10's Python files, which are pickles, read without running what a pickle may ask for."""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from orwcfm_fast.data.datasets import dataset, local_or_downloaded

FILES = "cifar-10-batches-py/data_batch_1 … data_batch_5"
# as numpy of Python 2 wrote them; anything else a pickle names is refused
ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArraysOnly(pickle.Unpickler):
    """Dicts, lists, texts, numbers and NumPy arrays; no other function or class is ever looked up."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"refused, its pickle asks for {module}.{name}")
        return ARRAYS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refused, its pickle asks for more than arrays")


def read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Pixels uint8 [N, 3072] and labels of one batch file.

    Raises:
        ValueError, UnpicklingError: it holds anything else.
    """
    with path.open("rb") as file:
        found = ArraysOnly(file).load()
    data, labels = np.asarray(found["data"]), [int(label) for label in found["labels"]]
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape != (len(labels), 3072):
        raise ValueError(f"{path.name} holds {data.dtype}{list(data.shape)}, should be uint8[N, 3072]")
    return data, labels


def read_cifar10(data_dir: Path, fetch: bool) -> tuple[Tensor, Tensor]:
    """The training images uint8 [50000, 3, 32, 32] and labels [50000]; downloaded first if `fetch`.

    Raises:
        RuntimeError: a file is missing or not the published one (by its MD5), and nothing was downloaded.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    files = [(data_dir / CIFAR10.base_folder / name, md5) for name, md5 in CIFAR10.train_list]
    if fetch and not all(check_integrity(path, md5) for path, md5 in files):
        download_and_extract_archive(
            CIFAR10.url, str(data_dir), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5
        )
    for path, md5 in files:
        if not check_integrity(path, md5):
            raise RuntimeError(f"{path.name} is missing or not the published one")
    batches = [read_batch(path) for path, _ in files]
    images = torch.from_numpy(np.concatenate([data for data, _ in batches])).view(-1, 3, 32, 32)
    return images, torch.tensor([label for _, labels in batches for label in labels])


@dataset("cifar10", (3, 32, 32), "unet-cifar10", "jpeg-compressibility")
def cifar10(data_dir: Path, argument: str):
    """CIFAR-10, 50,000 images 3×32×32 (Krizhevsky), through torchvision"""
    data, labels = local_or_downloaded(
        "cifar10", data_dir, FILES, lambda fetch: read_cifar10(data_dir, fetch)
    )
    return data.float() / 127.5 - 1, labels
