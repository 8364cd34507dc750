"""Prompts: read from a file, drawn by counted noise."""

import difflib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.files import lines, read_text
from orwcfm_fast.networks.flow.inputs import FILES

MAX_PROMPTS_BYTES = 8 << 20
OWN = ("prompt", "weight", "metadata", "held_out")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        weight: its share of the draws; metadata: what a reward may read beside the text.
        inputs: more that the pipeline is called with, JSON values; pictures by the path of their file.
        held_out: no training sample is drawn for it; the reward is measured on it.
    """

    text: str
    weight: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    held_out: bool = False

    @classmethod
    def of(cls, values: Any, takes: Collection[str] = ()) -> "Prompt":
        """From a JSON object with `prompt`, `weight` and `metadata`, and what its pipeline `takes` besides.

        Raises:
            ValueError: it is none; says why.
        """
        if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
            raise ValueError('should be an object with a text "prompt"')
        inputs = {key: value for key, value in values.items() if key not in OWN}
        if strange := inputs.keys() - set(takes):
            name = min(strange)
            near = difflib.get_close_matches(name, sorted({*OWN, *takes}), n=1)
            more = f", and what its pipeline's call takes: {', '.join(takes)}" if takes and not near else ""
            hint = f"; did you mean '{near[0]}'?" if near else more
            raise ValueError(f"knows prompt, weight and metadata, not '{name}'{hint}")
        try:
            values["prompt"].encode()
        except UnicodeEncodeError:
            raise ValueError("its prompt has half of a surrogate pair, which is no character") from None
        weight, metadata = values.get("weight", 1.0), values.get("metadata", {})
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError("weight should be a number above 0")
        if not isinstance(metadata, dict):
            raise ValueError("metadata should be an object")
        if not isinstance(held_out := values.get("held_out", False), bool):
            raise ValueError("held_out should be true or false")
        return cls(values["prompt"], float(weight), metadata, inputs, held_out)

    def to_json(self) -> dict[str, Any]:
        found = {"prompt": self.text, "weight": self.weight, "metadata": self.metadata, **self.inputs}
        return found | ({"held_out": True} if self.held_out else {})

    def from_folder(self, folder: Path) -> "Prompt":
        """The same with the paths of its pictures made absolute.

        Raises:
            ValueError: no such file.
        """

        def absolute(value: Any) -> Any:
            if isinstance(value, list):
                return [absolute(v) for v in value]
            if not isinstance(value, str):
                return value
            if not (folder / value).is_file():
                raise ValueError(f"no file {folder / value}")
            return str((folder / value).resolve())

        inputs = {k: absolute(v) if FILES.search(k) else v for k, v in self.inputs.items()}
        return replace(self, inputs=inputs)


def read_prompts(path: str | Path, takes: Collection[str] = (), flag: str = "--prompts") -> list[Prompt]:
    """The prompts of a file: a line each, or, where its first line begins with {, JSON lines.

    Args:
        takes: what their pipeline's call takes besides the text; such keys may be in a JSON line.
        flag: that named the file, for messages.

    Raises:
        UserError: no such file, a line that is no prompt, or none at all.
    """
    try:
        text = read_text(Path(path), MAX_PROMPTS_BYTES)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{flag} {path}: not text in UTF-8, or over {MAX_PROMPTS_BYTES >> 20} MiB") from None
    written = [(n, line.strip()) for n, line in enumerate(lines(text), 1) if line.strip()]
    if not written:
        raise UserError(f"{flag} {path}: holds no prompt; write one a line")
    if _is_json_array(text):
        raise UserError(f"{flag} {path}: is one JSON array; write JSON lines, an object with a prompt each")
    if not written[0][1].startswith("{"):
        return [Prompt(line) for _, line in written]
    found = []
    for n, line in written:
        try:
            found.append(Prompt.of(json.loads(line), takes).from_folder(Path(path).parent))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{flag} {path}: line {n}: {error}") from None
    return found


def _is_json_array(text: str) -> bool:
    try:
        return text.lstrip().startswith("[") and isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


class Conditions:
    """The table of prompts that a policy is conditioned on; a condition is a row number.

    Args:
        prompts: those that samples are drawn for, at least one; then those that are held out.
        device: where rows are wanted.

    Attributes:
        held_out: rows of the prompts that are held out.
    """

    def __init__(self, prompts: Sequence[Prompt], device: torch.device) -> None:
        self.prompts, self._device = list(prompts), device
        drawn = [p for p in prompts if not p.held_out]
        self.held_out = range(len(drawn), len(prompts))
        weights = torch.tensor([p.weight for p in drawn], dtype=torch.float64)
        self._shares = (weights / weights.sum()).cumsum(0).float().to(device)

    def __len__(self) -> int:
        """Number of prompts that samples are drawn for."""
        return len(self._shares)

    def at(self, u: Tensor) -> Tensor:
        """For each uniform number [B] in [0, 1) a row, int64 [B], with probability proportional to its weight."""
        return torch.searchsorted(self._shares, u, right=True).clamp_(max=len(self) - 1)

    def held_out_rows(self, n: int) -> Tensor:
        """Rows [n] of the held-out prompts in turn, int64."""
        return torch.tensor(self.held_out, device=self._device).repeat(-(-n // len(self.held_out)))[:n]

    def of(self, rows: Tensor) -> list[Prompt]:
        return [self.prompts[i] for i in rows.tolist()]
