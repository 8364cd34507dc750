"""Calls of a denoiser for several rows, as one call where their arguments have one form."""

from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.networks.flow.call import DenoiserCall, leaves

Calls = dict[int, DenoiserCall]  # of one row, by number


class DifferentForms(Exception):
    """Values that cannot be stacked into one batch."""


def answer_together(requests: list[Calls]) -> list[dict[int, Any]]:
    """Outputs of every row's calls; rows whose arguments have the same shapes share a call.

    Args:
        requests: by row, its calls.
    """
    found: list[dict[int, Any]] = [{} for _ in requests]
    groups: dict[Any, list[int]] = {}
    for row, calls in enumerate(requests):
        for number, call in calls.items():
            form = tuple(
                x.shape if isinstance(x, Tensor) else type(x) for x in leaves((call.args, call.named))
            )
            groups.setdefault((call.name, number, form), []).append(row)
    for (_, number, _), rows in groups.items():
        for row, out in zip(rows, _outputs([requests[r][number] for r in rows]), strict=True):
            found[row][number] = out
    return found


def main_input(call: DenoiserCall) -> Any:
    """The sample that a denoiser is given: its length is the number of rows of the call."""
    return call.named.get("hidden_states", call.args[0] if call.args else None)


def _outputs(calls: list[DenoiserCall]) -> list[Any]:
    first = calls[0]
    n = len(main_input(first))
    try:
        args = stack([list(call.args) for call in calls], n, top=True)
        named = stack([call.named for call in calls], n, top=True)
    except DifferentForms:
        return [call.module(*call.args, **call.named) for call in calls]
    return unstack(first.module(*args, **named), n, len(calls))


def stack(values: list[Any], n: int, top: bool = False) -> Any:
    """One tree of several: tensors of n rows and lists of n are concatenated, all else must be equal.

    Raises:
        DifferentForms: it is not.
    """
    first = values[0]
    if isinstance(first, Tensor):
        if first.ndim and len(first) == n:
            return torch.cat(values)
        same = all(v is first or torch.equal(v, first) for v in values)
    elif isinstance(first, dict):
        return {k: stack([v[k] for v in values], n) for k in first}
    elif isinstance(first, list) and len(first) == n and not top:
        return [x for v in values for x in v]
    elif isinstance(first, list | tuple):
        return type(first)(stack(list(vs), n) for vs in zip(*values, strict=True))
    else:
        same = all(v is first or v == first for v in values)
    if not same:
        raise DifferentForms
    return first


def unstack(value: Any, n: int, count: int) -> list[Any]:
    """Inverse of `stack` for outputs: `count` trees of n rows each."""
    if isinstance(value, Tensor):
        return list(value.split(n)) if value.ndim and len(value) == n * count else [value] * count
    if isinstance(value, list) and len(value) == n * count:
        return [value[i * n : (i + 1) * n] for i in range(count)]
    if isinstance(value, list | tuple):
        return [type(value)(parts) for parts in zip(*(unstack(v, n, count) for v in value), strict=True)]
    if isinstance(value, dict):
        by = {k: unstack(v, n, count) for k, v in value.items()}
        return [type(value)({k: v[i] for k, v in by.items()}) for i in range(count)]
    return [value] * count
