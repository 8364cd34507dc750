"""One call of a diffusers pipeline, intercepted at its scheduler and at its parts.

A pipeline's own `__call__` is the definition of its model. Whatever it does to a sample before its transformer and to
the answer after it (packing, position ids, reference images, guidance, signs), it does between two calls of
`scheduler.step(velocity, time, sample)`. A `PipelineCall` therefore replaces the scheduler's `set_timesteps` and
`step`, the calls of the denoisers and those of the encoders, for the length of one call.
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from orwcfm_fast.networks.flow.field import PipelineVelocity

DENOISERS = re.compile(r"(unconditional_)?(transformer|unet|controlnet|dit)(_\d+)?$")
ENCODERS = re.compile(r"(text|image)_encoder")  # parts that are needed for conditions alone
ENCODING_METHODS = re.compile(r"_?encode_|_?get_\w*embeds?$|generate_|_?get_image_caption")  # of pipelines
PART_METHODS = ("encode", "generate", "get_image_features", "get_text_features")  # of parts that encode
SEEN = ("time", "sample", "velocity", "after")  # what is recorded of a call of the scheduler's step


class LeaveCall(BaseException):
    """Raised within a pipeline's call to leave it: what was wanted of it is known."""


class DenoiserCall(NamedTuple):
    """A call of a transformer: the part's name, its number within the iteration, and the arguments."""

    name: str
    number: int
    module: nn.Module
    args: tuple
    named: dict[str, Any]


@dataclass
class Condition:
    """One condition of the velocity.

    Attributes:
        inputs: what the pipeline is called with for it, e.g. prompt, image, height.
        encodings: outputs of the pipeline's encoders in order, each with the random generator's state after it.
    """

    inputs: dict[str, Any]
    encodings: list[tuple[Any, Tensor]] = field(default_factory=list)


class PipelineCall:
    """One call of the pipeline.

    Args:
        recording: the condition's encodings are recorded; otherwise they are replayed.
        time: that every timestep is set to, in the scheduler's units; None: the scheduler's own times.
        x: by stream; what `step` returns in the first iteration, in every one where the call is not left.
        final: by stream; what the last iteration's `step` returns.
        answer: replaces the denoisers of the second iteration.
        leave: where the call ends: "grid", "encoded", "second" (iteration) or "velocity"; "": nowhere.

    Attributes:
        seen: by `SEEN`, what the scheduler's step was given and returned, by stream.
        grid: the sigmas and timesteps that the pipeline set; output: what the call returned.
    """

    def __init__(
        self,
        owner: "PipelineVelocity",
        condition: Condition,
        recording: bool = False,
        time: float | None = None,
        x: list[Tensor] | None = None,
        final: list[Tensor] | None = None,
        answer: Callable[[DenoiserCall], Any] | None = None,
        leave: str = "",
    ) -> None:
        self.owner, self.condition, self.recording, self.time = owner, condition, recording, time
        self.x, self.final, self.answer, self.leave = x, final, answer, leave
        self.generator = torch.Generator(owner.device).manual_seed(0)
        self.steps, self.calls, self.replayed, self.depth, self.in_loop = 0, 0, 0, 0, False
        self.last_time = 0.0
        self.seen: dict[str, list[Any]] = {key: [] for key in SEEN}
        self.grid: tuple[Tensor, Tensor] | None = None
        self.output: Any = None

    @property
    def computes(self) -> bool:
        """Whether the denoisers of this iteration are called; otherwise zeros stand for what they give."""
        if self.leave == "velocity":
            return self.steps >= self.owner.traits.streams
        return self.x is None and self.final is None

    def set_timesteps(self, scheduler: Any) -> None:
        """The pipeline has set the scheduler's timesteps."""
        self.grid = self.grid or (
            scheduler.sigmas.detach().double().cpu(),
            scheduler.timesteps.detach().double().cpu(),
        )
        if self.leave == "grid":
            raise LeaveCall
        self.last_time = float(scheduler.timesteps[-1])
        if self.time is not None:
            scheduler.timesteps = torch.full_like(scheduler.timesteps, self.time, dtype=torch.float32)
            scheduler.sigmas = torch.full_like(scheduler.sigmas, self.owner.sigma_of(self.time))

    def step(
        self, own: Callable[..., Any], v: Tensor, time: Any, sample: Tensor, *more: Any, **named: Any
    ) -> Any:
        """Replaces the scheduler's step, `own`."""
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        streams = self.owner.traits.streams
        iteration, stream = divmod(self.steps, streams)
        if self.leave == "second" and self.seen["time"] and float(time) != float(self.seen["time"][0]):
            raise LeaveCall
        self.steps += 1
        self.calls = 0 if stream == streams - 1 else self.calls
        if self.final is not None:
            last = float(torch.as_tensor(time).max()) == self.last_time
            after = self.owner.filled(self.final[stream], sample, stream) if last else sample
        elif self.x is not None and (iteration == 0 or self.leave != "velocity"):
            after = self.x[stream].to(sample.dtype, copy=True)  # some pipelines write into it
        else:
            after = sample
            if self.leave != "velocity":
                after = own(v, time, sample, *more, **named | {"return_dict": False})[0]
            for key, value in zip(SEEN, (time, sample, v, after), strict=True):
                self.seen[key].append(value.clone() if isinstance(value, Tensor) else value)
            if stream == streams - 1 and self.leave == "velocity":
                raise LeaveCall
        return SchedulerOutput(prev_sample=after) if named.get("return_dict", True) else (after,)

    def denoise(self, name: str, module: nn.Module, args: tuple, named: dict[str, Any]) -> Any:
        """Replaces a call of a denoiser."""
        self.in_loop = True
        if self.leave == "encoded":
            raise LeaveCall
        call = DenoiserCall(name, self.calls, module, args, named)
        self.calls += 1
        if not self.computes:
            if self.owner.traits.computes_first and self.leave == "velocity":
                with torch.no_grad():
                    return module(*args, **named)
            return self.owner.zeros(call)
        found = self.answer(call) if self.answer else module(*args, **named)
        if self.leave == "second" and not self.answer:
            self.owner.zeros(call, like=found)
        return found

    def encode(self, own: Callable[..., Any], args: tuple, named: dict[str, Any]) -> Any:
        """Replaces a call of an encoder; the outermost ones before the loop are recorded, or replayed."""
        if self.in_loop or self.depth:
            return own(*args, **named)
        if not self.recording:
            found, state = self.condition.encodings[self.replayed]
            self.replayed += 1
            self.generator.set_state(state)
            return moved(found, self.owner.device)
        self.depth += 1
        try:
            with torch.no_grad():
                found = own(*args, **named)
        finally:
            self.depth -= 1
        self.condition.encodings.append((moved(found, torch.device("cpu")), self.generator.get_state()))
        return found


