"""What acts between the parts of a round, from outside the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orwcfm_fast.method.rollout import Rollout
    from orwcfm_fast.method.trainer import Trainer


class Callback:
    """Base of all callbacks; every method does nothing. A trainer calls its callbacks in order.

    A round calls, in this order: `on_stage("rollout")`, `on_boundary` after each chunk of it,
    `on_stage("reward")`, `on_rollout`, then for every gradient step `on_stage("step")` and `on_boundary`,
    then `on_stage("measure")`, `on_measure` and `on_round`.
    """

    def on_stage(self, trainer: "Trainer", stage: str) -> None:
        """A part of the round begins: "rollout", "reward", "step" or "measure"."""

    def on_boundary(self, trainer: "Trainer") -> None:
        """The round can be left here and continued later from `RoundState`; may raise."""

    def on_rollout(self, trainer: "Trainer", rollout: "Rollout", resumed: bool) -> None:
        """The rollout is scored; `trainer.alpha` and `trainer.tau` may still be changed for this round.

        Args:
            resumed: the round was left after some of its steps and is continued.
        """

    def on_measure(self, trainer: "Trainer", rollout: "Rollout", record: dict[str, Any]) -> None:
        """The round's steps are taken; its record may be added to. Called on every process."""

    def on_round(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """The round is over and its record is the same on every process; may raise to refuse the round."""

    def on_reset(self, trainer: "Trainer") -> None:
        """The trainer is back before its first round."""

    def on_restore(self, trainer: "Trainer") -> None:
        """The trainer continues from a checkpoint."""


@dataclass(frozen=True)
class Progress:
    """Where a trainer stands: the round under way, its gradient steps so far, and the part of it that begins."""

    round: int
    step: int
    stage: str


class ReportProgress(Callback):
    """Calls a function with a `Progress` at every part of a round."""

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self.report = report

    def on_stage(self, trainer: "Trainer", stage: str) -> None:
        current = trainer.last if stage == "measure" else trainer.current
        number = trainer.round - (stage == "measure")
        self.report(Progress(number, len(current.losses) if current else 0, stage))
