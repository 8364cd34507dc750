"""The one objective, and what a method must say to be a row of it.

    L = 1/B Σ_i [ w_i/D ‖v − u_i‖² + b_i/D ‖v − v_old,i‖² + a_i/D ‖v − v_ref,i‖² ]

u is the velocity of the draw, v_old the policy's own when it drew the round (or an average of past policies),
v_ref the frozen pretrained model's. A method is a function from a `Point` to (w, b, a).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.method.weighting import weigh, weigh_within
from orwcfm_fast.registry import Registry
from orwcfm_fast.rewards.standardize import standardize
from orwcfm_fast.settings import Finetune

Signal = Literal["weight", "reward", "best", "advantage"]
LARGEST_ADVANTAGE = 5.0
ROUNDING = 1e-5
METHODS = Registry("method", package="orwcfm_fast.method.objectives")


@dataclass(frozen=True)
class Point:
    """What the coefficients of a minibatch's draws may depend on.

    Attributes:
        signal: what the reward says of each sample, [B] (see `signal_of`); mean: of the round's, 0-d; centre: what is
            subtracted, [B] or 0-d (see `weighting.centre`).
        noise_level: s = 1 − t of each draw, [B].
        alpha: α in force; settings: of the run.
        own_loss: 1/D‖v − u‖² at the policy as it is now, [B]; where `Method.reads_velocity`.
        branch_errors: mean |v± − u| of v± = v_old ± β(v − v_old), two of [B]; where `Method.reads_velocity`.
    """

    signal: Tensor
    mean: Tensor
    centre: Tensor
    noise_level: Tensor
    alpha: float
    settings: Finetune
    own_loss: Tensor | None = None
    branch_errors: tuple[Tensor, Tensor] | None = None


Coefficients = tuple[Tensor, Tensor, Tensor]
Row = Callable[[Point], Coefficients]


@dataclass(frozen=True)
class Method:
    """A row of the objective.

    Attributes:
        coefficients: (w, b, a) [B] of a minibatch's draws, float32.
        signal: what the reward becomes before the first step of a round.
        old, reference: whether the row has a term with v_old, with v_ref; a velocity without a term is not computed.
        uses_alpha: they depend on α; the options that set it are refused elsewhere, and at α = 0 v_ref is not computed.
        centred: `weighting.centre` is subtracted from the weights.
        reads_velocity: the coefficients depend on the policy's velocity, and so change with every step.
        late: t has density 2t in place of 1, so that more draws lie near the data. The minimiser at each t is the same.
        rests: at τ = 0 the policy does not change.
        averages: None, or the share of an average of past policies that is kept after the so-many-th round;
            the average is then v_old. samples_average: rollouts are drawn from it.
        remedy: what bounds the loss where w + b + a is less than 0 by {missing}.
    """

    coefficients: Row
    signal: Signal
    old: bool
    reference: bool
    uses_alpha: bool = True
    centred: bool = False
    reads_velocity: bool = False
    late: bool = False
    rests: bool = True
    averages: Callable[[int], float] | None = None
    samples_average: bool = False
    remedy: str = "--alpha higher by at least {missing:.4g}"

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.coefficients.__doc__

    def has_reference(self, alpha: float) -> bool:
        """Whether v_ref is needed with this α."""
        return self.reference and (not self.uses_alpha or alpha > 0)

    def kept(self, alpha: float) -> int:
        """Velocities that a round keeps of each draw: none, one, or v_old and v_ref apart where a step blends them."""
        terms = self.old + self.has_reference(alpha)
        return terms if self.reads_velocity else min(terms, 1)


def method(name: str, signal: Signal, **kind) -> Callable[[Row], Row]:
    """Decorator: registers a row under its command-line name; `kind` as in `Method`."""

    def register(row: Row) -> Row:
        METHODS.register(name)(Method(row, signal, **kind))
        return row

    return register


def signal_of(kind: Signal, rollout: Rollout, tau: float, s: Finetune) -> Tensor:
    """What the rewards of a round say of its samples, [N] float32.

    weight: of `weigh` with τ. reward: r itself. best: 1 for the best of every `--raft-best-of` in a row, else 0.
    advantage: τ·r standardised over the round (with groups over the samples of a prompt), within ±5; τ = 0 gives 0.

    Raises:
        UserError: a reward that this signal cannot use.
    """
    groups = rollout.condition if s.group > 1 else None
    if kind == "weight":
        how = (tau, s.weights, s.normalize_weights)
        if groups is None:
            return weigh(rollout.reward, *how)
        return weigh_within(rollout.reward, groups, *how)
    if kind == "reward":
        return rollout.reward.float()
    if kind == "best":
        parts = rollout.reward.split(s.raft_best_of)
        return torch.cat(
            [torch.zeros_like(r, dtype=torch.float32).index_fill_(0, r.argmax(), 1) for r in parts]
        )
    r = tau * rollout.reward.double()
    if groups is None:
        return standardize(r).clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE).float()
    found = torch.zeros_like(r)
    for one in groups.unique().tolist():
        found[groups == one] = standardize(r[groups == one])
    return found.clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE).float()


def check_bounded(name: str, coefficients: Coefficients) -> None:
    """w + b + a ≥ 0 for every draw, but for rounding, or the loss has no lower bound.

    Args:
        name: of the method.

    Raises:
        UserError: says what would be enough.
    """
    w, b, a = coefficients
    least = float((w + b + a).min())
    if least < -ROUNDING * float(w.abs().max()):
        raise UserError(
            f"method '{name}': the least of w + b + a over the round is {least:.4g}, so the loss has no lower bound; "
            f"it needs {METHODS.get(name).remedy.format(missing=-least)}"
        )
