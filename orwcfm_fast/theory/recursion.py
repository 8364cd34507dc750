"""The method's exact recursion, round by round, by quadrature in one and two dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.method.weighting import centre, weigh
from orwcfm_fast.theory.bounds import paper_drift
from orwcfm_fast.theory.density import FLOOR, Density, Grid, as_double, check_edges, on_grid
from orwcfm_fast.theory.parallel import single_threaded
from orwcfm_fast.theory.transport import w2_line, w2_plane
from orwcfm_fast.theory.velocity import ExactVelocity, Stage, push

FIGURES = ("reward", "w2", "entropy", "drift")
METHODS = ("orw-centred", "orw")  # those whose recursion is known
SEEN = 1e-6  # of the greatest density: below it no sample is drawn
DEFAULT_STEPS = {1: 48, 2: 24}


@dataclass
class Round:
    """The law q_N after round N = `round`, and its figures; round 0 is the start. alpha: the α of that round.

    reward: E[r] under q_N. w2: W2(q_N, q_0), units of x. entropy: −∫q log q, nats. drift: the paper's D^N,
    averaged over q_N, units of x²; drift_field [cells…]: D^N(x1). density: q_N on the grid [cells…].
    mass: ∫q_N before it is normalised, 1 up to the solver's error. velocity: v*_N(t, x).
    error: for each figure how far it moves when cells and steps are halved; empty without `check`.
    """

    round: int
    reward: float
    w2: float
    entropy: float
    drift: float
    mass: float
    density: Tensor
    drift_field: Tensor
    velocity: ExactVelocity
    alpha: float = math.nan
    error: dict[str, float] = field(default_factory=dict)


@dataclass
class Recursion:
    """rounds[N] for N = 0, 1, …; settled: the first round that moved less than `settle`, None where none did."""

    alpha: float
    tau: float
    grid: Grid
    reward: Tensor
    rounds: list[Round]
    settled: int | None = None

    @property
    def rewards(self) -> list[float]:
        """E[r] from round 1 on."""
        return [r.reward for r in self.rounds[1:]]

    @property
    def error(self) -> dict[str, float]:
        """The largest of the rounds' errors, by figure."""
        return {name: max(r.error.get(name, 0.0) for r in self.rounds) for name in FIGURES}

    def sample(self, round: int, n: int, seed: int = 0) -> Tensor:
        """n draws from q_round → [n, d], float32; uniform within a cell."""
        generator = torch.Generator().manual_seed(seed)
        mass = self.rounds[round].density.reshape(-1)
        cell = torch.multinomial(mass, n, replacement=True, generator=generator)
        jitter = torch.rand(n, self.grid.dim, generator=generator, dtype=torch.float64) - 0.5
        return (self.grid.points[cell] + jitter * torch.tensor(self.grid.widths)).float()


def is_centred(method: str) -> bool:
    """Whether the method's weights are centred; of the others that have a recursion, only `orw`'s are not.

    Raises:
        UserError: a method whose recursion is not known.
    """
    if method not in METHODS:
        raise UserError(
            f"method {method!r} has no forecast: its recursion is not known; use {' or '.join(METHODS)}"
        )
    return method == "orw-centred"


def _rewards_on(grid: Grid, reward: Any, fine: Grid) -> Tensor:
    if callable(reward):
        values = as_double(reward(grid.points)).reshape(-1)
    else:
        values = as_double(reward).reshape(-1)
        if len(values) == math.prod(fine.counts) and grid.counts != fine.counts:
            values = values.reshape(fine.counts)
            for axis in range(fine.dim):
                values = values.unflatten(axis, (-1, 2)).mean(axis + 1)
            values = values.reshape(-1)
    if len(values) != math.prod(grid.counts):
        raise UserError(f"reward: {len(values)} values for a grid of {grid.counts} cells")
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        where = tuple(round(c, 3) for c in grid.points[bad][0].tolist())
        raise UserError(
            f"reward: not finite at {int(bad.sum())} of {len(values)} grid points, first at x = {where}; "
            "narrow bounds, or make the reward finite there"
        )
    return values


