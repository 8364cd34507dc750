"""What may change α and τ while a run goes on: the guard, its rollbacks, and steering to a coupled W2."""

from collections.abc import Callable, Sequence
from typing import Any

from orwcfm_fast.control.guard import MAX_ROLLBACKS, Fault, Finding, Guard, milder
from orwcfm_fast.control.target_w2 import W2Steering
from orwcfm_fast.control.values import read_values
from orwcfm_fast.device import device_name
from orwcfm_fast.errors import UserError
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.method.weighting import effective_sample_size


class RunController(Callback):
    """Applies guard, target W2 and memory fallback between the parts of a trainer's rounds.

    Args:
        trainer: whose α, τ and batch sizes it may change; its probe must be called first.

    Attributes:
        notes: lines since the last record; on_note: called with each line at once.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.settings = trainer, trainer.settings
        self.guard = Guard(self.settings)
        self.steering = W2Steering.of(self.settings)
        self.notes: list[str] = []
        self.on_note: Callable[[str], None] = lambda text: None
        self.early: list[Finding] = []  # what the guard found in the round's weights
        self.rollbacks, self.refused_round = 0, 0  # rollbacks since a round after the last refused one stood
        trainer.sizes.on_change = self.note
        self.graphs = trainer.graphs.choices if trainer.graphs else None
        if self.graphs:
            self.graphs.on_choice = lambda text: self.on_note(text)

    def note(self, text: str) -> None:
        """Report a line now, and keep it for the round's record."""
        self.notes.append(text)
        self.on_note(f"guard: {text}")

    def report_to(self, on_note: Callable[[str], None]) -> None:
        """Report lines there from now on, those noted before the first round first."""
        self.on_note = on_note
        for text in self.notes:
            on_note(f"guard: {text}")

    def on_rollout(self, trainer: Trainer, rollout: Rollout, resumed: bool) -> None:
        """Check the weights; with --guard rollback halve τ until they pass. Set α where it is steered."""
        notes = [*self.notes]
        self.early = self._check_weights(rollout)
        if resumed:  # what there was to note of its weights is noted
            self.notes = notes
        if self.steering:
            if self.steering.drive is None:
                self.steering.foresee(rollout, trainer.tau, self.settings)
            trainer.alpha = self.steering.alpha()

    def _check_weights(self, rollout: Rollout) -> list[Finding]:
        while True:
            found = self.guard.before_steps(effective_sample_size(self.trainer.signal(rollout)))
            for finding in found:
                self.note(finding.text)
            if not found or self.settings.guard != "rollback":
                return found
            if self.settings.weights == "linear" or not self.make_milder(found):
                return []  # reported; going back would change nothing

    def on_measure(self, trainer: Trainer, rollout: Rollout, record: dict[str, Any]) -> None:
        """The smallest batch sizes of any process are everybody's, and so are the notes."""
        notes, sizes = zip(*trainer.ranks.all((self.notes, trainer.sizes.values())), strict=True)
        for text in dict.fromkeys(text for lines in notes for text in lines):
            if text not in self.notes:
                self.note(text)
        trainer.sizes.shrink_to([*sizes])
        record |= self.values()

    def on_round(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Add the guard's lines to the record (`guard`).

        Raises:
            Fault: the guard refuses the round.
        """
        found = [*self.early, *(late := self.guard.after_round(record))]
        for finding in late:
            self.note(finding.text)
        record["guard"], self.notes = self.notes, []
        if not self.guard.stands(found):
            raise Fault(trainer.round, found, record)
        if self.steering:
            self.steering.see(trainer.alpha, record["w2_coupled"])
        if trainer.round >= self.refused_round:
            self.rollbacks = 0

    def make_milder(self, found: Sequence[Finding]) -> bool:
        """Continue with a milder τ or α, by the guard's rule; whether there was one."""
        trainer = self.trainer
        trainer.alpha, trainer.tau, change = milder(trainer.alpha, trainer.tau, found, self.settings)
        if change:
            self.note(f"continues with {change}")
        return bool(change)

    def roll_back(self, fault: Fault, restore: Callable[[], int]) -> None:
        """Answer a fault: `restore` goes back to a good round and returns its number; continue from it, milder.

        Raises:
            Fault: the same, after MAX_ROLLBACKS in a row or where there is nothing left to change.
        """
        trainer, rollbacks = self.trainer, self.rollbacks + 1
        alpha, tau, sizes = trainer.alpha, trainer.tau, trainer.sizes.values()
        back = restore()
        trainer.alpha, trainer.tau = alpha, tau
        trainer.sizes.shrink_to([sizes])
        self.rollbacks, self.refused_round = rollbacks, fault.number
        self.notes = [*(fault.record["guard"] or [])]
        self.note(f"round {fault.number} is rolled back to the end of round {back}")
        if rollbacks > MAX_ROLLBACKS or not self.make_milder(fault.found):
            raise fault

    def values(self) -> dict[str, Any]:
        """α, τ and batch sizes in force."""
        return {"alpha": self.trainer.alpha, "tau": self.trainer.tau, **self.trainer.sizes.values()}

    def measured_on(self) -> list[Any]:
        """On what it was measured which calls are faster as CUDA graphs."""
        return [device_name(self.trainer.policy.device), self.settings.compile]

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it."""
        found = {
            "control": self.values(),
            "guard": self.guard.to_state(),
            "notes": self.notes,
            "rollbacks": [self.rollbacks, self.refused_round],
        }
        if self.graphs:
            found["graphs"] = {"measured": self.measured_on(), "chosen": self.graphs.chosen}
        return found | ({"steering": self.steering.to_state()} if self.steering else {})

    def restore(self, state: dict[str, Any], where: str) -> None:
        """Continue with what `to_state` wrote.

        Raises:
            UserError: it is not that.
        """
        trainer = self.trainer
        values = read_values(state.get("control"), self.settings, where)
        self.guard.restore(state.get("guard"), where)
        notes, rollbacks = state.get("notes", []), state.get("rollbacks", [0, 0])
        if not isinstance(notes, list) or not all(isinstance(text, str) for text in notes):
            raise UserError(f"{where}: state.json: notes are damaged")
        if not (
            isinstance(rollbacks, list) and len(rollbacks) == 2 and all(type(n) is int for n in rollbacks)
        ):
            raise UserError(f"{where}: state.json: rollbacks are damaged")
        graphs = state.get("graphs", {"chosen": {}})
        chosen = graphs.get("chosen") if isinstance(graphs, dict) else None
        if not isinstance(chosen, dict) or not all(isinstance(x, bool) for x in chosen.values()):
            raise UserError(f"{where}: state.json: graphs are damaged")
        if self.graphs and graphs.get("measured") == self.measured_on():
            self.graphs.chosen = {**chosen, **self.graphs.chosen}
        trainer.alpha, trainer.tau = values.pop("alpha"), values.pop("tau")
        for name, size in values.items():
            setattr(trainer.sizes, name, size)
        self.notes, (self.rollbacks, self.refused_round) = [*notes], rollbacks
        if self.steering:
            self.steering.restore(state.get("steering"), where)

    def on_reset(self, trainer: Trainer) -> None:
        """Forget every round."""
        self.guard.past, self.steering = {}, W2Steering.of(self.settings)
