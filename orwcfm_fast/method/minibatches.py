"""Which samples of a rollout make up each minibatch of a round, and with what noise."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from orwcfm_fast.method import noise
from orwcfm_fast.method.coupling import Batch, couple
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.method.step import PolicyOptimizer
from orwcfm_fast.settings import Finetune


class Minibatches:
    """The coupled minibatches of a round, this rank's part of each.

    The draws (sample, t, noise) run over the rollout, each time in an order of its own. With several reference
    passes there are as many times fewer of them, taken in a new order in each pass, and the reference's velocities
    are kept from the first.

    Args:
        learner: that they are for: its policy, ranks and reference.
        seed: of the run, 0-d, on the policy's device.
    """

    def __init__(self, learner: PolicyOptimizer, settings: Finetune, seed: Tensor) -> None:
        self.learner, self.settings, self.seed = learner, settings, seed

    def __call__(
        self, rollout: Rollout, w: Tensor, alpha: float, number: int, skip: int = 0
    ) -> Iterator[Batch]:
        """Those of round `number`, `steps_per_round` of them but for the first `skip`; weights w [N], α."""
        s = self.settings
        passes = math.ceil(s.draws * s.batch / len(w))
        order = torch.cat([noise.permutation(len(w), self.seed, number * passes + p) for p in range(passes)])

        def make(k: int) -> Batch:
            return self._couple(rollout, w, alpha, order[k * s.batch : (k + 1) * s.batch], number, k)

        if s.reference_passes == 1:
            yield from map(make, range(skip, s.draws))
            return
        kept: dict[int, Batch] = {}
        for k in self._turns(number)[skip : s.steps_per_round]:
            if k not in kept:
                batch = make(k)
                kept[k] = replace(batch, v_ref=self.learner.anchor(batch))
            yield kept[k]

    def _couple(self, rollout: Rollout, w: Tensor, alpha: float, pick: Tensor, number: int, k: int) -> Batch:
        """The samples `pick` [B] as minibatch k of the round."""
        s, learner = self.settings, self.learner
        with learner.phases("policy"):
            first = (number * s.draws + k) * s.batch
            index = noise.indices(first, s.batch, learner.policy.device)
            batch = couple(rollout.x1[pick], w[pick], alpha, self.seed, index, s.coupling)
            if rollout.condition is not None:
                batch = replace(batch, condition=rollout.condition[pick])
            return batch.part(learner.ranks.share(s.batch))

    def _turns(self, number: int) -> list[int]:
        """The minibatches' numbers in the order in which a round's passes take them."""
        s = self.settings
        seed = noise.seed_on(s.seed, "cpu")  # the order is the host's to know
        turns = [
            noise.permutation(s.draws, seed, number * s.reference_passes + p, noise.REUSE).tolist()
            for p in range(s.reference_passes)
        ]
        return [k for turn in turns for k in turn]
