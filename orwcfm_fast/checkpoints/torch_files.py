"""Weight files written by others, read without running their pickles.

torchcfm's and the paper's scripts, Lightning, DDP, torch.compile, and bare state dicts, as `.pt` or `.safetensors`.
"""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.checkpoints.headers import check_pt, check_safetensors
from orwcfm_fast.errors import UserError

KEYS = ("ema_model", "net_model")
"""Of torchcfm's scripts."""
OTHER_KEYS = (
    "ema",
    "model_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model",
    "network",
    "net",
    "weights",
)
"""Under which other trainers keep a state dict, averaged ones first."""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing add anywhere in a name; DDP adds "module" in front."""


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


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers around its network add, in any order and number."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _is_state_dict(found: Any) -> bool:
    return isinstance(found, dict) and bool(found) and all(isinstance(v, Tensor) for v in found.values())


def _state_dict(found: Any, keys: tuple[str, ...], depth: int = 3) -> dict[str, Tensor] | None:
    """The first dict of tensors under `keys`, which may be nested, or `found` itself."""
    if _is_state_dict(found):
        return found
    if not isinstance(found, dict) or depth == 0:
        return None
    inner = (_state_dict(found[key], keys, depth - 1) for key in keys if key in found)
    return next((weights for weights in inner if weights is not None), None)


def foreign_weights(
    found: dict[str, Any], where: str | Path, keys: tuple[str, ...] = (*KEYS, *OTHER_KEYS)
) -> dict[str, Tensor]:
    """The first state dict under `keys` in a foreign checkpoint, or a bare one, by `plain_name`.

    Raises:
        UserError: there is none; names what was found.
    """
    weights = _state_dict(found, keys)
    if weights is None:
        raise UserError(
            f"checkpoint {where}: no weights found; expected a state dict, bare or under {' or '.join(keys)} "
            f"(has: {_short(found)})"
        )
    plain = {plain_name(str(name)): value for name, value in weights.items()}
    if len(plain) < len(weights):
        raise UserError(
            f"checkpoint {where}: two of its weights have one name without module. and _orig_mod."
        )
    plain.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    return plain


def named_for(weights: dict[str, Tensor], own: Collection[str], where: str | Path) -> dict[str, Tensor]:
    """Weights under the names of a network that was an attribute of what was saved, as in Lightning's checkpoints.

    Args:
        own: the network's names. Those of `weights` may all have one prefix in front, e.g. "model."; weights
            without that prefix are of other networks. Of several such networks an averaged one ("ema") is taken.

    Raises:
        UserError: several networks have these names.
    """
    if not own:
        return weights
    first = min(own)
    starts = [n.removesuffix(first) for n in weights if n == first or n.endswith(f".{first}")]
    fits = [start for start in starts if all(start + name in weights for name in own)]
    averaged = [start for start in fits if "ema" in start.lower()]
    fits = averaged or (fits if "" not in fits else [""])
    if len(fits) > 1:
        raise UserError(
            f"checkpoint {where}: holds {len(fits)} networks that fit: {', '.join(sorted(fits)[:4])}"
        )
    start = fits[0] if fits else ""
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}


def read_weights(path: str | Path, what: str = "checkpoint", keys: tuple[str, ...] = (*KEYS, *OTHER_KEYS)):
    """Weights by `plain_name` of a .safetensors file, or of a `.pt` as `foreign_weights` reads it.

    Args:
        what: how messages call the file, e.g. "classifier".

    Raises:
        UserError: missing, damaged, no weights, or a pickle that would run code.
    """
    path = Path(path)
    try:
        if path.suffix.lower() != ".safetensors" or not path.is_file():
            return foreign_weights(read_pt(path), path, keys)
        import safetensors.torch

        check_safetensors(path)
        return foreign_weights(safetensors.torch.load_file(path), path, keys)
    except UserError as error:
        raise UserError(f"{what}{str(error).removeprefix('checkpoint')}") from None
    except Exception as error:
        raise UserError(f"{what} {path}: not a safetensors file: {str(error).splitlines()[0]}") from None


def describe_weights(weights: dict[str, Tensor]) -> str:
    """How many tensors, and the first of them, in words."""
    name = next(iter(weights))
    shape = "×".join(map(str, weights[name].shape)) or "a number"
    return f"{len(weights)} tensors, the first '{name[:60]}' ({shape})"


def _short(found: dict[str, Any]) -> str:
    names = [k[:40] if isinstance(k, str) else type(k).__name__ for k in list(found)[:6]]
    return ", ".join(names) + (" …" if len(found) > 6 else "")
