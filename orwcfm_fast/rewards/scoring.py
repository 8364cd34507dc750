"""Calls a reward on a batch of samples and checks what it returns."""

import inspect
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from orwcfm_fast.control.memory import out_of_memory
from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.rewards.registry import Reward

PACKAGE = Path(__file__).parent.parent


def _prompt_arguments(reward: Reward, prompts: Sequence[Prompt] | None) -> dict[str, list]:
    """The arguments `prompts` and `metadata`, as far as the reward has parameters of these names."""
    if prompts is None:
        return {}
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a function written in C has no signature
        return {}
    arguments: dict[str, list] = {
        "prompts": [p.text for p in prompts],
        "metadata": [p.metadata for p in prompts],
    }
    return {name: values for name, values in arguments.items() if name in parameters}


def _line_of(error: Exception) -> str:
    """Where in the reward's own code it was raised, " (my_reward.py:3)"; of packages, nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and PACKAGE not in Path(f.filename).parents]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def score(
    reward: Reward,
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
            values = torch.as_tensor(reward(samples, **_prompt_arguments(reward, prompts)))
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
