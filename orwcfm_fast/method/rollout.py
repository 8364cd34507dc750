"""A rollout: samples of the current policy and what the reward says of them."""

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from orwcfm_fast.control.memory import out_of_memory
from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.method import noise
from orwcfm_fast.method.samplers import Velocity, solve
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.settings import Sampling

Reward = Callable[[Tensor], Tensor]
PACKAGE = Path(__file__).parent


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
    pause: Callable[[], None] = lambda: None,
    condition: Tensor | None = None,
) -> Tensor:
    """Samples [N, *shape] of the policy from noise x0, `chunk` at a time, float32; `pause` after each chunk.

    Args:
        condition: rows [N] of the policy's prompts; those of the first N draws where None.
    """
    parts = []
    with torch.inference_mode():
        for part, velocity in in_parts(policy, x0, how, chunk, condition):
            parts.append(solve(velocity, part, how.solver, how.nfe, policy.grid(how.grid)).float())
            pause()
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
    """Rows [n] of the policy's prompts for draws first … first+n−1; None where it has none."""
    return policy.draw_conditions(noise.indices(first, n, policy.device), how.seed, how.group)


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
    condition = start_conditions(policy, n, how, first)
    x1 = sample(policy, x0, how, chunk, pause, condition).clone()  # out of inference mode
    return Rollout(x1, noise.indices(first, n, policy.device), torch.empty(0), condition)


def _told(reward: Callable[..., Tensor], prompts: Sequence[Prompt] | None) -> dict[str, list]:
    """What of the prompts a reward has parameters for."""
    if prompts is None:
        return {}
    try:
        takes = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # of C, it says nothing of its parameters
        return {}
    all_of_it: dict[str, list] = {
        "prompts": [p.text for p in prompts],
        "metadata": [p.metadata for p in prompts],
    }
    return {key: values for key, values in all_of_it.items() if key in takes}


def _line_of(error: Exception) -> str:
    """Where in the reward's own code it was raised, " (my_reward.py:3)"; of packages, nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and PACKAGE not in Path(f.filename).parents]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def score(
    reward: Callable[..., Tensor],
    samples: Tensor,
    name: str,
    where: str = "",
    seed: int = 0,
    prompts: Sequence[Prompt] | None = None,
) -> Tensor:
    """Rewards [N] of decoded samples, float32 on their device.

    A reward that draws random numbers of torch draws those of `seed`: a resumed run asks it as the first did. One
    with a parameter `prompts` or `metadata` is given the samples' prompts (texts) or their metadata (dicts).

    Raises:
        RewardError: the reward raised, or returned another shape or values that are not finite.
        RuntimeError, MemoryError: it ran out of memory.
    """
    at = f"reward {name}{', ' + where if where else ''}"
    try:
        devices = [samples.device] if samples.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed % 2**63)
            values = torch.as_tensor(reward(samples, **_told(reward, prompts)))
    except RewardError as error:  # one that says what happened itself, e.g. a worker process that died
        raise RewardError(f"{at}: {error}") from error
    except Exception as error:
        if out_of_memory(error):
            raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        text = str(error).split("\n")[0]
        raise RewardError(f"{at}: {kind}{text}{_line_of(error)}") from error
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