def _solve(
    grid: Grid,
    start: Tensor,
    reward: Tensor,
    alpha: Callable[[list[Round]], float],
    weights: Callable[[Tensor, Tensor], Tensor],
    rounds: int,
    steps: int,
    settle: float | None,
    threads: int,
    centred: bool,
) -> tuple[list[Round], int | None]:
    still = ExactVelocity(grid, start, centred=centred)
    noise_start = push(still, steps)[0] if grid.dim == 1 else None

    def summary(number: int, q: Tensor, mass: float, noise: Tensor | None, velocity: ExactVelocity) -> Round:
        w2, drift = 0.0, torch.zeros_like(q)
        if number:
            drift = paper_drift(velocity, still)
            w2 = (
                w2_plane(grid, q, start)
                if noise is None or noise_start is None
                else w2_line(grid, noise, noise_start)
            )
        mean_drift = float((q * drift).sum()) * grid.cell
        entropy = -float((q * q.log()).sum()) * grid.cell
        expected = float((q * reward).sum()) * grid.cell
        shape = grid.counts
        return Round(
            number, expected, w2, entropy, mean_drift, mass, q.reshape(shape), drift.reshape(shape), velocity
        )

    q, velocity, grown = start, still, torch.ones_like(start[0])
    found = [summary(0, start, 1.0, None, still)]
    for number in range(1, rounds + 1):
        weight, a = weights(reward, q * grid.cell), alpha(found)
        if float(weight.min()) < 0 and float(weight.min()) + a <= 0:
            raise UserError(
                f"the least weight is {float(weight.min()):.4g}: use α > {-float(weight.min()):.4g}"
            )
        c, grown = centre(weight[q > SEEN * q.max()], q @ weight / q.sum(), a, grown)
        velocity = velocity.after(Stage(q, weight, a, c))
        noise, q = push(velocity, steps, threads)
        mass = float(q.sum()) * grid.cell
        if not math.isfinite(mass) or abs(mass - 1) > 0.05:
            raise UserError(
                f"round {number}: the mass comes to {mass:.3g}, not 1: more cells or wider bounds"
            )
        q = (q / mass).clamp_min(FLOOR)
        check_edges(grid, q, f"round {number}")
        found.append(summary(number, q, mass, noise, velocity))
        found[-1].alpha = a
        moved = max(abs(found[-1].reward - found[-2].reward), abs(found[-1].w2 - found[-2].w2))
        if settle is not None and moved < settle:
            return found, number
    return found, None


