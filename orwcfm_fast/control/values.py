"""What a run may change by itself: α, τ, how much goes through the network at once."""

from dataclasses import asdict, dataclass
from typing import Any

from orwcfm_fast.errors import UserError
from orwcfm_fast.settings import Finetune


@dataclass(frozen=True)
class Control:
    """The values in force; in every checkpoint, so that a resumed run goes on with them.

    Attributes:
        alpha, tau: of the round; micro_batch: samples at once in a step, chunk: in a rollout, reward_batch: for a
            reward, where 0 is all of them.
    """

    alpha: float
    tau: float
    micro_batch: int
    chunk: int
    reward_batch: int

    @classmethod
    def start(cls, s: Finetune) -> "Control":
        """As the settings say; a micro-batch is at most the batch."""
        micro_batch, chunk = min(s.micro_batch or s.batch, s.batch), min(s.chunk, s.rollout)
        return cls(s.alpha, s.tau, micro_batch, chunk, s.reward_batch)

    @classmethod
    def of_state(cls, values: Any, s: Finetune, where: str) -> "Control":
        """From a checkpoint's state.json; one that holds none is as the settings say.

        Raises:
            UserError: values of other kinds or out of bounds.
        """
        if values is None:
            return cls.start(s)
        try:
            values = {"reward_batch": s.reward_batch} | values  # older ones have none
            found = cls(**{k: kind(values[k]) for k, kind in cls.__annotations__.items()})
        except (TypeError, ValueError, KeyError, OverflowError):
            raise UserError(f"{where}: state.json: control is damaged") from None
        if (
            not (0 <= found.alpha < float("inf") and abs(found.tau) < float("inf"))
            or found.micro_batch < 1
            or found.chunk < 1
            or found.reward_batch < 0
        ):
            raise UserError(f"{where}: state.json: control is out of bounds: {values}")
        return found

    def to_state(self) -> dict[str, Any]:
        return asdict(self)
