"""A policy as passes without gradient compute it: its weights lie in the type that autocast casts them to in each pass.

Autocast casts the weights of linear and convolutional layers, 137 tensors of the CIFAR-10 U-Net, in every pass. A
network that holds them so already computes the same velocities, bit for bit, without the casts.
"""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from orwcfm_fast.networks.policy import Policy


def can_hold(policy: "Policy") -> bool:
    """Whether a network with its weights held so computes what the policy's own does.

    In float32 nothing is cast. Other code than ours (a pipeline's, a plugin's) may ask for the type of a weight, or
    leave autocast, and DoRA takes the norms of its base in float32.
    """
    ours = getattr(policy.network, "leaves_casts_to_autocast", False)
    dora = any(".lora_magnitude_vector" in name for name, _ in policy.network.named_parameters())
    return policy.precision != torch.float32 and ours and not dora


def hold(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Hold the weights that autocast casts in `dtype`, in place; those of the norms stay in float32."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.to(dtype)
    return network.requires_grad_(False)


class InferenceCopy:
    """A policy for passes without gradient, whose weights are those at the last `refresh`.

    Args:
        policy: that is trained; its tensors stay the same, as an optimiser requires.
        off: use the policy itself, as where its weights cannot be held so.
    """

    def __init__(self, policy: "Policy", off: bool = False) -> None:
        self.policy = policy
        self.weights: list[Tensor] = []
        self.trained: list[Tensor] = []
        if off or not can_hold(policy):
            return
        network = hold(copy.deepcopy(policy.network), policy.precision)
        self.policy = replace(policy, network=network)
        for own, weight in zip(network.parameters(), policy.network.parameters(), strict=True):
            if weight.requires_grad:
                self.weights.append(own)
                self.trained.append(weight)

    @torch.no_grad()
    def refresh(self) -> "Policy":
        """The policy, with the trained weights as they are now."""
        if self.weights:
            torch._foreach_copy_(self.weights, self.trained)
        return self.policy