def exact_recursion(
    density: Density,
    reward: Any,
    alpha: float | Callable[[list[Round]], float],
    tau: float,
    rounds: int = 6,
    *,
    method: str = "orw-centred",
    normalize: bool = True,
    weighting: str | Callable[[Tensor, Tensor], Tensor] = "exp",
    bounds: Sequence[tuple[float, float]] | None = None,
    cells: Sequence[int] | None = None,
    steps: int | None = None,
    check: bool = True,
    tolerance: float | None = None,
    settle: float | None = None,
) -> Recursion:
    """q_0 → q_1 → … under unlimited capacity: q_N is the law at t=1 of the flow of v*_N, where

        orw          v*_N(t, x) = (E[w·u | x_t=x] + α·v_ref(t, x)) / (E[w | x_t=x] + α)
        orw-centred  v*_N(t, x) = (E[(w − c)·u | x_t=x] + c·v*_{N−1}(t, x) + α·v_ref(t, x)) / (E[w | x_t=x] + α)

    with expectations under q_{N−1}, w of mean 1, c of `weighting.centre`, mostly 1, and v*_0 = v_ref the velocity
    of q_0: each is where the gradient of its objective vanishes. At α=0 v*_{N−1} is E[u | x_t], the two are one and
    q_N ∝ w·q_{N−1}, hence w^N·q_0. At α>0 the centred form comes to rest where
    E[(w − c)·(u − v) | x_t] = α·(v − v_ref).

    Relation to the paper (openreview 2IoFFexvuw): it writes q^N ∝ w·q^{N−1}·exp(−β·D^{N−1}) with
    D^{N−1}(x1) = E_{t, x_t | x1}‖v^{N−1}(t, x_t) − v_ref(t, x_t)‖². The two agree for α = β = 0. For α > 0
    they do not: D⁰ = 0, so the paper's form takes the whole first step w·q_0, where the minimiser of
    the loss is held back by α from the first round on. D is reported (Round.drift) beside the exact answer.

    Args:
        alpha: α; or by round, from the rounds so far (round 0 first).
        method: "orw-centred" or "orw"; of other methods no recursion is known.
        density: q_0 as a GaussianMixture, a GridDensity, or log q_0: [P, d] → [P] with `bounds`.
        reward: r: points [P, d] float64 → [P], or its values on the grid of a GridDensity.
        weighting: exp, linear, advantage; or any w: (reward [P], probabilities [P]) → [P], used as it is.
        bounds, cells: the grid; by default 8 standard deviations, 256 or 96×96 cells.
        steps: Runge–Kutta steps of the flow, 48 in 1-D and 24 in 2-D by default.
        check: also solve with half the cells and steps, and report how far each figure moves.
        tolerance: the largest such move allowed.
        settle: stop at the first round that moves E[r] and W2 by less than this; `rounds` is the limit.

    Raises:
        UserError: reward not finite on the grid; a density that cannot be normalised or leaves the grid;
            a grid too coarse for `tolerance`; w + α ≤ 0; another method.
    """
    centred = is_centred(method)
    by_round = alpha if callable(alpha) else lambda found: alpha
    if (not callable(alpha) and not 0 <= alpha < math.inf) or not math.isfinite(tau):
        raise UserError(f"α = {alpha}, τ = {tau:g}: α must be a number ≥ 0 and τ a number")
    if rounds < 1 or (steps is not None and steps < 4):
        raise UserError(f"rounds = {rounds}, steps = {steps}: at least 1 round and 4 steps")

    def weights(r: Tensor, mass: Tensor) -> Tensor:
        return weigh(r, tau, weighting, normalize, mass) if isinstance(weighting, str) else weighting(r, mass)

    fine, start = on_grid(density, bounds, cells, halved=False)
    steps = steps or DEFAULT_STEPS[fine.dim]
    values = _rewards_on(fine, reward, fine)
    with single_threaded() as threads:
        found, settled = _solve(
            fine, start, values, by_round, weights, rounds, steps, settle, threads, centred
        )
    if check or tolerance is not None:
        coarse, start = on_grid(density, bounds, cells, halved=True)
        rough = _rewards_on(coarse, reward, fine)
        half = max(4, steps // 2)
        with single_threaded() as threads:
            same = lambda so_far: found[len(so_far)].alpha  # noqa: E731
            halves, _ = _solve(
                coarse, start, rough, same, weights, len(found) - 1, half, None, threads, centred
            )
        for mine, rougher in zip(found, halves, strict=True):
            mine.error = {name: abs(getattr(mine, name) - getattr(rougher, name)) for name in FIGURES}
    result = Recursion(found[-1].alpha, tau, fine, values, found, settled)
    worst = max(result.error, key=lambda name: result.error[name])
    if tolerance is not None and result.error[worst] > tolerance:
        raise UserError(
            f"grid {'×'.join(map(str, fine.counts))} and {steps} steps are too coarse for {tolerance:g}: halving "
            f"them moves {worst} by {result.error[worst]:.1e}; use cells={tuple(2 * n for n in fine.counts)} "
            f"and steps={2 * steps}, or a larger tolerance"
        )
    return result
