"""The probe: samples from the same noise after every round, on which drift and diversity are followed."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from orwcfm_fast.evaluation.drift import Drift, coupled_w2, pairwise_distance, sample_with_drift
from orwcfm_fast.evaluation.features import decoded_features
from orwcfm_fast.method import noise
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.rollout import Rollout, sample, start_conditions, start_noise
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.policy import Policy

STEERED = 1024  # samples that steer the coupled W2: 128 know that of digits to 20 %, these to 8 %
ROLLOUT_SAMPLES = 512  # of the rollout, whose diversity is reported


def probe_size(s) -> int:
    """Samples that W2 is followed on; steering needs it more exactly than a display."""
    return s.probe if s.target_w2 is None else max(s.probe, STEERED)


class Probe(Callback):
    """A trainer's policy beside its reference, on one noise; each process draws its share, all know the whole.

    Args:
        trainer: whose policy and reference are compared.
        features: decoded samples → features [B, F] in which diversity is measured.

    Attributes:
        noise: x0 [n, *shape].
        of_reference, samples: drawn from it by the reference, and by the policy when it was last drawn from.
        spread: mean distance of two reference samples.
    """

    def __init__(self, trainer: Trainer, features: Callable[[Tensor], Tensor]) -> None:
        s = trainer.settings
        self.policy, self.reference, self.features = trainer.policy, trainer.reference, features
        self.settings, self.sizes, self.ranks = s, trainer.sizes, trainer.ranks
        self.noise = start_noise(self.policy, probe_size(s), s.seed, noise.PROBE)
        self.samples = self.of_reference = self._draw(self.reference)
        self.spread = pairwise_distance(self.of_reference)
        self._feature_spread = self.diversity(self.of_reference, self.conditions)

    def on_measure(self, trainer: Trainer, rollout: Rollout, record: dict[str, Any]) -> None:
        """Draw the policy's samples as it is now; its drift and diversity."""
        with trainer.phases("probe"):
            drift = self._draw_with_drift()
            record["velocity_gap"], record["velocity_norm"] = drift.gap, drift.norm_ratios()
            record["diversity"] = self.diversity(
                rollout.x1[:ROLLOUT_SAMPLES],
                None if rollout.condition is None else rollout.condition[:ROLLOUT_SAMPLES],
            )
            record["diversity_share"] = self.diversity(self.samples, self.conditions) / max(
                self._feature_spread, 1e-12
            )
            record["w2_coupled"] = coupled_w2(self.samples, self.of_reference)

    def on_restore(self, trainer: Trainer) -> None:
        self.samples = self._draw(self.policy)

    def on_reset(self, trainer: Trainer) -> None:
        self.samples = self.of_reference

    @property
    def conditions(self) -> Tensor | None:
        """Rows [n] of the prompts of the whole probe, where there are some."""
        return start_conditions(self.policy, len(self.noise), self.settings)

    def diversity(self, x: Tensor, condition: Tensor | None = None) -> float:
        """Mean distance in features of two of any samples x [N, *shape], the same on all processes."""
        share = self.ranks.share(len(x))
        mine, rows = x[share], None if condition is None else condition[share]
        with self.ranks.together():
            part = self.sizes.fit(
                "chunk",
                lambda chunk: decoded_features(self.policy, self.features, mine, chunk, rows),
                len(mine),
            )
        return pairwise_distance(self.ranks.gather(part, len(x)))

    def _draw_with_drift(self) -> Drift:
        """Draw the policy's samples; its drift along the way."""
        x0, condition = self._share()
        with self.ranks.together():
            part, drift = self.sizes.fit(
                "chunk",
                lambda chunk: sample_with_drift(
                    self.policy, self.reference, x0, self.settings, chunk, condition
                ),
                len(x0),
            )
        self.samples = self.ranks.gather(part, len(self.noise))
        return Drift.joined([*self.ranks.all(drift)])

    def _draw(self, policy: Policy) -> Tensor:
        x0, condition = self._share()
        with self.ranks.together():
            part = self.sizes.fit(
                "chunk",
                lambda chunk: sample(policy, x0, self.settings, chunk, condition=condition),
                len(x0),
            )
        return self.ranks.gather(part, len(self.noise))

    def _share(self) -> tuple[Tensor, Tensor | None]:
        """This process's noise [n, *shape] and its rows [n] of the prompts, where there are some."""
        mine = self.ranks.share(len(self.noise))
        x0 = self.noise[mine]
        return x0, start_conditions(self.policy, len(x0), self.settings, mine.start)
