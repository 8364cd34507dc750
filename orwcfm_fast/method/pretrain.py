"""Pretraining: plain conditional flow matching on data, with a weight average."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from orwcfm_fast.kernels.interpolate import interpolate_at_random_times
from orwcfm_fast.method import noise
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Pretrain

REPORT_EVERY = 25


class Pretrainer:
    """Regresses v(t, x_t) on x1 − x0 over a dataset (Lipman et al., ICLR 2023; independent coupling).

    Args:
        policy: with fresh weights.
        data: samples [N, *shape] on the policy's device.
        settings: all of `orwcfm pretrain`.
    """

    def __init__(self, policy: Policy, data: Tensor, settings: Pretrain) -> None:
        self.policy, self.data, self.settings = policy, data, settings
        self.ema = copy.deepcopy(policy.network).requires_grad_(False).eval()
        self.averages: list[Tensor] = [*self.ema.parameters()]
        policy.network.train()
        self.parameters = [*policy.network.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, settings.lr, weight_decay=0.0, fused=True)
        self.seed = noise.seed_on(settings.seed, policy.device)
        self.steps = 0
        self.pause: Callable[[], None] = lambda: None  # called after each step; may raise
        self.losses: list[Tensor] = []  # since the last report

    def train(self) -> Iterator[tuple[int, float]]:
        """Run to `settings.steps`; yields (step, mean loss since) every 25 steps and at the end."""
        while self.steps < self.settings.steps:
            self.losses.append(self.step())
            if self.steps % REPORT_EVERY == 0 or self.steps == self.settings.steps:
                loss, self.losses = float(torch.stack(self.losses).mean()), []
                yield self.steps, loss
            self.pause()

    def rate(self) -> float:
        """Learning rate of the coming step: linear warm-up, constant, linear cooldown to zero."""
        s = self.settings
        up = (self.steps + 1) / max(s.warmup, 1)
        down = (s.steps - self.steps) / max(s.cooldown * s.steps, 1)
        return s.lr * min(1.0, up, down)

    def step(self) -> Tensor:
        """One gradient step and the update of the average; the loss, 0-d on the device."""
        s, device = self.settings, self.policy.device
        index = noise.indices(self.steps * s.batch, s.batch, device)
        x1 = self.data[noise.choice(len(self.data), self.seed, index, noise.PRETRAIN_CHOICE)]
        if s.flip:
            mirror = noise.choice(2, self.seed, index, noise.FLIP).bool()
            x1 = torch.where(mirror.view(-1, 1, 1, 1), x1.flip(-1), x1)
        x_t, t = interpolate_at_random_times(x1, self.seed, index)
        x0 = noise.normal(self.policy.shape, self.seed, index, noise.X0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((s.seed * 1_000_003 + self.steps) % 2**63)  # dropout
            v = self.policy.velocity(t, x_t)
        loss = (v.float() - (x1 - x0)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, s.grad_clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # the average forgets the first steps' weights faster than its final decay
        decay = min(s.ema, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.averages, self.parameters, self.steps)
        self.steps += 1
        return loss.detach()

    def averaged(self) -> Policy:
        """The policy with the averaged weights: the result."""
        return replace(self.policy, network=self.ema)


def pretrain(
    policy: Policy, data: Tensor, settings: Pretrain, watch: Callable[[int, float], None]
) -> Pretrainer:
    """Train to the end, telling `watch` step and loss; the trainer with its weights."""
    trainer = Pretrainer(policy, data, settings)
    for step, loss in trainer.train():
        watch(step, loss)
    return trainer
