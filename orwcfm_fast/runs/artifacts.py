"""What a fine-tuning run shows of itself: pictures by round, its forecast, and what it leaves at its end."""

import json
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.features import decoded_features
from orwcfm_fast.evaluation.held_out import Evaluator
from orwcfm_fast.evaluation.probe import Probe
from orwcfm_fast.files import read_small, write_text
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.reporting.pictures import save_curves, save_samples
from orwcfm_fast.reporting.report import run_report
from orwcfm_fast.runs.result import Result
from orwcfm_fast.runs.run import Run
from orwcfm_fast.theory.prediction import MANY_PROMPTS, forecast_line, forecast_run, reached_line

PICTURE_SAMPLES = 64
FLAT = 0.995  # of the rollout: an ESS above it is that of weights within 7 % of each other
MAX_FORECAST_BYTES = 1 << 20


class RunArtifacts:
    """The files of a run that people look at; for the first rank."""

    def __init__(self, run: Run, trainer: Trainer, evaluator: Evaluator) -> None:
        self.run, self.trainer, self.evaluator, self.settings = run, trainer, evaluator, trainer.settings

    def save_round_samples(self) -> None:
        """The probe as it is after the trainer's rounds so far."""
        number = self.trainer.round
        probe = self._picture_samples(self.trainer.find(Probe).samples)
        save_samples(self.run.samples / f"round_{number:03d}.png", {f"round {number}": probe})

    def first_round_messages(self, record: dict[str, Any]) -> list[str]:
        """What there is to say after the first round."""
        lines = [self._flat(record)]
        if self.settings.target_w2 is None:
            lines.append(self._forecast())
        return [line for line in lines if line]

    def discard_unreadable_forecast(self) -> None:
        """A forecast that cannot be read is none; the report would stumble over it after all the training."""
        try:
            reached_line(json.loads(read_small(self.run.forecast, MAX_FORECAST_BYTES)), 0.0, 1)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self.run.forecast.unlink(missing_ok=True)

    def save_results(self, result: Result, about: list[str]) -> None:
        """Pictures, curves, report and summary of the whole run; `about`: what it was, in words."""
        probe = self.trainer.find(Probe)
        pictures = {
            "before": self._picture_samples(probe.of_reference),
            "after": self._picture_samples(probe.samples),
        }
        save_samples(self.run.samples / "before_after.png", pictures)
        after = result.after
        save_curves(self.run.path / "curves.png", result.records, after.reward.mean, after.diversity.mean)
        run_report(result, about)
        write_text(self.run.summary, json.dumps(result.summary(), indent=1) + "\n")

    def _flat(self, record: dict[str, Any]) -> str:
        """What to do where the weights hardly differ, in words; nothing where they do."""
        s = self.settings
        if s.tau == 0 or record["ess"] <= FLAT * s.rollout:
            return ""
        if record["reward_std"] == 0:
            return "all rewards are equal: there is nothing to learn from"
        return (
            f"weights nearly equal (ESS {record['ess']:.0f} of {s.rollout}): rewards spread by "
            f"{record['reward_std']:.2g} only; a higher --tau weighs them more, --weights advantage goes by their "
            "spread"
        )

    def _forecast(self) -> str:
        """Forecast this run from its first rollout, at no extra samples; one line."""
        reference, trainer = self.trainer.reference, self.trainer
        if (prompts := reference.conditions) and len(prompts) > 1:
            return MANY_PROMPTS
        assert trainer.last
        try:
            own = self.settings.model_copy(update={"alpha": trainer.alpha, "tau": trainer.tau})
            with torch.inference_mode():
                found = forecast_run(
                    trainer.last.rollout,
                    own,
                    lambda x: decoded_features(reference, self.evaluator.features, x, trainer.sizes.chunk),
                )
        except UserError as error:  # a forecast is a comment on the run, never its end
            return f"no forecast: {error}"
        write_text(self.run.forecast, json.dumps(found, indent=1) + "\n")
        return forecast_line(found)

    def _picture_samples(self, x: Tensor) -> Tensor:
        """What of the probe fits a picture: the first images, all vectors."""
        return self.trainer.reference.decode(x[:PICTURE_SAMPLES] if x.dim() == 4 else x)
