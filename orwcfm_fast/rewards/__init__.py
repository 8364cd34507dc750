"""Rewards: any callable from decoded samples [B, …] to [B] numbers; no gradient is asked of it."""

from orwcfm_fast.rewards.combine import (
    RewardSum,
    Scores,
    check_code_named,
    make_holdout,
    make_reward,
    user_code,
)
from orwcfm_fast.rewards.registry import REWARDS, reward, reward_factory

__all__ = ["REWARDS", "RewardSum", "Scores", "check_code_named", "make_holdout", "make_reward"]
__all__ += ["reward", "reward_factory", "user_code"]
