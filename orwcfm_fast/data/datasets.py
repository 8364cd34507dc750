"""Datasets: name → samples [N, *shape]; images are float32 in [-1, 1], vectors in their own units."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.device import cache_dir
from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import Registry

DATA = Registry("data", group="orwcfm.data")
TOY_SAMPLES = 50_000
MAX_PIXELS = 50_000_000  # of one picture
SHIPPED = ("digits", "two-gaussians", "8gaussians", "moons", "checkerboard")  # at hand on every machine


@dataclass(frozen=True)
class Source:
    """A dataset before it is read.

    Attributes:
        load: (data_dir, argument) → samples [N, *shape], labels int64 [N] or None.
        shape: of a sample; None where the model decides (a folder of images).
        model, reward: the defaults for this data.
    """

    load: Callable[[Path, str], tuple[Tensor, Tensor | None]]
    shape: tuple[int, ...] | None
    model: str
    reward: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.load.__doc__)


def dataset(name: str, shape: tuple[int, ...] | None, model: str, reward: str):
    """Decorator: registers a loader with its sample shape and default model and reward."""

    def register(load):
        DATA.register(name)(Source(load, shape, model, reward))
        return load

    return register


def source(spec: str) -> tuple[Source, str]:
    """'NAME' or 'NAME:ARGUMENT' to the source and its argument."""
    name, _, argument = spec.partition(":")
    return DATA.get(name), argument


def load_data(spec: str, data_dir: str = "") -> tuple[Tensor, Tensor | None]:
    """Samples [N, *shape] and labels [N] (None where there are none) of `spec`.

    Raises:
        UserError: unknown dataset; files that are neither there nor downloadable.
    """
    found, argument = source(spec)
    samples, labels = found.load(Path(data_dir) if data_dir else cache_dir() / "data", argument)
    if not len(samples):
        raise UserError(f"data '{spec}': holds no samples")
    return samples, labels


@dataset("digits", (1, 8, 8), "unet-digits", "even-digits")
def digits(data_dir: Path, argument: str):
    """scikit-learn's 1,797 handwritten digits, 1×8×8, ship with it (UCI, Alpaydin & Kaynak)"""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.as_tensor(found.data, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return images, torch.as_tensor(found.target, dtype=torch.int64)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@dataset("two-gaussians", (1,), "mlp", "right")
def two_gaussians(data_dir: Path, argument: str):
    """½N(−1.5, 0.3²) + ½N(1.5, 0.3²) in one dimension"""
    g = _generator()
    side = torch.randint(0, 2, (TOY_SAMPLES, 1), generator=g)
    return (3.0 * side - 1.5) + 0.3 * torch.randn(TOY_SAMPLES, 1, generator=g), side[:, 0]


@dataset("8gaussians", (2,), "mlp", "right")
def eight_gaussians(data_dir: Path, argument: str):
    """eight Gaussians of deviation 0.2 on a circle of radius 2"""
    g = _generator()
    mode = torch.randint(0, 8, (TOY_SAMPLES,), generator=g)
    angle = mode * (math.pi / 4)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + 0.2 * torch.randn(TOY_SAMPLES, 2, generator=g), mode


@dataset("moons", (2,), "mlp", "right")
def moons(data_dir: Path, argument: str):
    """two interleaved half circles, centred, noise 0.05"""
    from sklearn.datasets import make_moons

    x, y = make_moons(TOY_SAMPLES, noise=0.05, random_state=0)
    x = torch.as_tensor(x, dtype=torch.float32)
    return 2 * (x - torch.tensor([0.5, 0.25])), torch.as_tensor(y)


@dataset("checkerboard", (2,), "mlp", "right")
def checkerboard(data_dir: Path, argument: str):
    """the eight dark squares of a 4×4 board over [−2, 2]²"""
    g = _generator()
    square = torch.randint(0, 8, (TOY_SAMPLES,), generator=g)
    row = square // 2
    corner = torch.stack([2 * (square % 2) + row % 2, row], 1) - 2.0
    return corner + torch.rand(TOY_SAMPLES, 2, generator=g), square


@dataset("mnist", (1, 28, 28), "unet-mnist", "brightness")
def mnist(data_dir: Path, argument: str):
    """MNIST, 60,000 images 1×28×28 (LeCun et al.), through torchvision"""
    from torchvision.datasets import MNIST

    files = "MNIST/raw/train-images-idx3-ubyte (and train-labels-idx1-ubyte)"
    found = _found_or_fetched(
        "mnist", data_dir, files, lambda fetch: MNIST(data_dir, train=True, download=fetch)
    )
    return found.data[:, None].float() / 127.5 - 1, torch.as_tensor(found.targets)


@dataset("cifar10", (3, 32, 32), "unet-cifar10", "jpeg-compressibility")
def cifar10(data_dir: Path, argument: str):
    """CIFAR-10, 50,000 images 3×32×32 (Krizhevsky), through torchvision"""
    from orwcfm_fast.data.cifar import FILES, read_cifar10

    data, labels = _found_or_fetched("cifar10", data_dir, FILES, lambda fetch: read_cifar10(data_dir, fetch))
    return data.float() / 127.5 - 1, labels


def _found_or_fetched(name: str, data_dir: Path, files: str, read: Callable[[bool], Any]) -> Any:
    """Local files if whole, else a download: `read` with False, then with True."""
    try:
        return read(False)
    except Exception:  # whatever a reader finds amiss with files, they are not whole
        pass
    try:
        return read(True)
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"data '{name}': not found whole in {data_dir} and no download possible ({reason}); "
            f"put {files} there, or name another --data-dir"
        ) from None


@dataset("folder", None, "unet-cifar10", "jpeg-compressibility")
def folder(data_dir: Path, argument: str):
    """folder:PATH, every PNG and JPEG below it, cropped square and resized to 32×32 RGB"""
    from PIL import Image, ImageOps

    if not Path(argument).is_dir():
        raise UserError(f"data 'folder:{argument}': no such folder; write folder:PATH")
    files = sorted(p for p in Path(argument).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise UserError(f"data 'folder:{argument}': no .png, .jpg or .jpeg below it")
    images = []
    for file in files:
        try:
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels, over {MAX_PIXELS:,}")
                fitted = ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.LANCZOS)
        except Exception as error:  # Pillow raises a dozen kinds
            raise UserError(f"data 'folder': {file} is not an image to be used: {error}") from None
        images.append(torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(32, 32, 3))
    return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1, None
