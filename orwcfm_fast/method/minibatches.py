"""Which samples of a rollout make up each minibatch of a round, and with what noise."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from orwcfm_fast.distributed import ProcessGroup
from orwcfm_fast.method import noise
from orwcfm_fast.method.coupling import Batch, couple
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Finetune


class Minibatches:
    """The coupled minibatches of a round, this process's part of each.

    The draws (sample, t, noise) run over the rollout again and again, each time in a new order.

    Args:
        seed: of the run, 0-d, on the policy's device.
    """

    def __init__(self, policy: Policy, settings: Finetune, seed: Tensor, ranks: ProcessGroup) -> None:
        self.policy, self.settings, self.seed, self.ranks = policy, settings, seed, ranks

    def __call__(
        self, rollout: Rollout, w: Tensor, alpha: float, number: int, skip: int = 0
    ) -> Iterator[Batch]:
        """Those of round `number`, `steps_per_round` of them but for the first `skip`; weights w [N], α."""
        s = self.settings
        passes = math.ceil(s.steps_per_round * s.batch / len(w))
        order = torch.cat([noise.permutation(len(w), self.seed, number * passes + p) for p in range(passes)])
        for k in range(skip, s.steps_per_round):
            pick = order[k * s.batch : (k + 1) * s.batch]
            first = (number * s.steps_per_round + k) * s.batch
            index = noise.indices(first, s.batch, self.policy.device)
            batch = couple(rollout.x1[pick], w[pick], alpha, self.seed, index, s.coupling)
            if rollout.condition is not None:
                batch = replace(batch, condition=rollout.condition[pick])
            yield batch.part(self.ranks.share(s.batch))
