"""The guard: looks at every round, and warns, stops, or says how to go on from the last good one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.settings import Finetune

FINITE = {
    "loss_fm": "loss", "loss_w2": "loss", "grad_norm_max": "gradient", "velocity_gap": "velocity",
    "w2_coupled": "velocity", "reward_mean": "reward", "diversity_share": "velocity",
}  # fmt: skip
SPIKE = 10.0  # a gradient norm this many times what the rounds before had is no chance
SPIKE_WINDOW = 8
HACKING = 3  # rounds in a row of trained reward up, hold-out reward down
W2_SHARE = (
    0.5**0.5
)  # of the distance of two reference samples: about what every sample turning to one would take
INFLATION = (
    1.05  # of the velocity's norm: flows that go wrong have 1.05 to 1.15, digits at α = 0.3 up to 1.01
)
LEAST_DIMENSION = 64  # of a sample: in few dimensions a reward that is met moves the norm by as much
TARGET_SHARE = 1.5  # of a W2 that is steered to: what may pass while it settles
MAX_ROLLBACKS = 8
ALPHA_STEP = 0.5
REMEMBERED = ("grad_norm_max", "reward_mean", "holdout_mean")


@dataclass(frozen=True)
class Finding:
    """What is wrong with a round; `cure`: which setting makes it milder."""

    text: str
    cure: Literal["tau", "alpha"]
    fatal: bool = False


class Fault(WorkError):
    """A round that the guard does not let stand; its record, and what was found."""

    def __init__(self, number: int, found: Sequence[Finding], record: dict[str, Any]) -> None:
        super().__init__(f"round {number}: {'; '.join(f.text for f in found)}")
        self.number, self.found = number, list(found)
        self.record = {k: v if _finite(v) else None for k, v in record.items()}


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


@dataclass
class Guard:
    """Watches the records of a run.

    Args:
        settings: `guard` and its bounds.
        spread: mean distance of two reference samples, the unit of the default ceiling of the drift.
        dimension: values of a sample.
    """

    settings: Finetune
    spread: float = 0.0
    dimension: int = 1
    past: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ceiling(self) -> float:
        """Coupled W2 above which it speaks."""
        s = self.settings
        return s.guard_w2 or max(W2_SHARE * self.spread, TARGET_SHARE * (s.target_w2 or 0))

    @property
    def norm_ceiling(self) -> float:
        """Norm of the velocity, in that of the reference's, above which it speaks."""
        return self.settings.guard_velocity or (INFLATION if self.dimension >= LEAST_DIMENSION else math.inf)

    def before_steps(self, ess: float) -> list[Finding]:
        """Of a rollout's weights, before anything is learned from them."""
        s = self.settings
        if s.guard == "off" or ess >= s.guard_ess * s.rollout:
            return []
        text = f"ESS {ess:.0f} of {s.rollout} is below {s.guard_ess:.0%}: few samples carry the round"
        return [Finding(f"{text}; lower --tau", "tau")]

    def after_round(self, record: dict[str, Any]) -> list[Finding]:
        """Of a whole round; what it saw is remembered unless a value is not finite."""
        broken = [what for key, what in FINITE.items() if not _finite(record[key])]
        if broken:
            return [Finding(f"the {broken[0]} is not finite; lower --lr or raise --alpha", "tau", fatal=True)]
        found = [] if self.settings.guard == "off" else [f for f in self._drifts(record) if f]
        for key in REMEMBERED:
            if record.get(key) is not None:
                self.past[key] = [*self.past.get(key, []), record[key]][-SPIKE_WINDOW:]
        return found

    def _drifts(self, record: dict[str, Any]) -> list[Finding | None]:
        signs = (self._far, self._inflated, self._uniform, self._spike, self._hacked)
        return [sign(record) for sign in signs]

    def _far(self, record: dict[str, Any]) -> Finding | None:
        w2 = record["w2_coupled"]
        if w2 <= self.ceiling:
            return None
        return Finding(f"coupled W2 {w2:.3g} is above {self.ceiling:.3g}; raise --alpha", "alpha")

    def _inflated(self, record: dict[str, Any]) -> Finding | None:
        ratios = record.get("velocity_norm") or [None]
        worst, k = max((ratio or 0.0, k) for k, ratio in enumerate(ratios))
        if worst <= self.norm_ceiling:
            return None
        where = f"t from {k / len(ratios):g} to {(k + 1) / len(ratios):g}"
        text = f"the velocity's norm is {worst:.3f} times the reference's at {where}, above {self.norm_ceiling:g}"
        return Finding(f"{text}; raise --alpha", "alpha")

    def _uniform(self, record: dict[str, Any]) -> Finding | None:
        share, floor = record["diversity_share"], self.settings.guard_diversity
        if share >= floor:
            return None
        text = f"diversity is {share:.0%} of the reference's, below {floor:.0%}"
        return Finding(f"{text}; raise --alpha or lower --tau", "alpha")

    def _spike(self, record: dict[str, Any]) -> Finding | None:
        norm, past = record["grad_norm_max"], self.past.get("grad_norm_max", [])
        if len(past) < 2 or norm <= SPIKE * median(past):
            return None
        return Finding(
            f"gradient norm {norm:.3g}, {norm / median(past):.0f} times the rounds before; lower --lr", "tau"
        )

    def _hacked(self, record: dict[str, Any]) -> Finding | None:
        if record.get("holdout_mean") is None:
            return None
        trained = [*self.past.get("reward_mean", []), record["reward_mean"]][-HACKING - 1 :]
        held = [*self.past.get("holdout_mean", []), record["holdout_mean"]][-HACKING - 1 :]
        if len(trained) <= HACKING or len(held) <= HACKING:
            return None
        if not (_rises(trained) and _rises(held[::-1])):
            return None
        text = f"hold-out reward fell {HACKING} rounds in a row to {held[-1]:.4g} while the trained one rose"
        return Finding(f"{text}; raise --alpha or stop here", "alpha")

    def stands(self, found: Sequence[Finding]) -> bool:
        """Whether a round of which this was found is kept."""
        return not any(f.fatal for f in found) and (not found or self.settings.guard in ("warn", "off"))

    def to_state(self) -> dict[str, Any]:
        return {key: list(values) for key, values in self.past.items()}

    def restore(self, state: Any, where: str) -> None:
        """Go on with what `to_state` wrote.

        Raises:
            UserError: it is not that.
        """
        try:
            past = {key: [float(v) for v in (state or {}).get(key, [])] for key in REMEMBERED}
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{where}: state.json: guard is damaged") from None
        self.past = {key: values[-SPIKE_WINDOW:] for key, values in past.items() if values}


