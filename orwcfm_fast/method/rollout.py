"""A rollout: samples that the current policy draws."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from orwcfm_fast.method import noise
from orwcfm_fast.method.samplers import Velocity, solve
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Sampling


@dataclass
class Rollout:
    """Samples x1 [N, *shape] of global numbers index [N], of conditions [N] where there are some; reward [N] once
    scored."""

    x1: Tensor
    index: Tensor
    reward: Tensor
    condition: Tensor | None = None


def sample(
    policy: Policy,
    x0: Tensor,
    how: Sampling,
    chunk: int,
    each: Callable[[Tensor], None] = lambda x1: None,
    condition: Tensor | None = None,
) -> Tensor:
    """Samples [N, *shape] of the policy from noise x0, `chunk` at a time, float32.

    Args:
        each: called with every chunk of samples once it is drawn.
        condition: rows [N] of the policy's prompts; those of the first N draws where None.
    """
    parts = []
    with torch.inference_mode():
        for part, velocity in in_parts(policy, x0, how, chunk, condition):
            parts.append(solve(velocity, part, how.solver, how.nfe, policy.grid(how.grid)).float())
            each(parts[-1])
        return torch.cat(parts)


def in_parts(
    policy: Policy, x0: Tensor, how: Sampling, chunk: int, condition: Tensor | None = None
) -> Iterator[tuple[Tensor, Velocity]]:
    """Noise x0 [N, *shape], `chunk` at a time, each with the policy's velocity under its part's conditions."""
    if condition is None:
        condition = start_conditions(policy, len(x0), how)
    parts = x0.split(chunk)
    conditions = [None] * len(parts) if condition is None else condition.split(chunk)
    for part, c in zip(parts, conditions, strict=True):
        yield part, partial(policy.velocity, condition=c)


def start_noise(policy: Policy, n: int, seed: int, purpose: int = noise.SAMPLE, first: int = 0) -> Tensor:
    """Noise x0 [n, *shape] of draws first … first+n−1."""
    index = noise.indices(first, n, policy.device)
    return noise.normal(policy.shape, noise.seed_on(seed, policy.device), index, purpose)


def start_conditions(policy: Policy, n: int, how: Sampling, first: int = 0) -> Tensor | None:
    """Rows [n] of the policy's prompts for draws first … first+n−1; None where it has none.

    `how.group` draws in a row share a prompt.
    """
    if policy.conditions is None:
        return None
    index = noise.indices(first, n, policy.device) // how.group
    u = noise.uniform((1,), noise.seed_on(how.seed, policy.device), index, noise.PROMPT)[:, 0]
    return policy.conditions.at(u)


def draw(
    policy: Policy,
    n: int,
    round: int,
    seed: int,
    how: Sampling,
    chunk: int,
    each: Callable[[Tensor], None] = lambda x1: None,
    part: slice | None = None,
) -> Rollout:
    """The rollout of a round: n fresh samples of the policy, or a part of them, not yet scored.

    Args:
        each: called with every chunk of samples once it is drawn.
    """
    part = part or slice(0, n)
    first, n = round * n + part.start, part.stop - part.start
    x0 = start_noise(policy, n, seed, noise.ROLLOUT, first)
    condition = start_conditions(policy, n, how, first)
    x1 = sample(policy, x0, how, chunk, each, condition).clone()  # out of inference mode
    return Rollout(x1, noise.indices(first, n, policy.device), torch.empty(0), condition)
