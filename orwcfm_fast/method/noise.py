"""Counted noise: the purpose of each draw. Same seed, purpose and index give the same noise on every machine."""

import torch
from torch import Tensor

from orwcfm_fast.kernels.philox import X0, T
from orwcfm_fast.kernels.random_numbers import choice, normal, uniform

MINIBATCH, ROLLOUT, PAIRING, SAMPLE, PRETRAIN_CHOICE, FLIP, PROBE, PROMPT, HELD_OUT, FORECAST = range(2, 12)

__all__ = [
    "FLIP",
    "MINIBATCH",
    "PAIRING",
    "PRETRAIN_CHOICE",
    "PROBE",
    "PROMPT",
    "ROLLOUT",
    "SAMPLE",
    "X0",
    "T",
]
__all__ += ["choice", "indices", "normal", "permutation", "seed_on", "uniform"]


def indices(start: int, n: int, device: torch.device | str) -> Tensor:
    """Global numbers start … start+n−1 of draws, int64 [n]."""
    return torch.arange(start, start + n, device=device)


def seed_on(seed: int, device: torch.device | str) -> Tensor:
    """A seed as the 0-d int64 tensor that draws take, filled in on the device: a copy would wait for it."""
    return torch.full((), seed, dtype=torch.int64, device=device)


def permutation(n: int, seed: Tensor, number: int, purpose: int = MINIBATCH) -> Tensor:
    """The `number`-th random order of n things, int64 [n]; the same on every device, ties included."""
    return uniform((n,), seed, indices(number, 1, seed.device), purpose)[0].argsort(stable=True)
