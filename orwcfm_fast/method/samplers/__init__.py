"""Samplers, a family a file. A file that decorates a function with `@solver(…)` adds one; nothing else is edited."""

from orwcfm_fast.method.samplers.solver import (
    OWN,
    SOLVERS,
    Grid,
    Solver,
    Velocity,
    solve,
    solver,
    time_grid,
    times,
)

__all__ = ["OWN", "SOLVERS", "Grid", "Solver", "Velocity", "solve", "solver", "time_grid", "times"]
