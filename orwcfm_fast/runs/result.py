"""What a finished run has to say."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.evaluation.evaluate import Measures
from orwcfm_fast.method.trainer import PHASES
from orwcfm_fast.runs.run import Run
from orwcfm_fast.settings import Finetune
from orwcfm_fast.theory.prediction import lower, reached_line


@dataclass
class Result:
    """Before and after on the same held-out noise, the rounds between, and the run's files."""

    run: Run
    settings: Finetune
    before: Measures
    after: Measures
    records: list[dict[str, Any]]
    seconds: float
    best: Path | None

    def summary(self) -> dict[str, Any]:
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
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
        """Forecast and reached, where round 1 made a forecast."""
        try:
            found = json.loads(self.run.forecast.read_bytes())
            return reached_line(found, self.after.reward.mean, len(self.records))
        except FileNotFoundError:
            return None

    def reward_drop(self) -> str | None:
        """That the reward is lower than before, in words, where it is."""
        if self.after.reward.high >= self.before.reward.low:
            return None
        return "the reward fell: the model drifted further than the weights led it; try a higher --tau or --alpha"

    def lower_alpha(self) -> float | None:
        """The α to try for more reward; None where there is none, or where it is steered."""
        s = self.settings
        return lower(s.alpha) if s.alpha and s.target_w2 is None else None

    def by_phase(self) -> dict[str, float]:
        """Seconds of the loop by phase, over all rounds."""
        return {p: sum(r[f"seconds_{p}"] for r in self.records) for p in (*PHASES, "probe")}

    def by_reward(self) -> dict[str, float]:
        """Seconds of each reward over all rounds, where there are several."""
        names = self.records[-1].get("seconds_rewards", {})
        return {name: sum(r["seconds_rewards"][name] for r in self.records) for name in names}


def _mean(records: list[dict[str, Any]], key: str) -> float:
    return sum(r[key] for r in records) / len(records)
