"""A trainer with its probe and its controller."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from orwcfm_fast.control.controller import RunController
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.evaluation.held_out_prompts import HeldOutPrompts
from orwcfm_fast.evaluation.probe import Probe
from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import Reward, RewardSum
from orwcfm_fast.settings import Finetune


def build_trainer(
    policy: Policy,
    reward: Reward,
    settings: Finetune,
    *,
    reward_name: str = "reward",
    holdout: RewardSum | None = None,
    reference: Policy | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    callbacks: Sequence[Callback] = (),
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Trainer:
    """The trainer that `orwcfm finetune` runs; its records have all keys of metrics.jsonl.

    Args:
        features: decoded samples → features [B, F] in which diversity is measured; pixels where None.
        callbacks: called after the probe and the controller.
        the others: as for `Trainer`.
    """
    trainer = Trainer(
        policy, reward, settings, reward_name=reward_name, holdout=holdout, reference=reference,
        ranks=ranks,
    )  # fmt: skip
    controller = RunController(trainer)
    probe = Probe(trainer, features or (lambda x: x))
    controller.guard.spread, controller.guard.dimension = probe.spread, math.prod(policy.shape)
    held_out = [HeldOutPrompts(trainer)] if policy.conditions and policy.conditions.held_out else []
    trainer.callbacks += [probe, *held_out, controller, *callbacks]
    return trainer
