"""One gradient step of the objective, and the optimiser around it."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.kernels.anchored_residual import anchored_residual
from orwcfm_fast.method import noise
from orwcfm_fast.method.anchors import blend
from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.method.exchange import LocalGradient, ReplicatedGradient, ShardedGradient
from orwcfm_fast.method.graph import GraphChoices, StepGraph, can_record
from orwcfm_fast.method.objectives import METHODS, Point
from orwcfm_fast.networks.lora import trained_parameters
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Finetune
from orwcfm_fast.sharding import ShardedNetworks, whole
from orwcfm_fast.timing import Phases

REHEARSALS = 2  # before the first step the optimiser holds nothing


def rate(settings: Finetune, step: int) -> float:
    """Learning rate of a step as a share of `lr`: linear warm-up, and a linear fall within each round.

    A rollout sees only the policy at a round's end, so that is where the steps' noise must be small.
    """
    up = (step + 1) / max(settings.warmup, 1)
    left = settings.steps_per_round - step % settings.steps_per_round
    down = left / max(settings.cooldown * settings.steps_per_round, 1)
    return min(1.0, up, down)


class PolicyOptimizer:
    """Takes the gradient steps of a policy's network.

    Args:
        policy: its network's parameters are trained, in eval mode: dropout would be taken for drift.
        settings: learning rate, warm-up, gradient clipping.
        sizes: how many samples of a minibatch are processed at once (`micro_batch`).
        ranks: the processes that share each minibatch.
        sharded: the policy's network in shards, where no process holds the whole.
    """

    def __init__(
        self,
        policy: Policy,
        settings: Finetune,
        sizes: BatchSizes | None = None,
        ranks: ProcessGroup = SINGLE_PROCESS,
        sharded: ShardedNetworks | None = None,
    ) -> None:
        self.policy, self.settings, self.grad_clip = policy, settings, settings.grad_clip
        self.sizes, self.ranks = sizes or BatchSizes.of(settings), ranks
        policy.network.eval()
        self.parameters = trained_parameters(policy.network)
        self.local = LocalGradient(policy.network)
        self.exchange: LocalGradient | None = None  # DDP's is made at the first step
        if sharded:
            self.exchange = ShardedGradient(policy.network, sharded, ranks, accumulates=settings.lora > 0)
        self.rehearsals = REHEARSALS
        self.phases = Phases(policy.device)
        self.graph: StepGraph | None = None
        if can_record(settings, policy, ranks):
            self.graph = StepGraph(GraphChoices(told=settings.graph == "on"), self.phases)
        self.warm = (
            0  # the largest micro-batch of the last step with this optimiser state; 0 before the first
        )
        lr = torch.full((), settings.lr, device=policy.device) if self.graph else settings.lr
        self.optimizer = AdamW(
            self.parameters, lr, weight_decay=0.0, fused=True, capturable=self.graph is not None
        )
        self.schedule = LambdaLR(self.optimizer, lambda step: rate(settings, step))

    def go_on_from(self, step: int) -> None:
        """Set the schedule to where it stands before that step; the optimiser's state may be another."""
        self.warm, self.rehearsals = 0, REHEARSALS
        if self.graph:
            self.graph.forget()
        self.schedule.last_epoch = step
        for group, base, share in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            if isinstance(group["lr"], Tensor):  # a graph reads it where it is
                group["lr"].fill_(base * share(step))
            else:
                group["lr"] = base * share(step)

    def step(self, batch: Batch, seed: Tensor) -> Tensor:
        """One step on a batch, or on this process's part of it; (mean fm, mean w2, gradient norm) [3], float32."""
        n = -(-batch.size // self.ranks.world)  # of the largest share; others may be empty

        def take(size: int) -> Tensor:
            # a first step, and one of a new size, compiles kernels and makes the optimiser's state
            if self.graph and self.warm == self.sizes.micro_batch:
                return self.graph(batch, seed, lambda b, s: self.update(self.gradient(b, s, size)), size)
            return self.gradient(batch, seed, size, self.exchange)

        if self.ranks.world > 1 and self.rehearsals and not self.settings.shard:
            self.rehearse(batch, seed, n)
        found = self.sizes.fit("micro_batch", take, n)
        if len(found) == 2:  # losses alone: the gradient is there, the update is not
            found = self.update(found)
        self.warm = self.sizes.micro_batch
        self.schedule.step()
        return found

    def rehearse(self, batch: Batch, seed: Tensor, n: int) -> None:
        """The gradient of this process alone, for nothing but to find a micro-batch that fits into its memory.

        In an exchange a process that ran out of memory could not begin again without the others.
        """
        if self.exchange is None:
            self.exchange = self.connect(batch.filler(), seed)
        with self.ranks.together():
            self.sizes.fit("micro_batch", lambda size: self.gradient(batch, seed, size), n)
        self.rehearsals -= 1

    def connect(self, row: Batch, seed: Tensor) -> LocalGradient:
        """The exchange of gradients; `row` shows it which parameters have some, and in which order they arrive.

        After its first pass DDP lays its buckets out anew. That pass is thrown away, so that a resumed run, which
        begins with it too, adds up in the same order as one that was not interrupted.
        """
        with self.ranks.together():
            self.sizes.fit("micro_batch", lambda size: self.gradient(row, seed, size), 1)
        skipped = self.ranks.all(any(p.grad is None for p in self.parameters))
        exchange = ReplicatedGradient(self.policy.network, may_skip=any(skipped))
        self.gradient(row, seed, 1, exchange)
        return exchange

    def update(self, losses: Tensor) -> Tensor:
        """Clip the gradient, step the optimiser; the losses, of all processes, and the gradient's norm [3]."""
        with self.phases("optimizer"):
            losses = self.ranks.total(losses)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = whole(nn.utils.get_total_norm(gradients, foreach=True))
            nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm, foreach=True)
            found = torch.cat([losses, norm.float().view(1)])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return found

    def gradient(
        self, batch: Batch, seed: Tensor, micro_batch: int, exchange: LocalGradient | None = None
    ) -> Tensor:
        """Accumulate the batch's gradient, `micro_batch` samples at a time; (mean fm, mean distance to the anchor) [2].

        By hand, in the op's one pass: with the weights and the anchor of each draw,
        2/D · [w·(v − u) + (a + b)·(v − anchor)]. 1/B is the whole batch's, so that parts add up to it, those of
        several processes too, which `exchange` adds up.
        """
        size, exchange = batch.size, exchange or self.local
        policy = replace(self.policy, network=exchange.network)
        self.optimizer.zero_grad(set_to_none=True)  # of a try that ran out of memory
        fm, w2 = [batch.w.new_zeros(0)], [batch.w.new_zeros(0)]
        parts = exchange.parts(batch, micro_batch)
        for k, part in enumerate(parts, 1):
            last = k == len(parts)
            with self.phases("policy"), exchange.accumulating(last):
                v = policy.velocity(part.t, part.x_t, part.condition)
                part = self.weigh(part, v.detach(), seed)
                anchor = v.detach() if part.anchor is None else part.anchor
                _, *means, dv = anchored_residual(
                    v.detach(), anchor, part.x1, seed, part.index, part.w / size, part.anchor_weight / size
                )
                exchange.backward(v, dv, last)
            fm.append(means[0])
            w2.append(means[1])
        own = slice(sum(map(len, fm)) - len(batch.w), None)  # without the rows that fill up
        return torch.stack([torch.cat(fm)[own].sum(), torch.cat(w2)[own].sum()]) / size

    def weigh(self, batch: Batch, v: Tensor, seed: Tensor) -> Batch:
        """The batch with weights and anchor, where these follow the policy's velocity v [B, *shape]."""
        if batch.v_old is None:
            return batch
        row, s = METHODS.get(self.settings.method), self.settings
        u = batch.x1 - noise.normal(tuple(v.shape[1:]), seed, batch.index, noise.X0)
        v_old, step = batch.v_old.float(), v.float() - batch.v_old.float()
        errors = [(v_old + sign * s.nft_beta * step - u).abs().flatten(1).mean(1) for sign in (1, -1)]
        own_loss = (v.float() - u).square().flatten(1).mean(1)
        mean = batch.w.mean()
        at = Point(batch.w, mean, mean, 1 - batch.t, s.alpha, s, own_loss, (errors[0], errors[1]))
        w, b, a = row.coefficients(at)
        return replace(batch, w=w, b=b, a=a, anchor=blend(batch.v_old, batch.v_ref, b, a))

    def reset(self) -> None:
        """As before the first step, but for the weights."""
        self.optimizer.state.clear()
        self.go_on_from(0)
