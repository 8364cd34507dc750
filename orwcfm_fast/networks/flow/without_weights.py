"""A pipeline without weights, whose parts give zeros of the right shapes: for checks and plans before loading."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.flow.call import DENOISERS, Condition, mapped
from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.networks.flow.inputs import sizes_of
from orwcfm_fast.networks.flow.learning import Traits, learn_shapes
from orwcfm_fast.torch_private import FakeTensorMode

CPU = torch.device("cpu")
METHODS = ("forward", "encode", "decode", "get_image_features", "get_text_features")
UNITS = [2**k for k in range(9)]  # that sizes may be multiples of


class PartCall(NamedTuple):
    """A call of a part that is no denoiser: the method and its arguments."""

    method: Callable[..., Any]
    args: tuple
    named: dict[str, Any]


def without_weights(
    pipe: Any, arguments: dict[str, Any], fake: FakeTensorMode, noted: list[PartCall] | None = None
) -> PipelineVelocity:
    """A field of `pipe`, whose modules are on the meta device; their calls give zeros.

    Args:
        noted: takes the calls of the parts that are no denoisers.
    """
    pipe = copy.copy(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part = pipe.__dict__[name] = copy.deepcopy(part)
            with fake:
                part.to_empty(device=CPU)
            for method in METHODS:
                if own := getattr(part, method, None):
                    calls = None if DENOISERS.match(name) else noted
                    setattr(part, method, functools.partial(_zeros, fake, calls, own))
    return PipelineVelocity(pipe, arguments, CPU)


def _zeros(
    fake: FakeTensorMode, noted: list[PartCall] | None, own: Callable[..., Any], *args: Any, **named: Any
) -> Any:
    def given(x: Tensor) -> Tensor:
        return x if fake.is_our_fake(x) else fake.from_tensor(x)

    if noted is not None:
        noted.append(PartCall(own, args, named))
    args, named = mapped((args, named), given, CPU)
    with fake, torch.no_grad():
        found = own(*args, **named)
    return mapped(found, lambda x: torch.zeros(x.shape, dtype=x.dtype), CPU)


def for_rows(values: Any, own: int, n: int) -> Any:
    """Arguments of a call for a single sample, `own` rows, as they are for n samples; without values.

    As in `batching.stack`, the rows of a tensor are its first dimension, those of a list its elements.
    """

    def grown(x: Tensor) -> Tensor:
        rows = n * own if x.ndim and len(x) == own else None
        return torch.empty(x.shape if rows is None else (rows, *x.shape[1:]), dtype=x.dtype)

    if isinstance(values, dict):
        return {key: for_rows(value, own, n) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(for_rows(value, own, n) for value in values)
    if isinstance(values, list) and len(values) == own:
        return [
            mapped(value, lambda x: torch.empty(x.shape, dtype=x.dtype), CPU)
            for _ in range(n)
            for value in values
        ]
    return mapped(values, grown, CPU)


def is_made(field: PipelineVelocity, inputs: dict[str, Any], sizes: dict[str, int]) -> bool:
    """Whether a pipeline called with `sizes` makes samples of just these."""
    condition = Condition(inputs | sizes)
    try:
        field.call(condition, recording=True, leave="encoded")
        field.traits = Traits()
        learn_shapes(field, condition, field.traits)
        output = field.call(condition, final=field.samples(1)).output
    except Exception:
        return False
    return sizes.items() <= sizes_of(field.decoded(output).shape).items()


def check_sizes(field: PipelineVelocity, inputs: dict[str, Any], sizes: dict[str, int], flag: str) -> None:
    """Look for what is wrong with `sizes`, which the pipeline did not make.

    Args:
        field: without weights.
        inputs: of its call, by default; sizes: of height, width and num_frames, those that were requested.
        flag: what the user calls height and width.

    Raises:
        UserError: a size that the pipeline cannot make; names those next to it.
    """
    for names, base, called, what in (
        (("height", "width"), 0, flag, "pixels"), (("num_frames",), 1, "num_frames", "frames"),
    ):  # fmt: skip
        given = [name for name in names if name in sizes]
        if not given:
            continue
        size = sizes[given[0]]
        makes = functools.cache(lambda n, given=given: is_made(field, inputs, {name: n for name in given}))
        if makes(size):
            continue
        for unit in UNITS:
            low = (size - base) // unit * unit + base
            if low > 0 and makes(low) and makes(low + unit):
                plus = f" plus {base}" if base else ""
                raise UserError(
                    f"{called} {size}: this pipeline makes multiples of {unit}{plus} {what}; "
                    f"use {low} or {low + unit}"
                )
        for unit in UNITS:
            low = (size - 1) // unit * unit
            if low > 0 and makes(low):
                raise UserError(f"{called} {size}: this pipeline knows images up to {low} {what}")
