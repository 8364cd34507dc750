"""Which samples of a rollout make up each minibatch of a round, with what noise and with what weights."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from orwcfm_fast.distributed import ProcessGroup
from orwcfm_fast.method import noise
from orwcfm_fast.method.coupling import Batch, couple, weighted_plan_draw
from orwcfm_fast.method.objectives import Method, Point
from orwcfm_fast.method.plans import PlannedPairs
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.method.weighting import centre, mean_weight_at
from orwcfm_fast.settings import Finetune


class Minibatches:
    """The coupled minibatches of a round, this process's part of each; a sequence of `steps_per_round` batches.

    The draws (sample, t, noise) run over the rollout again and again, each time in a new order.

    Args:
        signal: what the reward says of each sample, [N].
        alpha: α in force.
        number: of the round.
        row: the method, whose weights the batches carry where they do not follow the policy's velocity.
        seed: of the run, 0-d, on the samples' device.
        grown: before the round, as in `weighting.centre`; the attribute is that after it.
    """

    def __init__(
        self,
        rollout: Rollout,
        signal: Tensor,
        alpha: float,
        number: int,
        row: Method,
        settings: Finetune,
        seed: Tensor,
        ranks: ProcessGroup,
        grown: Tensor,
    ) -> None:
        self.rollout, self.signal, self.alpha, self.number = rollout, signal, alpha, number
        self.row, self.settings, self.seed, self.ranks = row, settings, seed, ranks
        self.mean = signal.mean()
        self.centre, self.grown = self.mean, grown
        if row.centred:
            self.centre, self.grown = centre(signal, self.mean, alpha, grown)
        n = len(signal)
        passes = math.ceil(settings.steps_per_round * settings.batch / n)
        self.order = torch.cat([noise.permutation(n, seed, number * passes + p) for p in range(passes)])
        self.pairs = self.planned() if settings.coupling == "ot" else None

    def planned(self) -> PlannedPairs:
        """The pairs of each minibatch under the optimal plan."""
        x1, signal, seed, order = (x.cpu() for x in (self.rollout.x1, self.signal, self.seed, self.order))
        size, first = self.settings.batch, self.number * len(self) * self.settings.batch

        def solve(k: int) -> Tensor:
            pick = order[k * size : (k + 1) * size]
            index = noise.indices(first + k * size, size, "cpu")
            return weighted_plan_draw(x1[pick], signal[pick], seed, index)

        return PlannedPairs(solve, len(self))

    def __len__(self) -> int:
        return self.settings.steps_per_round

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, k: int) -> Batch:
        """The minibatch of step k."""
        if not 0 <= k < len(self):
            raise IndexError(k)
        s, rollout = self.settings, self.rollout
        pick = self.order[k * s.batch : (k + 1) * s.batch]
        index = noise.indices((self.number * len(self) + k) * s.batch, s.batch, self.seed.device)
        late = self.row.late if s.times == "own" else s.times == "late"
        pairs = [self.pairs[k].to(pick.device)] if self.pairs else []
        batch = couple(
            rollout.x1[pick], self.signal[pick], self.alpha, self.seed, index, s.coupling, late, *pairs
        )
        if rollout.condition is not None:
            batch = replace(batch, condition=rollout.condition[pick])
        if s.coupling == "independent" and not self.row.reads_velocity:
            w, b, a = self.row.coefficients(self.point(batch, pick))
            batch = replace(batch, w=w, b=b, a=a)
        return batch.part(self.ranks.share(s.batch))

    def point(self, batch: Batch, pick: Tensor) -> Point:
        """What the method may know of a batch whose w is still the signal; pick [B]: the rows of its samples."""
        found, of = self.centre, self.rollout
        if self.row.centred and self.alpha == 0:
            weight_at = mean_weight_at(batch.x_t, batch.t, of.x1, self.signal, pick, of.condition)
            found = torch.minimum(self.mean, weight_at)
        return Point(batch.w, self.mean, found, 1 - batch.t, self.alpha, self.settings)
