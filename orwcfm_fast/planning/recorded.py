"""A pipeline's calls of its denoisers and its VAE, recorded for one sample and made again for any number."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.networks.flow.batching import main_input
from orwcfm_fast.networks.flow.call import Condition, DenoiserCall, leaves
from orwcfm_fast.networks.flow.description import Description
from orwcfm_fast.networks.flow.field import PipelineVelocity
from orwcfm_fast.networks.flow.learning import CHECKED_TIME, Traits, learn_shapes
from orwcfm_fast.networks.flow.without_weights import PartCall, for_rows, without_weights
from orwcfm_fast.torch_private import FakeTensorMode

CPU = torch.device("cpu")


class RecordedVelocity(PipelineVelocity):
    """Makes the calls that a velocity and a decoding of one sample make, for a batch; values are nobody's.

    Attributes:
        calls: of the denoisers for a velocity; decoding: of other parts; decoded_shape: of one decoded sample.
    """

    calls: list[DenoiserCall]
    decoding: list[PartCall]
    decoded_shape: tuple[int, ...]

    def held_in(self, dtype: torch.dtype) -> "RecordedVelocity":
        """A copy with denoisers of that type, on the meta device."""
        pipe = copy.copy(self.pipe)
        for name, part in self.denoisers.items():
            pipe.__dict__[name] = copy.deepcopy(part).to(dtype)
        found = RecordedVelocity(pipe, self.arguments, CPU)
        found.traits, found.decoded_shape = self.traits, self.decoded_shape
        found.calls, found.decoding = self.calls, self.decoding
        return found

    def enable_gradient_checkpointing(self, how: Callable[..., Any] | None = None) -> list[str]:
        for part in self.denoisers.values():
            part.enable_gradient_checkpointing(how)  # type: ignore[operator]
        return []

    def forward(self, t: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        given = []
        for call in (c for c in self.calls if c.name in self.denoisers):
            own = len(main_input(call))
            args, named = for_rows((call.args, call.named), own, len(x))
            outputs = leaves(self.denoisers[call.name](*args, **named))
            given += [y.flatten() for y in outputs if isinstance(y, Tensor) and y.is_floating_point()]
        flat = given[0] if len(given) == 1 else torch.cat(given)
        times = max(1, len(flat) // x.numel())
        if times * x.numel() <= len(flat):
            flat = flat[: times * x.numel()]
        else:
            flat = torch.nn.functional.pad(flat, (0, times * x.numel() - len(flat)))
        parts = flat.view(times, *x.shape)
        # guidance adds up what several rows give; autocast would make a sum float32
        v = functools.reduce(torch.add, parts.unbind())
        return torch.cat([-part for part in v.split(1)])

    def decode(self, x: Tensor, rows: Tensor, at_once: int = 1) -> Tensor:
        return torch.cat([self._decoded(part) for part in x.split(at_once)])

    def _decoded(self, x: Tensor) -> Tensor:
        entries = len(x) * math.prod(self.decoded_shape)
        with torch.no_grad():
            for call in self.decoding:
                args, named = for_rows((call.args, call.named), 1, len(x))
                for y in leaves(call.method(*args, **named)):
                    if (
                        isinstance(y, Tensor) and y.numel() >= entries
                    ):  # not the sound that comes with a video
                        image = y
            return image.float().flatten()[:entries].clamp(-1, 1).view(len(x), *self.decoded_shape)


def recorded(found: Description, arguments: dict[str, Any], inputs: dict[str, Any]) -> RecordedVelocity:
    """The calls of a pipeline that is called with `inputs`, on the meta device."""
    bare = found.load(found.shells, {}, CPU)
    noted: list[PartCall] = []
    field = without_weights(bare, arguments, FakeTensorMode(allow_non_fake_inputs=True), noted)
    condition, field.traits = Condition(inputs), Traits()
    field.call(condition, recording=True, leave="encoded")
    learn_shapes(field, condition, field.traits)
    calls: list[DenoiserCall] = []

    def note(call: DenoiserCall) -> Any:
        calls.append(call)
        return field.zeros(call)

    x = field.samples(1)
    field.call(condition, time=field.time_of(CHECKED_TIME), x=x, answer=note, leave="velocity")
    noted.clear()
    shown = field.decoded(field.call(condition, final=x).output)
    planned = RecordedVelocity(bare, arguments, CPU)
    planned.traits, planned.calls, planned.decoding = field.traits, calls, [*noted]
    planned.decoded_shape = tuple(shown.shape[1:])
    return planned