def _rises(values: Sequence[float]) -> bool:
    return all(b > a for a, b in pairwise(values))


def milder(alpha: float, tau: float, found: Sequence[Finding], s: Finetune) -> tuple[float, float, str]:
    """The rule of rollback: α, τ, and in words what it changed ("" for nothing).

    Sharp weights, gradient spikes and values that are not finite halve τ; drift, lost diversity and a falling
    hold-out reward double α (0 becomes 0.5). What cannot serve is left to the other: α where it is steered
    (--target-w2), τ under linear weights. A method without α and τ has nothing milder.
    """
    method = METHODS.get(s.method)
    use_tau = method.signal == "weight" and s.weights != "linear"
    use_alpha = method.uses_alpha and s.target_w2 is None
    new_alpha, new_tau = alpha, tau
    if use_tau and (not use_alpha or any(f.cure == "tau" for f in found)):
        new_tau = tau / 2
    if use_alpha and (not use_tau or any(f.cure == "alpha" for f in found)):
        new_alpha = max(2 * alpha, ALPHA_STEP)
    changes = (("τ", tau, new_tau), ("α", alpha, new_alpha))
    return (
        new_alpha,
        new_tau,
        ", ".join(f"{name} {old:g} → {new:g}" for name, old, new in changes if old != new),
    )
