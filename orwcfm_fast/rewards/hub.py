"""Weights of rewards: from the Hugging Face Hub, or from where the user has put them."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards.registry import Reward
from orwcfm_fast.settings import RewardOptions

T = TypeVar("T")


def from_hub(reward: str, name: str, instead: str, load: Callable[[], T]) -> T:
    """What `load` reads from a repository of the Hub, or from a folder.

    Args:
        name: of the repository or the folder. instead: how the reward is named with weights on disk.

    Raises:
        UserError: it cannot be read; says where to put it.
    """
    try:
        return load()
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0][:160]
        there = (
            "cannot be loaded" if Path(name).exists() else "is neither on this machine nor reached on the Hub"
        )
        raise UserError(
            f"reward '{reward}': {name} {there} ({type(error).__name__}: {reason}); with the weights on disk: {instead}"
        ) from None


def hub_file(reward: str, repository: str, file: str, instead: str) -> str:
    """The path of a file of a repository, downloaded at first use; raises as `from_hub`."""
    from huggingface_hub import hf_hub_download

    return from_hub(reward, repository, instead, lambda: hf_hub_download(repository, file))


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def with_prompts(reward: str, options: RewardOptions, score: Callable[[Tensor, list[str]], Tensor]) -> Reward:
    """The reward of images and prompts: of the one text of --prompt for all samples, else of each one's own.

    Raises:
        UserError: there is no prompt, or --prompt is repeated.
    """
    if len(options.prompt) > 1:
        raise UserError(f"reward '{reward}': takes one --prompt for all samples, not {len(options.prompt)}")
    if options.prompt:
        return lambda images: score(images, options.prompt * len(images))
    if not options.has_prompts:
        raise UserError(
            f"reward '{reward}': the model has no prompts; give one for all samples, --prompt TEXT"
        )
    return score
