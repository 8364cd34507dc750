"""A rollout: samples of the current policy and what the reward says of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from orwcfm_fast import noise
from orwcfm_fast.errors import RewardError
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.samplers import solve
from orwcfm_fast.settings import Sampling

Reward = Callable[[Tensor], Tensor]


@dataclass
class Rollout:
    """Samples x1 [N, *shape] of global numbers index [N]; reward [N] once scored."""

    x1: Tensor
    index: Tensor
    reward: Tensor


def sample(
    policy: Policy, x0: Tensor, how: Sampling, chunk: int, pause: Callable[[], None] = lambda: None
) -> Tensor:
    """Samples [N, *shape] of the policy from noise x0, `chunk` at a time, float32; `pause` after each chunk."""
    parts = []
    with torch.inference_mode():
        for part in x0.split(chunk):
            parts.append(solve(policy.velocity, part, how.solver, how.nfe, how.grid).float())
            pause()
        return torch.cat(parts)


def start_noise(policy: Policy, n: int, seed: int, purpose: int = noise.SAMPLE, first: int = 0) -> Tensor:
    """Noise x0 [n, *shape] of draws first … first+n−1."""
    index = noise.indices(first, n, policy.device)
    return noise.normal(policy.shape, torch.tensor(seed, device=policy.device), index, purpose)


def draw(
    policy: Policy,
    n: int,
    round: int,
    seed: int,
    how: Sampling,
    chunk: int,
    pause: Callable[[], None] = lambda: None,
    part: slice | None = None,
) -> Rollout:
    """The rollout of a round: n fresh samples of the policy, or a part of them, not yet scored."""
    part = part or slice(0, n)
    first, n = round * n + part.start, part.stop - part.start
    x0 = start_noise(policy, n, seed, noise.ROLLOUT, first)
    x1 = sample(policy, x0, how, chunk, pause).clone()  # out of inference mode
    return Rollout(x1, noise.indices(first, n, policy.device), torch.empty(0))


def score(reward: Reward, samples: Tensor, name: str, where: str = "", seed: int = 0) -> Tensor:
    """Rewards [N] of decoded samples, float32 on their device.

    A reward that draws random numbers of torch draws those of `seed`: a resumed run asks it as the first did.

    Raises:
        RewardError: the reward raised, or returned another shape or values that are not finite.
    """
    at = f"reward {name}{', ' + where if where else ''}"
    try:
        devices = [samples.device] if samples.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed % 2**63)
            values = torch.as_tensor(reward(samples))
    except RewardError as error:  # one that says what happened itself, e.g. a worker process that died
        raise RewardError(f"{at}: {error}") from error
    except Exception as error:
        text = str(error).split("\n")[0]
        raise RewardError(f"{at}: {type(error).__name__}: {text}") from error
    if values.shape != (len(samples),):
        raise RewardError(
            f"{at}: returned shape {tuple(values.shape)}, should be ({len(samples)},): one a sample"
        )
    if values.is_complex():
        raise RewardError(f"{at}: returned complex numbers")
    bad = int((~values.isfinite()).sum())
    if bad:
        kind = "NaN" if bool(values.isnan().any()) else "not finite"
        raise RewardError(f"{at}: {bad} of {len(samples)} values are {kind}")
    return values.to(samples.device, torch.float32)
