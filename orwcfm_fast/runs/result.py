"""The result of a finished fine-tuning run."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.evaluation.evaluate import Measures
from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.method.trainer import PHASES
from orwcfm_fast.reporting.parting import parting_line
from orwcfm_fast.runs.run import Run, named_code
from orwcfm_fast.settings import Finetune
from orwcfm_fast.theory.prediction import limit_note, lower, reached_line


@dataclass
class Result:
    """Measures before and after training on the same held-out noise, and the records of the rounds between.

    Attributes:
        records: of metrics.jsonl, one for each round.
        seconds: of the whole run.
        best: the best checkpoint, where one is kept.
        at_rest: measures of the same settings with τ = 0, where they were made.
        last_wait: seconds for the last checkpoint, after all rounds.
    """

    run: Run
    settings: Finetune
    before: Measures
    after: Measures
    records: list[dict[str, Any]]
    seconds: float
    best: Path | None
    at_rest: list[Measures] = field(default_factory=list)
    last_wait: float = 0.0

    @property
    def measured(self) -> list[Measures]:
        """All that was measured, in the order of the closing table."""
        return [self.before, self.after, *self.at_rest]

    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "at_rest": [m.to_dict() for m in self.at_rest],
            "rounds": len(self.records),
            "best": str(self.best.relative_to(self.run.path)) if self.best else None,
            "ess": self.records[-1]["ess"],
            "images_per_s_rollout": _mean(self.records, "images_per_s_rollout"),
            "images_per_s_train": _mean(self.records, "images_per_s_train"),
            "seconds": self.seconds,
            "seconds_by_phase": self.by_phase(),
            "seconds_by_reward": self.by_reward(),
            "settings": self.settings.model_dump(),
            "versions": checkpoint.versions(),
        }

    def forecast(self) -> str | None:
        """The forecast of round 1 beside what was reached, in one line; None without a forecast."""
        try:
            found = json.loads(self.run.forecast.read_bytes())
            line = reached_line(found, self.after.reward.mean, len(self.records))
            gain, w2 = self.after.reward.mean - self.before.reward.mean, self.after.w2_coupled
            note = limit_note(found, gain, w2.mean) if w2 else ""
            return f"{line}\n{note}" if note else line
        except FileNotFoundError:
            return None

    def reward_drop(self) -> str | None:
        """A message that the reward is lower than before training; None where it is not."""
        if self.after.reward.high >= self.before.reward.low:
            return None
        return "the reward fell: the policy drifted without gaining reward; try a higher --tau or --alpha"

    def parting(self) -> str | None:
        """Where the held-out reward began to fall while the trained one rose; None where it did not."""
        return parting_line(self.records, self.settings.rollout)

    def next_command(self) -> str:
        """The command of the same run with a smaller α; empty where α is 0 already, is not used or is set by W2."""
        s = self.settings
        if not s.alpha or s.target_w2 is not None or not METHODS.get(s.method).uses_alpha:
            return ""
        config = shlex.quote(str(self.run.config))
        return " ".join(["orwcfm finetune --config", config, *named_code(s), f"--alpha {lower(s.alpha):g}"])

    def by_phase(self) -> dict[str, float]:
        """Seconds spent in each phase of a round, summed over all rounds."""
        names = (*PHASES, "probe", "checkpoint")
        found = {p: sum(r.get(f"seconds_{p}", 0.0) for r in self.records) for p in names}
        found["checkpoint"] += self.last_wait
        return found

    def by_reward(self) -> dict[str, float]:
        """Seconds spent in each reward over all rounds; empty where there is only one reward."""
        names = self.records[-1].get("seconds_rewards", {})
        return {name: sum(r["seconds_rewards"][name] for r in self.records) for name in names}


def _mean(records: list[dict[str, Any]], key: str) -> float:
    return sum(r[key] for r in records) / len(records)
