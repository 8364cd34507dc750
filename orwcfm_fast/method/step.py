"""One gradient step of the objective, and the optimiser around it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from orwcfm_fast.control.memory import halving
from orwcfm_fast.distributed import SINGLE_PROCESS, ProcessGroup
from orwcfm_fast.errors import UserError
from orwcfm_fast.kernels.anchored_residual import anchored_residual
from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.method.graph import StepGraph
from orwcfm_fast.networks.lora import trained_parameters
from orwcfm_fast.networks.paired import check_pairs, paired_velocities
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Finetune
from orwcfm_fast.timing import Phases


def rate(settings: Finetune, step: int) -> float:
    """Learning rate of a step as a share of `lr`: linear warm-up, and a linear fall within each round.

    A rollout sees only the policy at a round's end, so that is where the steps' noise must be small.
    """
    up = (step + 1) / max(settings.warmup, 1)
    left = settings.steps_per_round - step % settings.steps_per_round
    down = left / max(settings.cooldown * settings.steps_per_round, 1)
    return min(1.0, up, down)


class PolicyOptimizer:
    """Trains a policy's network against an anchor.

    Args:
        policy: its network's parameters are trained, in eval mode: dropout would be taken for drift.
        reference: the anchor, frozen.
        settings: learning rate, warm-up, gradient clipping, micro-batch.
        ranks: those that each minibatch is spread over.

    Attributes:
        micro_batch: samples at once; halved, and `on_halved` told, where memory runs out.
    """

    def __init__(
        self, policy: Policy, reference: Policy, settings: Finetune, ranks: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.policy, self.reference, self.grad_clip = policy, reference, settings.grad_clip
        self.ranks = ranks
        self.pair = settings.pair
        if self.pair:
            check_pairs(policy, reference)
        policy.network.eval()
        self.parameters = trained_parameters(policy.network)
        self.micro_batch = min(settings.micro_batch or settings.batch, settings.batch)
        self.on_halved: Callable[[int], None] = lambda size: None
        self.graph = StepGraph() if settings.graph else None
        if self.graph and (policy.device.type != "cuda" or ranks.world > 1):
            raise UserError("--graph: needs an NVIDIA GPU, and no more than one; leave it out (--no-graph)")
        if self.graph and policy.pipeline:
            raise UserError("--graph: is not for pipelines; leave it out (--no-graph)")
        self.ran = False  # a step, with the optimiser and the micro-batch as they are
        lr = torch.full((), settings.lr, device=policy.device) if self.graph else settings.lr
        self.optimizer = AdamW(
            self.parameters, lr, weight_decay=0.0, fused=True, capturable=self.graph is not None
        )
        self.schedule = LambdaLR(self.optimizer, lambda step: rate(settings, step))
        self.phases = Phases(policy.device)

    def go_on_from(self, step: int) -> None:
        """Set the schedule to where it stands before that step; the optimiser's state may be another."""
        self.ran = False
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

    def anchor(self, batch: Batch) -> Tensor:
        """The reference's velocity at the batch's points, [B, *shape]."""

        def parts(size: int) -> Tensor:
            parts = [self.reference.velocity(p.t, p.x_t, p.condition) for p in batch.split(size)]
            return torch.cat(parts) if parts else batch.x_t  # a rank's share may be none

        with self.phases("reference"), torch.no_grad():
            return halving(parts, self.at_once(batch), "micro-batch", self.set_micro_batch)

    def step(self, batch: Batch, seed: Tensor) -> Tensor:
        """One step on a batch, or on this rank's part of it; (mean fm, mean w2, gradient norm) [3], float32."""

        def replayed(size: int) -> Tensor | None:
            # a first step, of a new size too, compiles kernels and makes the optimiser's state
            if not (self.graph and self.ran):
                return None
            with self.phases("policy"):
                return self.graph(batch, seed, lambda b, s: self.update(self.gradient(b, s, size)), size)

        found = halving(replayed, self.at_once(batch), "micro-batch", self.set_micro_batch)
        if found is None:
            size = self.at_once(batch)
            losses = halving(
                lambda size: self.gradient(batch, seed, size), size, "micro-batch", self.set_micro_batch
            )
            with self.phases("optimizer"):
                self.add_up(losses)
                found = self.update(losses)
        self.ran = True
        self.schedule.step()
        return found

    def update(self, losses: Tensor) -> Tensor:
        """Clip the gradient, step the optimiser; the losses and the gradient's norm [3]."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.cat([losses, norm.float().view(1)])

    def gradient(self, batch: Batch, seed: Tensor, micro_batch: int) -> Tensor:
        """Accumulate the batch's gradient, `micro_batch` samples at a time; (mean fm, mean w2) [2].

        Gradient of L = 1/B Σ [w_i·1/D‖v − u‖² + a_i·1/D‖v − v_ref‖²], by hand, in the op's one pass; 1/B is
        the whole batch's, so that parts add up to it, those of several ranks too.
        """
        size = batch.size
        self.optimizer.zero_grad(set_to_none=True)  # of a try that ran out of memory
        fm, w2 = [batch.w.new_zeros(0)], [batch.w.new_zeros(0)]
        for part in batch.split(micro_batch):
            v_ref = part.v_ref
            if v_ref is None and not self.pair:
                with self.phases("reference"), torch.no_grad():
                    v_ref = self.reference.velocity(part.t, part.x_t, part.condition)
            with self.phases("policy"):
                if v_ref is None:
                    v, v_ref = paired_velocities(self.policy, self.reference, part.t, part.x_t)
                else:
                    v = self.policy.velocity(part.t, part.x_t, part.condition)
                _, *means, dv = anchored_residual(
                    v.detach(), v_ref, part.x1, seed, part.index, part.w / size, part.a / size
                )
                v.backward(dv)
            fm.append(means[0])
            w2.append(means[1])
        return torch.stack([torch.cat(fm).sum(), torch.cat(w2).sum()]) / size

    def add_up(self, losses: Tensor) -> None:
        """Gradients and losses of this rank's part become those of the whole minibatch, in one exchange.

        Not DistributedDataParallel: it takes a mean over ranks, which uneven parts make wrong, and waits for ever
        for a rank whose part is empty.
        """
        if self.ranks.world == 1:
            return
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.ranks.add_up([*(p.grad for p in self.parameters if p.grad is not None), losses])

    def at_once(self, batch: Batch) -> int:
        """Samples at once of what may be a rank's part of a minibatch."""
        return max(1, min(self.micro_batch, len(batch.w)))

    def set_micro_batch(self, size: int) -> None:
        self.micro_batch, self.ran = size, False
        self.on_halved(size)

    def start_over(self) -> None:
        """As before the first step, but for the weights."""
        self.optimizer.state.clear()
        self.go_on_from(0)
