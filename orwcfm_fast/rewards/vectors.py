"""Rewards of vectors [B, D]."""

from torch import Tensor

from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards.registry import Reward, reward, reward_factory
from orwcfm_fast.settings import RewardOptions


@reward("right")
def right(x: Tensor) -> Tensor:
    """1 where the first coordinate is positive, else 0"""
    return (x[:, 0] > 0).float()


@reward_factory("coordinate")
def coordinate(argument: str, options: RewardOptions) -> Reward:
    """coordinate:K, the K-th coordinate, counted from 0"""
    if not (argument or "0").isdigit():
        raise UserError(f"reward 'coordinate:{argument}': K should be a whole number from 0 up")
    return lambda x: x[:, int(argument or 0)]


@reward("radius")
def radius(x: Tensor) -> Tensor:
    """minus the distance from the origin"""
    return -x.norm(dim=1)
