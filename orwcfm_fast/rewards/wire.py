"""What an HTTP reward and its server send each other: safetensors files, as docs/rewards.md describes them."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_HEADER = 16 << 20
TYPE = "application/octet-stream"


def pack(name: str, tensor: Tensor, notes: dict[str, Any]) -> bytes:
    """One tensor as a safetensors file; `notes` stand in its `__metadata__`, each as JSON."""
    import safetensors.torch

    metadata = {key: json.dumps(value) for key, value in notes.items() if value is not None}
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous()}, metadata)


def unpack(body: bytes, name: str) -> tuple[Tensor, dict[str, Any]]:
    """The tensor and the notes of such a file; of what a stranger sends nothing is trusted.

    Raises:
        ValueError: it is no such file, holds another tensor, or none of floating point with at least one sample.
    """
    import safetensors.torch

    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or not 2 <= size <= min(MAX_HEADER, len(body) - 8):
        raise ValueError("not a safetensors file")
    try:
        header = json.loads(body[8 : 8 + size])
        notes = {key: json.loads(text) for key, text in header.get("__metadata__", {}).items()}
        found = safetensors.torch.load(body)
    except Exception as error:  # also safetensors' own, which has no common base
        raise ValueError(f"not a safetensors file ({type(error).__name__})") from None
    if set(found) != {name}:
        raise ValueError(f"should hold one tensor '{name}', holds {sorted(found)[:4]}")
    tensor = found[name]
    if tensor.dtype not in (torch.float32, torch.float64) or tensor.dim() == 0 or tensor.numel() == 0:
        raise ValueError(
            f"'{name}' should be F32 or F64 with at least one sample, is {tensor.dtype} {[*tensor.shape]}"
        )
    return tensor, notes


def listed(notes: dict[str, Any], key: str, kind: type, count: int) -> list | None:
    """The list of `count` values of one kind that the notes hold under `key`, if any.

    Raises:
        ValueError: it is another value.
    """
    values: Sequence | None = notes.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count or not all(isinstance(v, kind) for v in values):
        raise ValueError(f"'{key}' should be a JSON list of {count}, one a sample")
    return values
