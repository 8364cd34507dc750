"""What every sampler shares: its registry, its cost, the time grid, and `solve`.

dx = v(t, x) dt from noise (t=0) to data (t=1); a sampler is one function `(velocity, x, times) -> x`.

`velocity(t, x)` gets t as a Python float (no host sync, no per-step tensor) and x [B, ...]; it already holds
condition, guidance, precision and the expansion of t to what the network wants. `times` increases.
"""

import re
from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.policy import OWN
from orwcfm_fast.registry import Registry, unknown

Velocity = Callable[[float, Tensor], Tensor]
SampleFunction = Callable[[Velocity, Tensor, Sequence[float]], Tensor]

Grid = str | Callable[[int], list[float]]

SOLVERS = Registry("solver", package="orwcfm_fast.method.samplers")


class Solver:
    """A sampler and what it costs: `evals_per_step` · steps + `extra` evaluations; global error O(h^order).

    `min_steps` is the fewest steps it takes; an `adaptive` solver chooses its own steps and ignores nfe.
    """

    def __init__(
        self,
        function: SampleFunction,
        evals_per_step: int,
        order: int,
        extra: int = 0,
        min_steps: int = 1,
        adaptive: bool = False,
    ) -> None:
        self.function, self.evals_per_step, self.order = function, evals_per_step, order
        self.extra, self.min_steps, self.adaptive = extra, min_steps, adaptive
        self.__doc__ = function.__doc__

    def __call__(self, velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
        return self.function(velocity, x, times)

    def steps(self, nfe: int) -> int:
        """The most steps that fit into `nfe` network evaluations."""
        return (nfe - self.extra) // self.evals_per_step

    @property
    def min_nfe(self) -> int:
        return self.evals_per_step * self.min_steps + self.extra


def solver(name: str, evals: int, order: int, **more: int) -> Callable[[SampleFunction], SampleFunction]:
    """Decorator: registers a sampler under its command-line name with its cost and order (see `Solver`)."""

    def register(function: SampleFunction) -> SampleFunction:
        SOLVERS.register(name)(Solver(function, evals, order, **more))  # type: ignore[arg-type]
        return function

    return register


def time_grid(steps: int, grid: Grid = "uniform") -> list[float]:
    """`steps` + 1 times from 0 to 1.

    Args:
        grid: "uniform", or "power:P" for t = 1 − (1−s)^P, P ≥ 1, on uniform s: smaller steps near the data; or a
            function of `steps`, as `Policy.grid` makes of "own". Before there is a policy, "own" is uniform.

    Raises:
        UserError: unknown grid, or P not a number from 1 up.
    """
    if callable(grid):
        return grid(steps)
    s = [i / steps for i in range(steps + 1)]
    if grid in ("uniform", OWN):
        return s
    name, _, value = grid.partition(":")
    if name != "power":
        raise unknown("grid", grid, ["uniform", "power:1.3", OWN])
    if not re.fullmatch(r"\d*\.?\d+", value) or float(value) < 1:
        raise UserError(f"grid '{grid}': P in power:P must be a number from 1 up, e.g. power:1.3")
    return [1 - (1 - u) ** float(value) for u in s]


def times(nfe: int, solver: str, grid: Grid = "uniform") -> list[float]:
    """The time grid on which `solver` makes at most `nfe` network evaluations, and as many as fit.

    Raises:
        UserError: unknown solver or grid; nfe below what the solver needs for its fewest steps.
    """
    method = cast(Solver, SOLVERS.get(solver))
    if method.adaptive:
        return [0.0, 1.0]
    if nfe < method.min_nfe:
        raise UserError(f"nfe {nfe} is too few for solver '{solver}': it needs at least {method.min_nfe}")
    return time_grid(method.steps(nfe), grid)


def solve(velocity: Velocity, x: Tensor, solver: str, nfe: int, grid: Grid = "uniform") -> Tensor:
    """Integrate from t=0 to t=1.

    Args:
        velocity: (t, x) → dx/dt, shaped like x; t a Python float in [0, 1].
        x: noise, [B, ...].
        solver, grid: names; see `SOLVERS` and `time_grid`.
        nfe: network evaluations, of the whole batch; at most this many are made (adaptive solvers ignore it).

    Raises:
        UserError: unknown solver or grid; nfe too small.
    """
    return SOLVERS.get(solver)(velocity, x, times(nfe, solver, grid))
