"""Policy and reference at the same points, in one batched call instead of two.

With low-rank adapters on a shared base: one pass over the points twice, adapters on the first half alone. With
weights of their own: both networks' weights stacked, each product one of a batch of two. Autograd then runs backward
through the reference's half too, on zeros: 4/3 of the separate calls' arithmetic with adapters (2 + 2 forwards' worth
against 2 + 1), 6/4 with all weights trained (2 + 4 against 2 + 2). It pays only where a call costs more than its
arithmetic; see the README.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from orwcfm_fast.errors import UserError
from orwcfm_fast.networks import lora
from orwcfm_fast.networks.policy import Policy


def check_pairs(policy: Policy, reference: Policy) -> None:
    """Raises UserError for a network whose weights cannot be stacked, convolutions in a batch of two, or a pipeline."""
    if policy.pipeline:
        raise UserError("--pair: a pipeline's calls cost no more than their arithmetic; leave --pair out")
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in policy.network.modules())
    if convolves and not reference.base_only:
        raise UserError("--pair: a network with convolutions needs --lora as well; or leave --pair out")


def paired_velocities(policy: Policy, reference: Policy, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Velocities [B, *shape] of policy, with gradient, and of its reference, without, at t [B], x [B, *shape]."""
    if reference.base_only:
        with lora.first_half(policy.network, len(x)):
            v, v_ref = policy.velocity(torch.cat([t, t]), torch.cat([x, x])).chunk(2)
        return v, v_ref.detach()
    own, frozen = (dict(p.network.named_parameters()) for p in (policy, reference))
    stacked = {key: torch.stack([own[key], frozen[key].detach()]) for key in own}
    with policy.autocast():
        v, v_ref = torch.vmap(lambda weights: functional_call(policy.network, weights, (t, x)))(stacked)
    return v, v_ref.detach()
