"""What may change while a run goes on, and who says so: guard, steering, memory that runs out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from orwcfm_fast.control.guard import MAX_ROLLBACKS, Fault, Finding, Guard, cured
from orwcfm_fast.control.memory import halving
from orwcfm_fast.control.target_w2 import W2Steering
from orwcfm_fast.control.values import Control
from orwcfm_fast.distributed import ProcessGroup
from orwcfm_fast.errors import UserError
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.method.weighting import effective_sample_size, weigh, weigh_within
from orwcfm_fast.settings import Finetune

T = TypeVar("T")


class RunController:
    """Holds the values in force (`control`), the guard and the steering of one run.

    Args:
        settings: what the run began with.

    Attributes:
        notes: what was said since the last record; say: called with each such line at once.
    """

    def __init__(self, settings: Finetune) -> None:
        self.settings, self.control, self.guard = settings, Control.start(settings), Guard(settings)
        self.steering = W2Steering.of(settings)
        self.notes: list[str] = []
        self.say: Callable[[str], None] = lambda text: None
        self.rollbacks, self.faulty = 0, 0  # since a round beyond the last faulty one stood; that round

    def note(self, text: str) -> None:
        """Say it now, and keep it for the round's record."""
        self.notes.append(text)
        self.say(f"guard: {text}")

    def tell(self, say: Callable[[str], None]) -> None:
        """Say lines there from now on, and what was noted before the first round."""
        self.say = say
        for text in self.notes:
            say(f"guard: {text}")

    def begin_round(self, rollout: Rollout, again: bool = False) -> tuple[Tensor, list[Finding]]:
        """Weights [N] of a scored rollout, and what the guard says of them; sets the round's α where it is steered.

        --guard rollback halves τ until the weights are fit. `again`: the round is taken up where it was left;
        what there was to note of its weights is noted.
        """
        notes = [*self.notes]
        w, found = self.weigh(rollout)
        if again:
            self.notes = notes
        if self.steering:
            if self.steering.drive is None:
                self.steering.foresee(rollout, self.control.tau, self.settings)
            self.control = replace(self.control, alpha=self.steering.alpha())
        return w, found

    def weigh(self, rollout: Rollout) -> tuple[Tensor, list[Finding]]:
        """Weights [N] of a scored rollout that the guard can let pass, or what it says of them."""
        s = self.settings
        while True:
            how = (self.control.tau, s.weights, s.normalize_weights)
            if s.group > 1 and rollout.condition is not None:
                w = weigh_within(rollout.reward, rollout.condition, *how)
            else:
                w = weigh(rollout.reward, *how)
            found = self.guard.before_steps(effective_sample_size(w))
            for finding in found:
                self.note(finding.text)
            if not found or s.guard != "rollback":
                return w, found
            if s.weights == "linear" or not self.milder(found):
                return w, []  # said; going back would change nothing

    def judge(self, number: int, record: dict[str, Any], early: Sequence[Finding] = ()) -> dict[str, Any]:
        """A round's record with what the guard says of it (`guard`); `early`: what it said of the weights.

        Raises:
            Fault: the round does not stand.
        """
        found = self.guard.after_round(record)
        for finding in found:
            self.note(finding.text)
        record["guard"], self.notes = self.notes, []
        if not self.guard.stands([*early, *found]):
            raise Fault(number, [*early, *found], record)
        if self.steering:
            self.steering.see(self.control.alpha, record["w2_coupled"])
        if number >= self.faulty:
            self.rollbacks = 0
        return record

    def milder(self, found: Sequence[Finding]) -> bool:
        """Go on with a milder τ or α, by the guard's rule; whether it had one to give."""
        self.control, change = cured(self.control, found, self.settings)
        if change:
            self.note(f"goes on with {change}")
        return bool(change)

    def take_back(self, fault: Fault, restore: Callable[[], int]) -> None:
        """Answer a fault: `restore` goes back to a good round and says which; on from there, milder.

        Raises:
            Fault: the same, after MAX_ROLLBACKS in a row or where there is nothing left to change.
        """
        control, rollbacks = self.control, self.rollbacks + 1
        back = restore()
        self.control, self.rollbacks, self.faulty = control, rollbacks, fault.number
        self.notes = [*(fault.record["guard"] or [])]
        self.note(f"round {fault.number} is taken back to where round {back} ended")
        if rollbacks > MAX_ROLLBACKS or not self.milder(fault.found):
            raise fault

    def in_chunks(self, work: Callable[[int], T]) -> T:
        """work(chunk); where memory runs out, with half the chunk from now on."""
        return halving(work, self.control.chunk, "chunk", self.set_chunk)

    def set_chunk(self, size: int) -> None:
        self.control = replace(self.control, chunk=size)
        self.note(f"out of memory: goes on with {size} samples at once in a rollout")

    def set_micro_batch(self, size: int) -> None:
        self.control = replace(self.control, micro_batch=size)
        self.note(f"out of memory: goes on with a micro-batch of {size}")

    def set_reward_batch(self, size: int) -> None:
        least = min(size, self.control.reward_batch or size)  # of several rewards
        self.control = replace(self.control, reward_batch=least)
        self.note(f"out of memory: goes on with {size} samples at once for a reward")

    def agree(self, ranks: ProcessGroup) -> None:
        """Every rank goes on with the smallest sizes that memory left to any, and knows what the others noted."""
        notes, controls = zip(*ranks.all((self.notes, self.control)), strict=True)
        for text in dict.fromkeys(text for told in notes for text in told):
            if text not in self.notes:
                self.note(text)
        self.control = replace(
            self.control,
            micro_batch=min(c.micro_batch for c in controls),
            chunk=min(c.chunk for c in controls),
            reward_batch=min((c.reward_batch for c in controls if c.reward_batch), default=0),
        )

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it."""
        found = {
            "control": self.control.to_state(),
            "guard": self.guard.to_state(),
            "notes": self.notes,
            "rollbacks": [self.rollbacks, self.faulty],
        }
        return found | ({"steering": self.steering.to_state()} if self.steering else {})

    def restore(self, state: dict[str, Any], where: str) -> None:
        """Go on with what `to_state` wrote.

        Raises:
            UserError: it is not that.
        """
        self.control = Control.of_state(state.get("control"), self.settings, where)
        self.guard.restore(state.get("guard"), where)
        notes, rollbacks = state.get("notes", []), state.get("rollbacks", [0, 0])
        if not isinstance(notes, list) or not all(isinstance(text, str) for text in notes):
            raise UserError(f"{where}: state.json: notes are damaged")
        if not (
            isinstance(rollbacks, list) and len(rollbacks) == 2 and all(type(n) is int for n in rollbacks)
        ):
            raise UserError(f"{where}: state.json: rollbacks are damaged")
        self.notes, (self.rollbacks, self.faulty) = [*notes], rollbacks
        if self.steering:
            self.steering.restore(state.get("steering"), where)

    def start_over(self) -> None:
        """Forget every round."""
        self.guard.past, self.steering = {}, W2Steering.of(self.settings)
