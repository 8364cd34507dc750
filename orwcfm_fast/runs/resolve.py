"""What a run will be, once its model is known: every setting filled in, its name, its α in words."""

import re
from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.data.datasets import source
from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.diffusers import PREFIX, is_pipeline
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.runs.load import DEFAULT, Loaded
from orwcfm_fast.settings import Finetune

FILLED = ("checkpoint", "reward", "model", "data", "precision")  # by the model, where not given


def left_open(key: str, value: Any) -> bool:
    """Whether a setting of that value is one that `resolved` fills in."""
    return key in FILLED and value in ("", [], "auto")


def agrees(key: str, value: Any, own: Any) -> bool:
    """Whether a setting given for a run that is there is the one that it has, or left open."""
    if key in ("checkpoint", "model") and is_pipeline(value):
        folder = Path(value.removeprefix(PREFIX))
        value = f"{PREFIX}{folder.resolve()}" if folder.is_dir() else value
    return value == own or left_open(key, value)


def anchored(s: Finetune) -> str:
    """α, or what it is steered to."""
    return f"α={s.alpha:g}" if s.target_w2 is None else f"α for a coupled W2 of {s.target_w2:g},"


def run_name(settings: Finetune) -> str:
    """<data>-<reward>-a1-t0.5, for a run's directory."""
    anchored = f"a{settings.alpha:g}" if settings.target_w2 is None else f"w{settings.target_w2:g}"
    rewards = re.sub(r"[^:+]*/", "", "+".join(settings.reward))[:100]  # without the folders of files
    name = f"{settings.data}-{rewards}-{anchored}-t{settings.tau:g}"
    return "".join(c if c.isalnum() or c in "-+.=" else "-" for c in name)


def own_reward(policy: Policy) -> str:
    """The reward of the policy's data, where none is named.

    Raises:
        UserError: it is a pipeline, whose prompts have none.
    """
    if policy.pipeline:
        raise UserError("no reward named: a pipeline needs a --reward (orwcfm list rewards)")
    return source(policy.data)[0].reward


def resolved(settings: Finetune, loaded: Loaded) -> Finetune:
    """The settings with everything filled in that the loaded model decides."""
    policy = loaded.policy
    filled = {
        "checkpoint": settings.checkpoint or (policy.model if policy.pipeline else DEFAULT),
        "reward": settings.reward or [own_reward(policy)],
        "model": policy.model,
        "data": policy.data,
        "precision": "fp32" if policy.precision == torch.float32 else "bf16",
    }
    return settings.model_copy(update=filled)
