"""From what the user asked for, NAME[:ARG][=WEIGHT] once or more, to one reward."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import unknown
from orwcfm_fast.rewards.registry import REWARDS, Score
from orwcfm_fast.rewards.user import is_user_reward, load_user_reward
from orwcfm_fast.settings import RewardOptions


@dataclass
class RewardSum:
    """Σ weight_k · reward_k of decoded samples [B, …] → [B]; `parts` holds the last call's values by name."""

    terms: list[tuple[str, float, Score]]
    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "+".join(name for name, _, _ in self.terms)

    def __call__(self, samples: Tensor) -> Tensor:
        total: Tensor | None = None
        for name, weight, score in self.terms:
            values = torch.as_tensor(score(samples)).to(samples.device, torch.float32)
            if len(self.terms) > 1 and values.shape != (len(samples),):
                raise ValueError(f"{name} returned shape {tuple(values.shape)}, should be ({len(samples)},)")
            self.parts[name] = values
            total = weight * values if total is None else total + weight * values
        assert total is not None
        return total


def make_reward(specs: Sequence[str] | str | Callable, options: RewardOptions | None = None) -> RewardSum:
    """The reward that the user named.

    Args:
        specs: one or several NAME[:ARG][=WEIGHT]; NAME of the registry, file.py:function or
            package.module:function; or a callable.
        options: what some rewards need besides, e.g. clip its prompts.

    Raises:
        UserError: unknown name (the nearest known one), bad argument or weight.
    """
    if callable(specs):
        return RewardSum([(getattr(specs, "__name__", "reward"), 1.0, specs)])
    specs = [specs] if isinstance(specs, str) else specs
    if not specs:
        raise UserError("no reward named (orwcfm list rewards)")
    options = options or RewardOptions()
    return RewardSum([_term(spec, options) for spec in specs])


def user_code(specs: Sequence[str]) -> list[str]:
    """Those of `specs` that would run a user's code: file.py:function, package.module:function."""
    return [s for s in specs if s.partition(":")[0] not in REWARDS.names() and is_user_reward(s)]


def check_code_named(specs: Sequence[str], named: Sequence[str], where: Path | str) -> None:
    """Code that a run's own files name may come from anyone: it runs only if the user names it too.

    Args:
        specs: the rewards that the file `where` asks for.
        named: those that the user gave on the command line.

    Raises:
        UserError: one of `specs` is code, and the user has not named them.
    """
    if user_code(specs) and list(named) != list(specs):
        again = " ".join(f"--reward {shlex.quote(s)}" for s in specs)
        raise UserError(f"{where}: its reward is code, which runs only if you name it too: add {again}")


def _term(spec: str, options: RewardOptions) -> tuple[str, float, Score]:
    name, weight = spec, 1.0
    head, equals, tail = spec.rpartition("=")
    if equals:
        try:
            name, weight = head, float(tail)
        except ValueError:
            raise UserError(
                f"reward '{spec}': the weight after = should be a number, e.g. {head}=0.5"
            ) from None
        if not math.isfinite(weight):
            raise UserError(f"reward '{spec}': the weight after = should be finite")
    base, colon, argument = name.partition(":")
    if base not in REWARDS.names():
        if is_user_reward(name):
            return name, weight, load_user_reward(name)
        raise unknown("reward", name, REWARDS.names(), "orwcfm list rewards")
    entry = REWARDS.get(base)
    if getattr(entry, "is_factory", False):
        return name, weight, entry(argument, options)
    if colon:
        raise UserError(f"reward '{name}': '{base}' takes no argument after ':'")
    return name, weight, entry
