"""The files of a fine-tuning run for people to look at: pictures of every round, forecast, report, summary."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.evaluation.features import decoded_features
from orwcfm_fast.evaluation.held_out import Evaluator
from orwcfm_fast.evaluation.probe import Probe
from orwcfm_fast.files import read_small, write_text
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.reporting.extremes import extreme_rows, save_extremes
from orwcfm_fast.reporting.pictures import PAIRS, Shares, save_curves, save_pairs, save_samples
from orwcfm_fast.reporting.report import run_report
from orwcfm_fast.runs.result import Result
from orwcfm_fast.runs.run import Run
from orwcfm_fast.theory.prediction import MANY_PROMPTS, forecast_line, forecast_run, limit_note, reached_line

FLAT = 0.995  # an ESS above this share of the rollout means weights within about 7 % of each other
MAX_FORECAST_BYTES = 1 << 20


class RunArtifacts:
    """Writes pictures, forecast, report and summary of a run; used by the first rank only."""

    def __init__(self, run: Run, trainer: Trainer, evaluator: Evaluator) -> None:
        self.run, self.trainer, self.evaluator, self.settings = run, trainer, evaluator, trainer.settings

    def save_round_samples(self) -> None:
        """A picture of the probe samples after the rounds trained so far; of images, beside the reference's."""
        number = self.trainer.round
        path, samples = self.run.samples / f"round_{number:03d}.png", self.trainer.find(Probe).samples
        if self._are_images(samples):
            self._save_pairs(path, f"{number} round{'s' * (number != 1)}")
        else:
            save_samples(path, {f"round {number}": self._decoded(samples)})
        if self.trainer.last:
            self._save_extremes(self.trainer.last.rollout)

    def _save_extremes(self, rollout: Rollout) -> None:
        """A picture of the samples that the round just trained on rewarded most and least."""
        policy, number = self.trainer.reference, self.trainer.round
        groups = extreme_rows(rollout.reward, image=len(policy.shape) == 3 or policy.pipeline is not None)
        most, least = (
            policy.decode(rollout.x1[rows], None if rollout.condition is None else rollout.condition[rows])
            for rows in groups
        )
        rewards = rollout.reward[groups[0]], rollout.reward[groups[1]]
        save_extremes(self.run.samples / f"extremes_{number:03d}.png", most, least, rewards, number)

    def first_round_messages(self, record: dict[str, Any]) -> list[str]:
        """Messages for the user after the first round: weights that hardly differ, and the forecast."""
        lines = [self._flat(record)]
        if self.settings.target_w2 is None:
            lines.append(self._forecast())
        return [line for line in lines if line]

    def discard_unreadable_forecast(self) -> None:
        """Delete a forecast that cannot be read, which would otherwise fail the report after all the training."""
        try:
            found = json.loads(read_small(self.run.forecast, MAX_FORECAST_BYTES))
            reached_line(found, 0.0, 1)
            limit_note(found, 0.0, 1.0)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self.run.forecast.unlink(missing_ok=True)

    def save_results(self, result: Result, about: list[str]) -> None:
        """Pictures, curves, report and summary of the finished run.

        Args:
            about: what was run, in words, a line each.
        """
        path, probe, after = self.run.samples / "before_after.png", self.trainer.find(Probe), result.after
        if self._are_images(probe.samples):
            shares = (result.before.classes, after.classes) if after.classes else None
            self._save_pairs(path, f"{self.trainer.round} rounds", shares)
        else:
            pictures = {"before": self._decoded(probe.of_reference), "after": self._decoded(probe.samples)}
            save_samples(path, pictures)
        save_curves(self.run.path / "curves.png", result.records, after.reward.mean, after.diversity.mean)
        run_report(result, about)
        write_text(self.run.summary, json.dumps(result.summary(), indent=1) + "\n")

    def _are_images(self, samples: Tensor) -> bool:
        return self.trainer.reference.decode(samples[:1]).dim() == 4

    def _decoded(self, samples: Tensor) -> Tensor:
        """Vectors as they are; of videos and sound as many as fit a picture."""
        policy = self.trainer.reference
        rows = self.trainer.find(Probe).conditions
        if policy.pipeline and rows is not None:
            return policy.decode(samples[:PAIRS], rows[:PAIRS])
        return policy.decode(samples)

    def _save_pairs(self, path: Path, rounds: str, shares: tuple[Shares, Shares] | None = None) -> None:
        """The first probe samples, images, of the reference and of the policy in pairs."""
        probe, decode = self.trainer.find(Probe), self.trainer.reference.decode
        before, after = decode(probe.of_reference[:PAIRS]), decode(probe.samples[:PAIRS])
        changes = None
        if self.evaluator.probabilities:
            with torch.inference_mode():
                kinds = [self.evaluator.probabilities(x).argmax(1).tolist() for x in (before, after)]
            changes = [f"{a}→{b}" if a != b else "" for a, b in zip(*kinds, strict=True)]
        save_pairs(path, before, after, rounds, changes, shares)

    def _flat(self, record: dict[str, Any]) -> str:
        """What to do where the weights hardly differ; an empty text where they do differ."""
        s = self.settings
        if s.tau == 0 or record["ess"] <= FLAT * s.rollout:
            return ""
        if record["reward_std"] == 0:
            return "all rewards are equal: there is nothing to learn from"
        return (
            f"weights nearly equal (ESS {record['ess']:.0f} of {s.rollout}): rewards spread by "
            f"{record['reward_std']:.2g} only; raise --tau, or use --weights advantage, which standardises them first"
        )

    def _forecast(self) -> str:
        """Forecast the run from its first rollout, without drawing more samples; the forecast in one line."""
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
        except UserError as error:  # a forecast that cannot be made must not end the run
            return f"no forecast: {error}"
        write_text(self.run.forecast, json.dumps(found, indent=1) + "\n")
        return forecast_line(found)
