"""Checkpoints: a directory of safetensors and a state.json; a reader sees a whole one or none."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orwcfm_fast.checkpoints.headers import check_safetensors
from orwcfm_fast.errors import UserError
from orwcfm_fast.files import read_small
from orwcfm_fast.sharding import all_like, like

Tensors = dict[str, Tensor]
STATE, OWN_DIGEST = "state.json", "sha256_of_this"
MAX_STATE_BYTES = 16 << 20
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load` found: `state` as saved, `tensors` by file stem ("model", "ema", "optimizer", …)."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, Tensors]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {name: version(name) for name in ("orwcfm-fast", "torch", "torchcfm", "numpy", "safetensors")}


def save(path: str | Path, state: dict[str, Any], **tensors: Tensors) -> Path:
    """Write a checkpoint beside, flush it to disk, then rename it to `path`; an older one there is replaced.

    Args:
        state: JSON values; versions, the files' sha256 and its own are added. Its "metadata" holds, by file, texts
            for the header of that file as well.
        tensors: one safetensors file for each argument.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        beside.mkdir()
        digests = {}
        for name, values in tensors.items():
            file = f"{name}.safetensors"
            digests[file] = _write(beside / file, _safetensors(values, state.get("metadata", {}).get(name)))
        state = json.loads(json.dumps({**state, "versions": versions(), "sha256": digests}))
        _write(beside / STATE, [json.dumps({**state, OWN_DIGEST: _own_digest(state)}, indent=1).encode()])
        _flush(beside)
        if path.exists():
            path.rename(old)
        beside.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return path


def copied(files: dict[str, Tensors]) -> dict[str, Tensors]:
    """Copies in host memory, which training does not change."""
    return {
        stem: {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        for stem, tensors in files.items()
    }


def _own_digest(state: dict[str, Any]) -> str:
    rest = {k: v for k, v in state.items() if k != OWN_DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write a file part by part and flush it to disk; its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _safetensors(tensors: Tensors, metadata: dict[str, str] | None) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file: its header, then a tensor at a time, the widest elements first.

    safetensors' own functions hold a copy of the whole file in memory.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}} if metadata else {}
    end = 0
    for name, value in ordered:
        start, end = end, end + value.numel() * value.element_size()
        header[name] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, value in ordered:
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: str | Path, only: tuple[str, ...] | None = None) -> Checkpoint:
    """Read and verify a checkpoint directory.

    Args:
        only: stems of the files to read; all where None.

    Raises:
        UserError: no checkpoint there, or one that is damaged; names the file.
    """
    import safetensors.torch

    path = Path(path)
    state = _read_state(path)
    tensors = {}
    for name, digest in state["sha256"].items():
        stem = name.removesuffix(".safetensors")
        if stem == name or not stem.isidentifier():
            raise UserError(f"checkpoint {path}: {STATE} names a strange file {name[:80]!r}")
        if only is not None and stem not in only:
            continue
        try:
            check_safetensors(path / name)
            data = (path / name).read_bytes()
        except OSError as error:
            raise UserError(f"checkpoint {path}: {name}: {error.strerror or error}") from None
        except ValueError as error:
            raise UserError(f"checkpoint {path}: {name} is damaged: {error}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"checkpoint {path}: {name} is damaged (its sha256 is not the one in {STATE})")
        try:
            tensors[stem] = safetensors.torch.load(data)
        except Exception as error:
            raise UserError(f"checkpoint {path}: {name} is not a safetensors file: {error}") from None
    return Checkpoint(path, state, tensors)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(read_small(path / STATE, MAX_STATE_BYTES))
        digests = state["sha256"]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in digests.items()):
            raise TypeError
        whole = state[OWN_DIGEST] == _own_digest(state)
    except OSError as error:
        raise UserError(f"checkpoint {path}: {STATE}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"checkpoint {path}: {STATE} is damaged or not one of orwcfm's") from None
    if not whole:
        raise UserError(f"checkpoint {path}: {STATE} is damaged (its sha256 is not the one in it)")
    return state


def is_checkpoint(path: Path) -> bool:
    return (path / STATE).is_file()


@contextmanager
def reading(found: Checkpoint) -> Iterator[None]:
    """Within this context, wrong values in a checkpoint become one line that names it.

    Raises:
        UserError: in place of what the values caused.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"checkpoint {found.path}: not one to go on from ({why})") from None


def load_weights(network: nn.Module, weights: Tensors, where: str) -> None:
    """Strict load into `network`.

    Raises:
        UserError: keys or shapes that do not fit; names the first of each.
    """
    own = network.state_dict()
    problems = []
    for label, keys in (("missing", own.keys() - weights.keys()), ("unknown", weights.keys() - own.keys())):
        if keys:
            problems.append(f"{len(keys)} {label} keys (first '{min(keys)}')")
    for key in sorted(own.keys() & weights.keys()):
        if own[key].shape != weights[key].shape:
            problems.append(f"'{key}' is {tuple(weights[key].shape)}, should be {tuple(own[key].shape)}")
            break
    if problems:
        found = f"has {len(weights)} tensors, needs {len(own)}"
        raise UserError(f"{where}: weights of another architecture: {found}; {'; '.join(problems)}")
    network.load_state_dict(all_like(weights, network))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """State of an optimiser as flat tensors, "index.name"."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, values in state.items() for k, v in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, where: str) -> None:
    """Inverse of `optimizer_tensors`; hyperparameters stay those of `optimizer`.

    Raises:
        UserError: the state is of other parameters.
    """
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state.items():
        if i >= len(parameters) or values["exp_avg"].shape != parameters[i].shape:
            raise UserError(f"{where}: optimizer state of another architecture (parameter {i})")
        for name, value in values.items():
            if (
                value.shape == parameters[i].shape
            ):  # in the parameter's own layout: fused steps pair them flat
                own = torch.empty_like(parameters[i], dtype=value.dtype)
                values[name] = own.copy_(like(value, own))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
