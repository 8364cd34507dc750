"""What a pipeline itself does, recorded from a call of it: what tests compare ours with."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """A call of the scheduler's step: what it was given, and the sample after it."""

    time: float
    x: Tensor
    v: Tensor
    after: Tensor


def recorded(pipe: Any, steps: int, **call: Any) -> tuple[list[Step], Any]:
    """Every call of its scheduler's step, and the pipeline's output."""
    pipe = copy.copy(pipe)
    own = copy.deepcopy(pipe.scheduler)
    seen = []
    step, kind = type(own).step, type(own)

    def recording(v, time, sample, *more, **named):
        found = step(own, v, time, sample, *more, **named)
        after = found[0] if isinstance(found, tuple) else found.prev_sample
        seen.append(Step(float(time), sample.clone(), v.clone(), after.clone()))
        return found

    own.step = recording
    assert isinstance(own, kind)
    pipe.__dict__["scheduler"] = own
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = pipe(num_inference_steps=steps, output_type="pt", generator=generator, **call)
    return seen, output
