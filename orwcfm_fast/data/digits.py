"""Handwritten digits: scikit-learn's and MNIST."""

from pathlib import Path

import torch

from orwcfm_fast.data.datasets import dataset, local_or_downloaded


@dataset("digits", (1, 8, 8), "unet-digits", "even-digits")
def digits(data_dir: Path, argument: str):
    """scikit-learn's 1,797 handwritten digits, 1×8×8, ship with it (UCI, Alpaydin & Kaynak)"""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.as_tensor(found.data, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return images, torch.as_tensor(found.target, dtype=torch.int64)


@dataset("mnist", (1, 28, 28), "unet-mnist-small", "even-digits")
def mnist(data_dir: Path, argument: str):
    """MNIST, 60,000 images 1×28×28 (LeCun et al.), through torchvision"""
    from torchvision.datasets import MNIST

    files = "MNIST/raw/train-images-idx3-ubyte (and train-labels-idx1-ubyte)"
    found = local_or_downloaded(
        "mnist", data_dir, files, lambda fetch: MNIST(data_dir, train=True, download=fetch)
    )
    return found.data[:, None].float() / 127.5 - 1, torch.as_tensor(found.targets)
