"""Solvers that choose their own steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.method.samplers.solver import SOLVERS, Solver, Velocity


def _largest_rms(error: Tensor) -> Tensor:
    """The largest root mean square of one sample's elements.

    torchdiffeq takes the mean over the whole batch, under which a sample may be as wrong as the others are right, and
    so depends on which others are solved with it.
    """
    return error.reshape(len(error), -1).square().mean(1).max().sqrt()


def dopri5(
    velocity: Velocity, x: Tensor, times: Sequence[float], rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """Dormand–Prince 5(4) with adaptive steps (torchdiffeq), every sample to the tolerance; only the ends of `times`
    count.

    Raises:
        UserError: the velocity has 16 bits, whose rounding is larger than the tolerance.
    """
    from torchdiffeq import odeint

    def checked(t: Tensor, x: Tensor) -> Tensor:
        v = velocity(float(t), x)
        if v.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                "solver 'dopri5': needs velocities in float32 to control its error; use --precision fp32 or a "
                "solver with fixed steps"
            )
        return v

    ends = torch.tensor(
        [times[0], times[-1]], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    found = odeint(checked, x, ends, method="dopri5", rtol=rtol, atol=atol, options={"norm": _largest_rms})
    return found[-1]


SOLVERS.register("dopri5")(Solver(dopri5, evals_per_step=6, order=5, adaptive=True))
