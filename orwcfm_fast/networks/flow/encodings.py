"""Encodings of a pipeline's conditions: computed once, kept on disk by what they were made of and from.

They are read through memory maps, of which a few are open: what is in memory does not grow with the number of prompts.
"""

import functools
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, overload

import torch

from orwcfm_fast.device import cache_dir
from orwcfm_fast.errors import WorkError
from orwcfm_fast.networks.flow.call import DENOISERS, Condition
from orwcfm_fast.networks.flow.inputs import paths_of, read_files

SAMPLED, BLOCK = 64, 1 << 16
OPEN = 32  # conditions that are held at once
TRUSTED = (
    "torch",
    "transformers.",
    "diffusers.",
    "collections",
    "numpy",
)  # modules that encodings are built of


def fingerprint(folder: Path) -> str:
    """Of all parts that encode: small files whole, of large ones the size and 64 blocks in between."""
    digest = hashlib.sha256()
    parts = sorted(part for part in folder.iterdir() if part.is_dir() and not DENOISERS.match(part.name))
    for file in (p for part in parts for p in sorted(part.rglob("*")) if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size} ".encode())
        with file.open("rb") as data:
            if size <= SAMPLED * BLOCK:
                digest.update(data.read())
                continue
            for k in range(SAMPLED):
                data.seek((size - BLOCK) * k // (SAMPLED - 1))
                digest.update(data.read(BLOCK))
    return digest.hexdigest()


def encoded(
    folder: Path,
    made_of: dict[str, Any],
    inputs: Sequence[dict[str, Any]],
    encode: Callable[[Sequence[dict[str, Any]]], Iterator[Condition]],
) -> "CachedConditions":
    """Conditions of `inputs`, in the cache from now on.

    Args:
        folder: of the pipeline.
        made_of: JSON values of all else that encodings depend on.
        encode: gives the conditions that are missing, one after the other.
    """
    common = {
        "of": fingerprint(folder), **made_of, "versions": [version("diffusers"), version("transformers")],
    }  # fmt: skip
    files = [cache_dir() / "encodings" / f"{_digest(common, each)}.pt" for each in inputs]
    missing = [i for i, file in enumerate(files) if _load(file) is None]
    if missing:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for i, condition in zip(missing, encode([inputs[i] for i in missing]), strict=True):
            beside = files[i].with_name(f".{files[i].name}.{os.getpid()}.part")
            torch.save(condition.encodings, beside)
            beside.rename(files[i])
    return CachedConditions(inputs, files)


class CachedConditions(Sequence[Condition]):
    """Conditions that are read from the cache when they are used; the `OPEN` used last are held.

    Args:
        inputs: of each condition; files: with its encodings.
    """

    def __init__(self, inputs: Sequence[dict[str, Any]], files: Sequence[Path]) -> None:
        self._files = files
        self._read = functools.lru_cache(OPEN)(lambda row: _condition(inputs[row], files[row]))

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, row: int) -> Condition: ...
    @overload
    def __getitem__(self, row: slice) -> list[Condition]: ...
    def __getitem__(self, row: int | slice) -> Condition | list[Condition]:
        """
        Raises:
            WorkError: a file of the cache is gone or damaged.
        """
        if isinstance(row, slice):
            return [self[i] for i in range(len(self))[row]]
        return self._read(range(len(self))[row])

    def read_ahead(self, rows: Iterable[int]) -> None:
        """Have the system read the files of these rows in the background, where it can."""
        if not hasattr(os, "posix_fadvise"):
            return
        for row in dict.fromkeys(rows):
            with suppress(OSError), self._files[row].open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _digest(common: dict[str, Any], inputs: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([common, inputs], sort_keys=True).encode())
    for path in paths_of(inputs):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _condition(inputs: dict[str, Any], file: Path) -> Condition:
    with torch.inference_mode(False):  # a rollout may be the first to read what a gradient step then saves
        encodings = _load(file)
    if encodings is None:
        raise WorkError(f"{file}: gone or damaged; the same command encodes it again")
    return Condition(read_files(inputs), encodings)


class _Unpickler(pickle.Unpickler):
    """Builds what encodings consist of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if not module.startswith(TRUSTED) and (module, name) != ("builtins", "set"):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _load(file: Path) -> list[Any] | None:
    reader = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="restricted")
    try:
        return torch.load(file, "cpu", mmap=True, weights_only=False, pickle_module=reader)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, LookupError, AttributeError):
        return None
