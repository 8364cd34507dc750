"""Rewards: any callable from decoded samples [B, …] to [B] numbers; no gradient is asked of it."""

from orwcfm_fast.rewards.combine import RewardSum, Scores, make_holdout, make_reward
from orwcfm_fast.rewards.registry import REWARDS, reward, reward_factory

__all__ = ["REWARDS", "RewardSum", "Scores", "make_holdout", "make_reward", "reward", "reward_factory"]
