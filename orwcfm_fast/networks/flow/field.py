"""A diffusers pipeline as a velocity network v(t, x, rows), read off the calls of its own `__call__`.

    velocity   every timestep is t; the first iteration computes nothing, and its `step` returns x; in the second,
               `step` is given the guided velocity at x, and the call is left
    samples    `step` of the last iteration returns x, and the pipeline goes on to its VAE and its post-processing
    own grid   what the pipeline sets the scheduler's timesteps to
    condition  what its encoders gave before the first iteration, recorded once and replayed

Samples have the form that `step` is given (packed or not). Several streams (video and sound), and samples of which the
pipeline overwrites entries (a first frame), are one flat vector.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orwcfm_fast.device import out_of_memory
from orwcfm_fast.networks.flow.batching import answer_together, main_input
from orwcfm_fast.networks.flow.call import (
    DENOISERS,
    Condition,
    DenoiserCall,
    LeaveCall,
    PipelineCall,
    intercepted,
    leaves,
    mapped,
)
from orwcfm_fast.networks.flow.encodings import CachedConditions
from orwcfm_fast.networks.flow.learning import CHECKED_TIME, NotAFlow, Traits, learn, rows_share

STEPS = 4  # of a call, of which two are taken; some schedules need as many


class PipelineVelocity(nn.Module):
    """Velocity of a pipeline on the rows of a table of conditions.

    Its parameters are those of its transformers; a ControlNet stays as it is.

    Args:
        pipe: of diffusers; it is left as it is.
        device: of the denoisers; needed where these are on the meta device, while conditions are encoded.
        arguments: what the pipeline is called with for every condition, e.g. height, guidance_scale.
        conditions: encoded earlier.
    """

    def __init__(
        self,
        pipe: Any,
        arguments: dict[str, Any],
        device: torch.device | None = None,
        conditions: Sequence[Condition] = (),
    ) -> None:
        super().__init__()
        self.pipe, self.arguments, self.conditions = pipe, arguments, conditions
        self._device = device
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and DENOISERS.match(name) and name != "controlnet":
                self.add_module(name, part)
        self._first = [next(self.parameters())]
        self.current: PipelineCall = None  # type: ignore[assignment]
        self._traits: Traits | None = None
        self._zeros: dict[Any, Any] = {}
        self._intercepted = intercepted(pipe, self)
        self._run = inspect.unwrap(type(pipe).__call__)  # without its torch.no_grad
        self._takes = inspect.signature(self._run).parameters

    def __deepcopy__(self, memo: dict[int, Any]) -> "PipelineVelocity":
        """A field with denoisers of its own; all else of the pipeline is shared."""
        pipe = copy.copy(self.pipe)
        for name, part in self.denoisers.items():
            pipe.__dict__[name] = copy.deepcopy(part, memo)
        found = PipelineVelocity(pipe, self.arguments, self._device, self.conditions)
        found._traits = self._traits
        return found.train(self.training)

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        return dict(self.named_children())

    @property
    def device(self) -> torch.device:
        return self._device or self._first[0].device

    @property
    def precision(self) -> torch.dtype:
        """In which its denoisers compute."""
        device = self.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next(self.parameters()).dtype

    @property
    def scale(self) -> float:
        """The scheduler's time of sigma = 1."""
        return self.pipe.scheduler.config.num_train_timesteps

    @property
    def shape(self) -> tuple[int, ...]:
        return self.traits.shape

    @property
    def traits(self) -> Traits:
        """Learnt at first use, from the first condition.

        Raises:
            NotAFlow: it is no flow.
        """
        if self._traits is None:
            self._traits = Traits()  # for the calls from which it is learnt
            try:
                learn(self, self.conditions[0], self._traits)
                rows = torch.arange(2) % len(self.conditions)
                x = torch.randn(2, *self._traits.shape, generator=torch.Generator().manual_seed(0))
                t = torch.full((2,), CHECKED_TIME)
                self._traits.shares = rows_share(self, t, x.to(self.device), rows)
            except AttributeError as error:  # which a property of a module would turn into another
                self._traits = None
                raise NotAFlow(str(error)) from error
            except BaseException:
                self._traits = None
                raise
        return self._traits

    @traits.setter
    def traits(self, value: Traits) -> None:
        self._traits = value

    def samples(self, n: int) -> list[Tensor]:
        """Zeros of the shape of n samples, by stream."""
        return [torch.zeros(n, *shape, device=self.device) for shape in self.traits.shapes]

    def call(self, condition: Condition, steps: int = STEPS, grad: bool = False, **how: Any) -> PipelineCall:
        """Call the pipeline for a condition; `how`: see `PipelineCall`."""
        before, self.current = self.current, PipelineCall(self, condition, **how)
        current = self.current
        named = {**self.arguments, **condition.inputs, "num_inference_steps": steps, "output_type": "pt"}
        named["generator"] = current.generator
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.set_grad_enabled(grad), torch.random.fork_rng(devices):
                # some parts draw without the generator they are given; torch.manual_seed alone would take 1 ms
                for generator in (
                    torch.default_generator,
                    *(torch.cuda.default_generators if devices else ()),
                ):
                    generator.manual_seed(0)
                given = {key: value for key, value in named.items() if key in self._takes}
                current.output = self._run(self._intercepted, **given)
        except LeaveCall:
            pass
        finally:
            self.current = before
        return current

    def encoded(self, **inputs: Any) -> Condition:
        """A condition (prompt="…", image=…) with its encodings; the denoisers are not called."""
        condition = Condition(inputs)
        self.call(condition, recording=True, leave="encoded")
        return condition

    def add(self, **inputs: Any) -> None:
        """Encode a condition and append it."""
        self.conditions = [*self.conditions, self.encoded(**inputs)]

    def read_ahead(self, rows: Tensor) -> None:
        """Have the encodings of these conditions read from the cache in the background."""
        if isinstance(self.conditions, CachedConditions):
            self.conditions.read_ahead(rows.tolist())

    def zeros(self, call: DenoiserCall, like: Any = None) -> Any:
        """Zeros of the form of what a call of a denoiser returns; `like`: what it did return."""
        shapes = tuple(x.shape for x in leaves(main_input(call)) if isinstance(x, Tensor))
        key = call.name, call.number, shapes
        if key not in self._zeros:
            with torch.no_grad():
                found = call.module(*call.args, **call.named) if like is None else like
            self._zeros[key] = mapped(found, torch.zeros_like, self.device)
            if not all(isinstance(x, Tensor | float | bool | None) for x in leaves(found)):
                self.traits.computes_first = True  # a cache of keys and values
        return self._zeros[key]

    def sigma_of(self, time: float) -> float:
        """The sigma of the scheduler's `time`."""
        if table := self.traits.time_table:
            return float(np.interp(time, table[1], table[0]))
        return time / self.scale

    def time_of(self, t: float) -> float:
        """The scheduler's time of t, which is 0 for noise and 1 for data."""
        sigma = t if self.traits.ascending else 1 - t
        if table := self.traits.time_table:
            return float(np.interp(sigma, *table))
        return sigma * self.scale

    def times(self, steps: int) -> list[float]:
        """The pipeline's own grid: `steps` + 1 times from 0 to 1."""
        grid = self.call(self.conditions[0], steps, leave="grid").grid
        assert grid
        return grid[0].tolist() if self.traits.ascending else [1 - s for s in grid[0].tolist()]

    def forward(self, t: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """dx/dt [B, *shape] at times t [B] and samples x [B, *shape] under conditions `rows` [B]."""
        if len(rows) == 0:  # a process's share may be none
            return torch.zeros_like(x)
        if len(rows) > 1 and self.traits.shares:
            return self.together(t, x, rows)
        return self.one_by_one(t, x, rows)

    def one_by_one(self, t: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """Velocities, each row with calls of its own."""
        grad = torch.is_grad_enabled()
        return self._velocities([call(grad=grad) for call in self._calls(t, x, rows)])

    def together(self, t: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """Velocities, rows sharing calls: each is called twice, for its calls of denoisers and with the outputs."""
        calls, grad = self._calls(t, x, rows), torch.is_grad_enabled()
        requests: list[dict[int, DenoiserCall]] = []
        for call in calls:
            requests.append({})
            call(answer=self._noted(requests[-1]))
        outputs = answer_together(requests)
        return self._velocities(
            [
                call(grad=grad, answer=lambda c, out=out: out[c.number])
                for call, out in zip(calls, outputs, strict=True)
            ]
        )

    def _noted(self, requests: dict[int, DenoiserCall]) -> Callable[[DenoiserCall], Any]:
        def answer(call: DenoiserCall) -> Any:
            requests[call.number] = call
            return self.zeros(call)

        return answer

    def _calls(self, t: Tensor, x: Tensor, rows: Tensor) -> list[Callable[..., PipelineCall]]:
        return [
            functools.partial(
                self.call, self.conditions[row], time=self.time_of(s), x=self.split(y), leave="velocity"
            )
            for s, y, row in zip(t.tolist(), x.split(1), rows.tolist(), strict=True)
        ]

    def _velocities(self, calls: list[PipelineCall]) -> Tensor:
        signs = self.traits.signs
        parts = [[s * v for s, v in zip(signs, c.seen["velocity"], strict=True)] for c in calls]
        return torch.cat([self.join(streams) for streams in parts])

    def decode(self, x: Tensor, rows: Tensor, at_once: int = 1) -> Tensor:
        """What the pipeline makes of samples x [B, *shape] under `rows` [B], at most `at_once` in a call.

        Samples of conditions that differ in text alone are decoded in one call.

        Returns:
            Images [B, 3, H, W] or videos [B, F, 3, H, W] in [-1, 1], or sound [B, channels, time].
        """
        found, start = [], 0
        forms = [self._form(self.conditions[row]) for row in rows.tolist()]
        while start < len(x):
            stop = start + 1
            while stop < min(len(x), start + at_once) and forms[stop] == forms[start]:
                stop += 1
            condition = self.conditions[int(rows[start])]
            output = self.call(condition, final=self.split(x[start:stop])).output
            found.append(self.decoded(output))
            start = stop
        return torch.cat(found)

    @staticmethod
    def decoded(output: Any) -> Tensor:
        """What is seen or heard of a pipeline's output, as `decode` returns it."""
        name = next(iter(output.keys()))
        value = output[name]
        value = torch.cat(list(value)) if isinstance(value, list) else value
        value = torch.as_tensor(value).float()
        return value if name.startswith("audio") else (2 * value - 1).clamp_(-1, 1)

    @staticmethod
    def _form(condition: Condition) -> dict[str, Any]:
        """A condition's inputs but for its texts."""
        return {key: value for key, value in condition.inputs.items() if not isinstance(value, str)}

    def split(self, x: Tensor) -> list[Tensor]:
        """Samples [B, *shape] by stream, as `step` is given them; entries that are not theirs are 0."""
        traits = self.traits
        if not traits.flat:
            return [x]
        found, start = [], 0
        for shape, kept in zip(traits.shapes, traits.kept, strict=True):
            n = shape.numel() if kept is None else int(kept.sum())
            part, start = x[:, start : start + n], start + n
            if kept is not None:
                whole = part.new_zeros(len(x), shape.numel())
                whole[:, kept.flatten().to(x.device)] = part
                part = whole
            found.append(part.unflatten(1, shape))
        return found

    def join(self, parts: list[Tensor]) -> Tensor:
        """Inverse of `split`."""
        traits = self.traits
        if not traits.flat:
            return parts[0]
        flat = []
        for part, kept in zip(parts, traits.kept, strict=True):
            flat.append(part.flatten(1) if kept is None else part[:, kept.to(part.device)])
        return torch.cat(flat, 1)

    def filled(self, x: Tensor, sample: Tensor, stream: int) -> Tensor:
        """Samples of a stream with the entries that are the pipeline's own."""
        kept = self.traits.kept[stream]
        x = x.to(sample.dtype)
        return x.clone() if kept is None else torch.where(kept.to(x.device), x, sample)

    def enable_gradient_checkpointing(self, how: Callable[..., Any] | None = None) -> list[str]:
        """Compute activations again in the backward pass; `how` calls a module so, torch's own way where None.

        Returns:
            Names of the denoisers where it stays off: some families' own code for it fails, or drops an argument.
        """
        x = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        point = torch.full((1,), CHECKED_TIME), x, torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            expected = self.one_by_one(*point)
        off = []
        for name, part in self.denoisers.items():
            part.enable_gradient_checkpointing(how)  # type: ignore[operator]
            try:
                with torch.enable_grad():
                    same = torch.allclose(self.one_by_one(*point).detach(), expected, rtol=1e-2, atol=1e-4)
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                if out_of_memory(error):
                    raise
                same = False
            if not same:
                part.disable_gradient_checkpointing()  # type: ignore[operator]
                off.append(name)
        return off
