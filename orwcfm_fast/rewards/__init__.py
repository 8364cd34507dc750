"""Rewards: any callable from decoded samples [B, …] to [B] numbers; it needs no gradient.

A file in this folder that decorates a function with `@reward("name")` adds a reward; nothing else is edited.
"""

from orwcfm_fast.rewards.combine import (
    RewardSum,
    Scores,
    check_code_named,
    make_holdout,
    make_reward,
    user_code,
)
from orwcfm_fast.rewards.registry import REWARDS, Reward, reward, reward_factory
from orwcfm_fast.rewards.rollouts import RolloutScoring, decode_and_score
from orwcfm_fast.rewards.scoring import score

__all__ = ["REWARDS", "Reward", "RewardSum", "Scores", "check_code_named", "make_holdout", "make_reward"]
__all__ += ["RolloutScoring", "decode_and_score"]
__all__ += ["reward", "reward_factory", "score", "user_code"]