class Part:
    """Stands for a part of the pipeline: its attributes and class, but its calls go by way of the current call."""

    def __init__(self, owner: "PipelineVelocity", name: str, module: nn.Module) -> None:
        self.__dict__.update(_owner=owner, _name=name, _module=module, _denoises=bool(DENOISERS.match(name)))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)

    @property
    def device(self) -> torch.device:
        return self._owner.device

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name in PART_METHODS and not self._denoises:
            return lambda *args, **named: self._owner.current.encode(found, args, named)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __call__(self, *args: Any, **named: Any) -> Any:
        current = self._owner.current
        if self._denoises:
            return current.denoise(self._name, self._module, args, named)
        return current.encode(self._module, args, named)


def intercepted(pipe: Any, owner: "PipelineVelocity") -> Any:
    """A shallow copy of a pipeline whose scheduler, parts and encoding methods go by way of `owner.current`."""
    found = copy.copy(pipe)
    device = property(lambda _: owner.device)  # its own would look through every module at each call
    found.__class__ = type(
        type(pipe).__name__, (type(pipe),), {"device": device, "_execution_device": device}
    )
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            found.__dict__[name] = Part(owner, name, part)
    found.__dict__["scheduler"] = _scheduler(pipe.scheduler, owner)
    for name in dir(type(pipe)):
        method = getattr(type(pipe), name)
        if ENCODING_METHODS.match(name) and inspect.isfunction(method):
            found.__dict__[name] = _encoder(getattr(found, name), owner)
    return found


def _encoder(method: Callable[..., Any], owner: "PipelineVelocity") -> Callable[..., Any]:
    return functools.wraps(method)(lambda *args, **named: owner.current.encode(method, args, named))


def _scheduler(own: Any, owner: "PipelineVelocity") -> Any:
    found, kind = copy.copy(own), type(own)

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(scheduler: Any, *args: Any, **named: Any) -> None:
        kind.set_timesteps(scheduler, *args, **named)
        owner.current.set_timesteps(scheduler)

    @functools.wraps(kind.step)
    def step(scheduler: Any, *args: Any, **named: Any) -> Any:
        return owner.current.step(functools.partial(kind.step, scheduler), *args, **named)

    # on the instance, as some pipelines test for its very class; partial, as some make a deep copy of it
    found.set_timesteps, found.step = (functools.partial(f, found) for f in (set_timesteps, step))
    return found


def leaves(value: Any) -> list[Any]:
    """What a tree of dictionaries, lists and tuples holds."""
    if isinstance(value, dict):
        value = [*value.values()]
    if not isinstance(value, list | tuple):
        return [value]
    return [leaf for v in value for leaf in leaves(v)]


def moved(value: Any, device: torch.device) -> Any:
    """A tree of tensors, or an object that holds some, on a device."""
    return mapped(value, lambda x: x.detach().to(device), device)


def mapped(value: Any, change: Callable[[Tensor], Tensor], device: torch.device) -> Any:
    """The same tree with every tensor changed; devices in it become `device`."""

    def again(value: Any) -> Any:
        return mapped(value, change, device)

    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)({k: again(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(again(v) for v in value)
    if isinstance(value, torch.device):
        return device
    if hasattr(value, "__dict__") and not callable(value):  # a distribution
        found = copy.copy(value)
        found.__dict__.update({k: again(v) for k, v in vars(value).items()})
        return found
    return value
