"""Checkpoints written by others: torchcfm's scripts and the paper's, read without running their pickles."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.checkpoints.headers import check_pt, check_safetensors
from orwcfm_fast.errors import UserError

KEYS = ("ema_model", "net_model")


def read_pt(path: str | Path) -> dict[str, Any]:
    """A `.pt` file's dict, tensors on the CPU, with `weights_only=True`.

    Raises:
        UserError: missing, truncated, not a torch file, or a pickle that would run code.
    """
    path = Path(path)
    try:
        check_pt(path)
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "Unsupported" in str(error):
            raise UserError(f"checkpoint {path}: refused, its pickle asks for more than tensors") from None
        raise UserError(f"checkpoint {path}: not a torch checkpoint, or a truncated one") from None
    except Exception:
        raise UserError(f"checkpoint {path}: not a torch checkpoint, or a truncated one") from None
    if not isinstance(found, dict):
        raise UserError(f"checkpoint {path}: holds a {type(found).__name__}, not a dict of weights")
    return found


def foreign_weights(
    found: dict[str, Any], where: str | Path, keys: tuple[str, ...] = KEYS
) -> dict[str, Tensor]:
    """The first of `keys` in a foreign checkpoint, or a bare state dict; a "module." prefix is dropped.

    Raises:
        UserError: none of them is there, or its values are not tensors.
    """
    key = next((k for k in keys if k in found), None)
    weights = found if key is None else found[key]
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(v, Tensor) for v in weights.values())
    ):
        raise UserError(
            f"checkpoint {where}: no weights found; expected {' or '.join(keys)} (has: {_short(found)})"
        )
    return {str(k).removeprefix("module."): v for k, v in weights.items()}


def read_weights(path: str | Path, what: str) -> dict[str, Tensor]:
    """Weights by name of a .safetensors file or a `.pt`, bare or under "state_dict", "model" or torchcfm's keys.

    Args:
        what: how messages call the file, e.g. "classifier".

    Raises:
        UserError: missing, damaged, no weights, or a pickle that would run code.
    """
    path = Path(path)
    try:
        if path.suffix != ".safetensors" or not path.is_file():
            return foreign_weights(read_pt(path), path, (*KEYS, "state_dict", "model"))
        import safetensors.torch

        check_safetensors(path)
        return safetensors.torch.load_file(path)
    except UserError as error:
        raise UserError(f"{what}{str(error).removeprefix('checkpoint')}") from None
    except Exception as error:
        raise UserError(f"{what} {path}: not a safetensors file: {error}") from None


def _short(found: dict[str, Any]) -> str:
    names = [k[:40] if isinstance(k, str) else type(k).__name__ for k in list(found)[:6]]
    return ", ".join(names) + (" …" if len(found) > 6 else "")
