"""The registry of datasets: name → samples [N, *shape]; images are float32 in [-1, 1], vectors in their own units."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from orwcfm_fast.device import cache_dir
from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import Registry

DATA = Registry("data", package="orwcfm_fast.data", group="orwcfm.data")
SHIPPED = ("digits", "two-gaussians", "8gaussians", "moons", "checkerboard")
"""Those that need no download."""


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


def local_or_downloaded(name: str, data_dir: Path, files: str, read: Callable[[bool], Any]) -> Any:
    """`read(False)` from local files; where they are not whole, `read(True)`, which downloads them.

    Raises:
        UserError: neither is possible; names the files and where they belong.
    """
    try:
        return read(False)
    except Exception:  # a reader raises many kinds for files that are not whole
        pass
    try:
        return read(True)
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"data '{name}': not found whole in {data_dir} and no download possible ({reason}); "
            f"put {files} there, or name another --data-dir"
        ) from None
