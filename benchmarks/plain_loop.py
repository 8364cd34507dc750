"""The baseline: the online loop as the paper's published script runs it, made to learn.

Float32 eager on torchcfm's own UNet; for every gradient step a fresh batch of 64 by 99 Euler evaluations of the
behaviour policy; Adam 2e-4 without warm-up; reference and policy one after the other; the behaviour policy is
copied once an epoch. Unlike the script: the independent coupling and eval mode, without which it learns nothing.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH, EULER_STEPS, LEARNING_RATE = 64, 99, 2e-4


def torchcfm_network(model: str, weights: dict[str, Tensor]) -> nn.Module:
    """torchcfm's UNet of one of our presets with those weights, in eval mode."""
    from torchcfm.models.unet.unet import UNetModelWrapper

    arguments = {
        "unet-digits": {
            "dim": (1, 8, 8), "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2),
            "attention_resolutions": "4",
        },
        "unet-cifar10": {
            "dim": (3, 32, 32), "num_channels": 128, "num_res_blocks": 2, "channel_mult": [1, 2, 2, 2],
            "num_heads": 4, "num_head_channels": 64, "attention_resolutions": "16", "dropout": 0.1,
        },
    }[model]  # fmt: skip
    network = UNetModelWrapper(**arguments)
    network.load_state_dict(weights)
    return network.eval()


@dataclass
class PlainLoop:
    """State of the plain loop; `step` is one iteration of its inner loop, `end_epoch` its hard copy.

    Args:
        network: v(t, x), trained in place; reward: samples [B, …] in [-1, 1] → [B].
        shape: of one sample; alpha, tau: of the objective; weights are raw exp(τ·r).
    """

    network: nn.Module
    reward: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    alpha: float
    tau: float
    batch: int = BATCH
    euler_steps: int = EULER_STEPS
    lr: float = LEARNING_RATE

    def __post_init__(self) -> None:
        self.reference = copy.deepcopy(self.network).requires_grad_(False)
        self.behaviour = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.lr)

    def rollout(self) -> Tensor:
        """A fresh batch from the behaviour policy."""
        device = next(self.network.parameters()).device
        x = torch.randn(self.batch, *self.shape, device=device)
        with torch.no_grad():
            for k in range(self.euler_steps):
                t = torch.full((self.batch,), k / self.euler_steps, device=device)
                x = x + self.behaviour(t, x) / self.euler_steps
        return x

    def gradient_step(self, x1: Tensor) -> float:
        """One optimiser step on samples x1 [B, *shape]; the mean reward."""
        with torch.no_grad():
            reward = self.reward(x1.clamp(-1, 1))
        w = (self.tau * reward).exp()
        t = torch.rand(len(x1), device=x1.device)
        x0, s = torch.randn_like(x1), t.view(-1, *[1] * len(self.shape))
        x_t = (1 - s) * x0 + s * x1
        v = self.network(t, x_t)
        with torch.no_grad():
            v_ref = self.reference(t, x_t)
        flow = (v - (x1 - x0)).square().flatten(1).mean(1)
        drift = (v - v_ref).square().flatten(1).mean(1)
        loss = (w * flow + self.alpha * drift).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return float(reward.mean())

    def step(self) -> float:
        return self.gradient_step(self.rollout())

    def end_epoch(self) -> None:
        self.behaviour.load_state_dict(self.network.state_dict())
