"""The registry of rewards, and the decorators that enter a reward in it."""

from collections.abc import Callable
from typing import Any

from orwcfm_fast.registry import Registry
from orwcfm_fast.settings import RewardOptions

Reward = Callable[..., Any]
"""Decoded samples [B, …] → scores [B]. Where it has parameters `prompts` or `metadata`, it is called with lists of
B texts or B dicts. It needs no gradient.

One whose attribute `concurrent` is true may be called in a thread while the next samples are drawn: it uses no global
random generator but a parameter `seed`, and changes nothing of the process."""
Factory = Callable[[str, RewardOptions], Reward]
REWARDS = Registry("reward", package="orwcfm_fast.rewards", group="orwcfm.rewards")


def reward(name: str) -> Callable[[Reward], Reward]:
    """Decorator: registers a function of the samples as the reward `name`."""

    def register(function: Reward) -> Reward:
        REWARDS.register(name)(function)
        return function

    return register


def reward_factory(name: str) -> Callable[[Factory], Factory]:
    """Decorator: registers a function that makes the reward `name`, given the text after `NAME:` and the options."""

    def register(factory: Factory) -> Factory:
        factory.is_factory = True  # type: ignore[attr-defined]
        REWARDS.register(name)(factory)
        return factory

    return register
