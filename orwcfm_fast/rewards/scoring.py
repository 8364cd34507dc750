"""Calls a reward on a batch of samples and checks what it returns."""

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.device import out_of_memory
from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.rewards.isolation import describe, isolated
from orwcfm_fast.rewards.registry import Reward


def _arguments(reward: Reward, prompts: Sequence[Prompt] | None, seed: int) -> dict[str, Any]:
    """The arguments that a reward has parameters for: `prompts`, `metadata`, `inputs`; a concurrent one also `seed`."""
    arguments: dict[str, Any] = {"seed": seed} if _is_concurrent(reward) else {}
    if prompts is not None:
        arguments |= {
            "prompts": [p.text for p in prompts],
            "metadata": [copy.deepcopy(p.metadata) for p in prompts],
            "inputs": [copy.deepcopy(p.inputs) for p in prompts],
        }
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a function written in C has no signature
        return {}
    return {name: values for name, values in arguments.items() if name in parameters}


def _is_concurrent(reward: Reward) -> bool:
    return getattr(reward, "concurrent", False)


def _values(returned: Any, samples: Tensor) -> Tensor:
    """What a reward returned, as float32 on the samples' device.

    Of (scores, information), as flow_grpo's rewards return, the scores are taken.

    Raises:
        RewardError: its shape is not [N]; it holds complex numbers, or values that are not finite.
    """
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict | None):
        returned = returned[0]
    found = torch.as_tensor(returned).detach()
    if found.shape != (len(samples),):
        shape = tuple(found.shape)
        raise RewardError(f"returned shape {shape}, should be ({len(samples)},): one a sample")
    if found.is_complex():
        raise RewardError("returned complex numbers")
    # a copy: the reward may return the same tensor again, with other values in it
    values = found.to_dense().to(samples.device, torch.float32, copy=True)
    bad = int((~values.isfinite()).sum())
    if bad:
        kind = "NaN" if bool(values.isnan().any()) else "not finite"
        raise RewardError(f"{bad} of {len(samples)} values are {kind}")
    return values


def score(
    reward: Reward,
    samples: Tensor,
    name: str,
    where: str = "",
    seed: int = 0,
    prompts: Sequence[Prompt] | None = None,
) -> Tensor:
    """Rewards [N] of decoded samples, float32 on their device.

    The reward is called on a copy of the samples, within `isolated`: it may write into its input, and where it draws
    from the global generators of torch, NumPy or Python, a resumed run draws the same numbers. One with a parameter
    `prompts`, `metadata` or `inputs` is given the samples' prompts (texts), their metadata or what else their
    pipeline was called with (dicts; pictures by the path of their file). A `concurrent` reward changes nothing of the
    process and is called as it is, with its seed where it has a parameter `seed`.

    Raises:
        RewardError: the reward raised, called `sys.exit`, or returned another shape or values that are not finite.
        RuntimeError, MemoryError: it ran out of memory.
    """
    at = f"reward {name}{', ' + where if where else ''}"
    try:
        alone = nullcontext() if _is_concurrent(reward) else isolated(seed, samples.device)
        with torch.no_grad(), alone:
            returned = reward(samples.clone(), **_arguments(reward, prompts, seed))
        return _values(returned, samples)
    except (RewardError, UserError) as error:  # our own, which say what happened themselves
        raise RewardError(f"{at}: {error}") from error
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        raise RewardError(f"{at}: {describe(error)}") from error
