"""What a run will be, once its model is known: every setting filled in, its name, its α in words."""

import re
from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.data.datasets import source
from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.flow.library import PREFIX, is_pipeline
from orwcfm_fast.networks.lora import settings_of
from orwcfm_fast.networks.models import defaults_of
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.runs.load import Loaded
from orwcfm_fast.settings import Conditioned, Finetune, S, Settings

FILLED = ("checkpoint", "reward", "model", "data", "precision", "guidance")  # by the model, where not given


def left_open(key: str, value: Any) -> bool:
    """Whether a setting of that value is one that `resolved` fills in."""
    return key in FILLED and value in ("", [], "auto", None)


def with_model_defaults(settings: S, model: str) -> S:
    """The settings with the defaults that this kind of model brings, where nobody set another value."""
    own = defaults_of(model)
    keys = own.keys() & type(settings).model_fields.keys() - settings.model_fields_set
    return settings.model_copy(update={key: own[key] for key in keys})


def agrees(key: str, value: Any, own: Any) -> bool:
    """Whether a setting given for a run that is there is the one that it has, or left open."""
    if key in ("checkpoint", "model") and is_pipeline(value):
        folder = Path(value.removeprefix(PREFIX))
        value = f"{PREFIX}{folder.resolve()}" if folder.is_dir() else value
    return value == own or left_open(key, value)


def anchored(s: Finetune) -> str:
    """α, or what it is steered to."""
    return f"α={s.alpha:g}" if s.target_w2 is None else f"α for a coupled W2 of {s.target_w2:g},"


def anchor_name(s: Finetune) -> str:
    """a1 for α = 1, or w1.5 for a target of 1.5 for the coupled W2; a part of the name of a run."""
    return f"a{s.alpha:g}" if s.target_w2 is None else f"w{s.target_w2:g}"


def run_name(settings: Finetune) -> str:
    """<data>-<reward>-a1-t0.5, for a run's directory."""
    rewards = re.sub(r"[^:+]*/", "", "+".join(settings.reward))[:100]  # without the folders of files
    name = f"{settings.data}-{rewards}-{anchor_name(settings)}-t{settings.tau:g}"
    return "".join(c if c.isalnum() or c in "-+.=" else "-" for c in name)


def own_reward(policy: Policy) -> str:
    """The reward of the policy's data, where none is named.

    Raises:
        UserError: it is a pipeline, whose prompts have none.
    """
    if policy.pipeline:
        raise UserError("no reward named: a pipeline needs a --reward (orwcfm list rewards)")
    return source(policy.data)[0].reward


def check_conditions(s: Settings, policy: Policy, name: str) -> None:
    """Settings of a pipeline do nothing for another model.

    Args:
        name: what the model is called in the message.

    Raises:
        UserError: the model has no prompts, and one of these settings is not as it is by default.
    """
    if policy.pipeline:
        return
    fields = type(s).model_fields
    for key in (
        *(Conditioned.model_fields.keys() - Settings.model_fields.keys()),
        "gradient_checkpointing",
        "eval_prompts",
        "lora_init",
    ):
        if key in fields and getattr(s, key) != fields[key].default:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{flag} has no effect: {name} is no pipeline with prompts")


def resolved(settings: Finetune, loaded: Loaded) -> Finetune:
    """The settings with everything filled in that the loaded model decides."""
    policy = loaded.policy
    check_conditions(settings, policy, loaded.name)
    settings = with_model_defaults(settings, policy.model)
    filled = {
        "checkpoint": settings.checkpoint or policy.model,
        "reward": settings.reward or [own_reward(policy)],
        "model": policy.model,
        "data": policy.data,
        "precision": "fp32" if policy.precision == torch.float32 else "bf16",
    }
    if policy.options:
        filled["guidance"] = policy.options["guidance"]
    for key, value in settings_of(policy.network).items():
        if key in settings.model_fields_set and getattr(settings, key) not in (value, 0, None):
            flag = f"--{key.replace('_', '-')}"
            raise UserError(
                f"{flag} {getattr(settings, key)}: the published adapter has {value}; leave {flag} out"
            )
        filled[key] = value
    return settings.model_copy(update=filled)
