"""Prompts: read from a file, drawn by counted noise, looked up as embeddings."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.files import lines, read_text

MAX_PROMPTS_BYTES = 8 << 20
ON_DEVICE_BYTES = 1 << 30  # larger tables stay in main memory


@dataclass(frozen=True)
class Prompt:
    """One prompt; `weight` is its share of the draws, `metadata` what a reward may read beside the text."""

    text: str
    weight: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Any) -> "Prompt":
        """From a JSON object with `prompt`, and `weight` and `metadata` where it has them.

        Raises:
            ValueError: it is none; says why.
        """
        if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
            raise ValueError('should be an object with a text "prompt"')
        if strange := values.keys() - {"prompt", "weight", "metadata"}:
            raise ValueError(f"knows prompt, weight and metadata, not '{min(strange)}'")
        try:
            values["prompt"].encode()
        except UnicodeEncodeError:
            raise ValueError("its prompt has half of a surrogate pair, which is no character") from None
        weight, metadata = values.get("weight", 1.0), values.get("metadata", {})
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError("weight should be a number above 0")
        if not isinstance(metadata, dict):
            raise ValueError("metadata should be an object")
        return cls(values["prompt"], float(weight), metadata)

    def to_json(self) -> dict[str, Any]:
        return {"prompt": self.text, "weight": self.weight, "metadata": self.metadata}


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: a line each, or, where its first line begins with {, JSON lines.

    Raises:
        UserError: no such file, a line that is no prompt, or none at all.
    """
    try:
        text = read_text(Path(path), MAX_PROMPTS_BYTES)
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(
            f"--prompts {path}: not text in UTF-8, or over {MAX_PROMPTS_BYTES >> 20} MiB"
        ) from None
    written = [(n, line.strip()) for n, line in enumerate(lines(text), 1) if line.strip()]
    if not written:
        raise UserError(f"--prompts {path}: holds no prompt; write one a line")
    if _is_json_array(text):
        raise UserError(
            f"--prompts {path}: is one JSON array; write JSON lines, an object with a prompt each"
        )
    if not written[0][1].startswith("{"):
        return [Prompt(line) for _, line in written]
    found = []
    for n, line in written:
        try:
            found.append(Prompt.of(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"--prompts {path}: line {n}: {error}") from None
    return found


def _is_json_array(text: str) -> bool:
    try:
        return text.lstrip().startswith("[") and isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


class Conditions:
    """The table of prompts that a policy is conditioned on; a condition is a row number.

    Args:
        prompts: P of them.
        embeddings: tensors [P + 1, …] by the order in which the network takes them; the last row is no prompt.
        device: where rows are wanted.
    """

    def __init__(self, prompts: Sequence[Prompt], embeddings: Sequence[Tensor], device: torch.device) -> None:
        self.prompts, self.device = list(prompts), device
        there = device if sum(e.nbytes for e in embeddings) <= ON_DEVICE_BYTES else torch.device("cpu")
        self._embeddings = [e.to(there) for e in embeddings]
        weights = torch.tensor([p.weight for p in prompts], dtype=torch.float64)
        self._shares = (weights / weights.sum()).cumsum(0).float().to(device)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def nbytes(self) -> int:
        """Of the table, where it lies on the device."""
        return sum(e.nbytes for e in self._embeddings if e.device == self.device)

    @property
    def none(self) -> int:
        """The row of no prompt."""
        return len(self.prompts)

    def at(self, u: Tensor) -> Tensor:
        """For each uniform number [B] in [0, 1) a row, int64 [B], with probability proportional to its weight."""
        return torch.searchsorted(self._shares, u, right=True).clamp_(max=len(self) - 1)

    def look_up(self, rows: Tensor) -> list[Tensor]:
        """Embeddings [B, …] of rows [B]."""
        return [e[rows.to(e.device)].to(self.device) for e in self._embeddings]

    def of(self, rows: Tensor) -> list[Prompt]:
        return [self.prompts[i] for i in rows.tolist()]
