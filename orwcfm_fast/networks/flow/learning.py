"""What must be known of a pipeline before its velocity can be read off its calls, learnt from a few of them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from orwcfm_fast.networks.flow.call import Condition, PipelineCall

if TYPE_CHECKING:
    from orwcfm_fast.networks.flow.field import PipelineVelocity

FINE_STEPS = 1000  # of the schedule that shows how times follow from sigmas
CHECKED_TIME = 0.5
SHARED_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}  # of a velocity; 0.02 in any other precision


class NotAFlow(Exception):
    """A pipeline whose velocity cannot be read off; says why."""


@dataclass
class Traits:
    """What holds for every condition of a pipeline.

    Attributes:
        streams: calls of the scheduler's step in an iteration, e.g. 2 for video with sound.
        shapes: of one sample, by stream; kept: entries that are the model's own, by stream: the pipeline overwrites
            the others; None: all are.
        ascending: sigma is the time itself, not 1 − time.
        time_table: sigmas and the scheduler's times for them, where these are not scale · sigma.
        signs: of dx/dt in what `step` is given, by stream.
        computes_first: the second iteration needs what the first computed (a cache of keys and values).
        shares: rows may share calls of a denoiser.
    """

    streams: int = 1
    shapes: list[torch.Size] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)
    ascending: bool = False
    time_table: tuple[np.ndarray, np.ndarray] | None = None
    signs: list[float] = field(default_factory=list)
    computes_first: bool = False
    shares: bool = False

    @property
    def flat(self) -> bool:
        """Whether samples are flat vectors, not of the pipeline's own shape."""
        return self.streams > 1 or self.kept[0] is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: the pipeline's own, or flat, where there are several streams or entries are left out."""
        if not self.flat:
            return tuple(self.shapes[0])
        numbers = (
            shape.numel() if kept is None else int(kept.sum())
            for shape, kept in zip(self.shapes, self.kept, strict=True)
        )
        return (sum(numbers),)


def learn(field: "PipelineVelocity", condition: Condition, now: Traits) -> None:
    """Fill in `now`, the field's traits, from two real evaluations.

    Raises:
        NotAFlow: the pipeline's paths are not straight from noise to data.
    """
    call = field.call(condition, leave="second")
    if call.grid is None or not call.steps or (call.steps > 1 and call.output is not None):
        raise NotAFlow("it does not step its scheduler from time to time")
    sigmas, times = call.grid
    _learn_shapes(call, now)
    now.ascending = bool(sigmas[-1] > sigmas[0])
    if sigmas.min() < 0 or sigmas.max() > 1.001 or abs(float(sigmas[-1]) - now.ascending) > 1e-6:
        raise NotAFlow(f"its sigmas are {[round(s, 4) for s in sigmas.tolist()]}")
    fine = field.call(condition, FINE_STEPS, leave="grid").grid
    assert fine
    if (fine[1] - field.scale * fine[0][:-1]).abs().max() >= 1:  # some tell their model unshifted times
        now.time_table = (fine[0][:-1].numpy()[::-1], fine[1].numpy()[::-1])
    first = int((times - float(call.seen["time"][0])).abs().argmin())
    _learn_signs(call, float(sigmas[first + 1] - sigmas[first]), now)
    _learn_kept(field, condition, call.seen["sample"], now)


def learn_shapes(field: "PipelineVelocity", condition: Condition, now: Traits) -> None:
    """Fill in as much as shapes say, of a pipeline without weights."""
    _learn_shapes(field.call(condition, leave="second"), now)


def _learn_shapes(call: PipelineCall, now: Traits) -> None:
    now.streams, now.shapes = call.steps, [x.shape[1:] for x in call.seen["sample"]]
    now.kept, now.signs = [None] * now.streams, []


def _learn_signs(call: PipelineCall, step: float, now: Traits) -> None:
    """The first step of any solver is Euler's: what it adds is the step's length times the velocity."""
    for i in range(now.streams):
        x, v, y = (call.seen[key][i].double() for key in ("sample", "velocity", "after"))
        ratio = ((y - x) / (step * v))[v.abs() > 1e-3].median()
        if not abs(abs(ratio) - 1) <= 0.02:
            raise NotAFlow(f"its step goes {float(ratio):.2f} times the model's output")
        now.signs.append(float(ratio.sign()) * (1 if now.ascending else -1))


def _learn_kept(field: "PipelineVelocity", condition: Condition, samples: list[Tensor], now: Traits) -> None:
    """Which entries of a sample the pipeline takes as they are; the others it overwrites."""
    x = [s + 1 for s in samples]
    try:
        time = field.time_of(CHECKED_TIME)
        seen = field.call(condition, time=time, x=x, leave="velocity").seen["sample"]
    except Exception as error:
        raise NotAFlow(f"{type(error).__name__}: {error}") from error
    if len(seen) < now.streams:
        raise NotAFlow("it gives no velocity at a single time")
    for i, (given, taken) in enumerate(zip(x, seen, strict=True)):
        kept = (taken == given.to(taken.dtype))[0]
        now.kept[i] = None if kept.all() else kept.cpu()
        if not kept.any():
            raise NotAFlow("it takes nothing of the sample that its scheduler gives it")


def rows_share(field: "PipelineVelocity", t: Tensor, x: Tensor, rows: Tensor) -> bool:
    """Whether rows that share calls of a denoiser have the velocities that they have alone.

    Not so where a denoiser treats its batch as one, e.g. positions or experts that are the batch's.
    """
    with torch.no_grad():
        alone = field.one_by_one(t, x, rows)
        try:
            error = (field.together(t, x, rows) - alone).abs().max()
        except Exception:
            return False
    return bool(error <= SHARED_ERROR.get(field.precision, 0.02) * alone.abs().max())
