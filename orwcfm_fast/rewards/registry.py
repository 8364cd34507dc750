"""Where a reward is given its name."""

from collections.abc import Callable
from typing import Any

from orwcfm_fast.registry import Registry
from orwcfm_fast.settings import RewardOptions

Score = Callable[..., Any]  # (samples[, prompts][, metadata]) → [B]
Factory = Callable[[str, RewardOptions], Score]
REWARDS = Registry("reward", module="orwcfm_fast.rewards.all", group="orwcfm.rewards")


def reward(name: str) -> Callable[[Score], Score]:
    """Decorator: a function of the samples is the reward `name`."""

    def register(function: Score) -> Score:
        REWARDS.register(name)(function)
        return function

    return register


def reward_factory(name: str) -> Callable[[Factory], Factory]:
    """Decorator: a function (text after NAME:, the run's reward options) that makes the reward `name`."""

    def register(factory: Factory) -> Factory:
        factory.is_factory = True  # type: ignore[attr-defined]
        REWARDS.register(name)(factory)
        return factory

    return register
