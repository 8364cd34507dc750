"""The evaluation that closes a run: the policy beside its reference, on held-out noise."""

from collections.abc import Callable

import torch
from torch import Tensor

from orwcfm_fast.evaluation.evaluate import Measures
from orwcfm_fast.evaluation.evaluate import evaluate as measure
from orwcfm_fast.evaluation.held_out import Evaluator
from orwcfm_fast.method.callbacks import Progress, ReportProgress
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import Scores
from orwcfm_fast.runs import drift_control
from orwcfm_fast.settings import Finetune


def evaluate(
    trainer: Trainer,
    evaluator: Evaluator,
    s: Finetune,
    at_rest: bool,
    watch: Callable[[Progress], None] | None = None,
) -> list[Measures]:
    """Measures of the reference, "before", of the policy, "after", and of what the settings make at τ = 0.

    Args:
        at_rest: whether the settings are trained again with τ = 0.
        watch: called while they are.
    """

    def weights(scores: Scores) -> Tensor:
        """The weights that samples with these scores would have in a round."""
        none = torch.empty(0)
        return trainer.signal(Rollout(none, none, trainer.trained_on(scores)))

    def of(**models: Policy) -> list[Measures]:
        weigh = weights if s.group == 1 else None
        return measure(
            models, trainer.reference, evaluator, s, s.eval_n, trainer.sizes, ranks=trainer.ranks, weigh=weigh
        )

    measured = of(before=trainer.reference, after=trainer.policy)
    if at_rest:
        callbacks = [ReportProgress(watch)] if watch else []
        with drift_control.trained_at_rest(trainer, *callbacks) as policy:
            measured += of(**{drift_control.NAME: policy})
    return measured


def values(after: Measures, rollout: int) -> dict[str, float]:
    """What the closing evaluation says of the final policy, in the units of a round's record."""
    found = {"reward_mean": after.reward.mean, "diversity": after.diversity.mean}
    return found | ({} if after.ess_share is None else {"ess": after.ess_share * rollout})
