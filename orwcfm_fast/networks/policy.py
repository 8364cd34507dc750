"""A policy: a velocity network with what is needed to sample from it and to show its samples to a reward."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from orwcfm_fast.device import resolve_precision
from orwcfm_fast.networks import lora
from orwcfm_fast.networks.models import build_network


@dataclass(frozen=True)
class Policy:
    """dx/dt = velocity(t, x, condition) carries noise N(0, I) at t=0 to samples at t=1.

    Attributes:
        network: v(t [B], x [B, *shape][, condition]); always in eval mode here.
        shape: of one sample.
        model, data: names of the preset and of the data it was trained on.
        precision: float32, or bfloat16 by autocast.
        base_only: with the network's low-rank adapters off: the reference that shares a policy's weights.
    """

    network: nn.Module
    shape: tuple[int, ...]
    model: str
    data: str
    precision: torch.dtype = torch.float32
    base_only: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def velocity(self, t: Tensor | float, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Velocity at (t, x) in float32 or the autocast dtype; t [B] or one number for the whole batch."""
        if not isinstance(t, Tensor):
            t = torch.full((1,), t, device=x.device, dtype=torch.float32).expand(x.shape[0])
        adapters = lora.base_only(self.network) if self.base_only else nullcontext()
        with adapters, self.autocast():
            return self.network(t, x) if condition is None else self.network(t, x, condition)

    def autocast(self) -> torch.autocast:
        """The context in which the network runs at its precision."""
        on = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision if on else torch.bfloat16, enabled=on)

    def decode(self, x1: Tensor) -> Tensor:
        """What the reward sees: images in [-1, 1], vectors as they are."""
        return x1.clamp(-1, 1) if len(self.shape) == 3 else x1

    def frozen_copy(self) -> "Policy":
        """The reference: this policy with weights that never train, its own or those under its adapters."""
        if lora.adapters_of(self.network):
            return replace(self, base_only=True)
        return replace(self, network=copy.deepcopy(self.network).requires_grad_(False).eval())

    def trainable_copy(self) -> "Policy":
        """The same policy with weights of its own, to be trained."""
        return replace(self, network=copy.deepcopy(self.network))

    def weights(self) -> dict[str, Tensor]:
        """State dict of a network without adapters that has this velocity."""
        return lora.plain_state(self.network, merged=not self.base_only)


def make_policy(
    model: str,
    data: str,
    shape: tuple[int, ...],
    device: torch.device,
    precision: str = "auto",
    seed: int = 0,
) -> Policy:
    """A policy with fresh weights drawn from `seed`, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build_network(model, shape).to(device).eval()
    parameters = sum(p.numel() for p in network.parameters())
    return Policy(network, tuple(shape), model, data, resolve_precision(precision, device, parameters))
