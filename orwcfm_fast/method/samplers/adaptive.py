"""Solvers that choose their own steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orwcfm_fast.method.samplers.solver import SOLVERS, Solver, Velocity


def dopri5(
    velocity: Velocity, x: Tensor, times: Sequence[float], rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """Dormand–Prince 5(4) with adaptive steps (torchdiffeq); only the ends of `times` count."""
    from torchdiffeq import odeint

    ends = torch.tensor(
        [times[0], times[-1]], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return odeint(lambda t, x: velocity(float(t), x), x, ends, method="dopri5", rtol=rtol, atol=atol)[-1]


SOLVERS.register("dopri5")(Solver(dopri5, evals_per_step=6, order=5, adaptive=True))
