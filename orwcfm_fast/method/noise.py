"""Counted noise: what each draw is for. Same seed, purpose and index give the same noise on every machine."""

import torch
from torch import Tensor

from orwcfm_fast.kernels.philox import X0, normal, uniform

T, MINIBATCH, ROLLOUT, PAIRING, SAMPLE, PRETRAIN_CHOICE, FLIP, PROBE, PROMPT, HELD_OUT, FORECAST = range(
    1, 12
)

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
    """A seed as the 0-d int64 tensor that the noise wants, filled in there: a copy would wait for the device."""
    return torch.full((), seed, dtype=torch.int64, device=device)


def permutation(n: int, seed: Tensor, number: int, purpose: int = MINIBATCH) -> Tensor:
    """The `number`-th random order of n things, int64 [n]; the same on every device, ties too."""
    return uniform((n,), seed, indices(number, 1, seed.device), purpose)[0].argsort(stable=True)


def choice(n: int, seed: Tensor, index: Tensor, purpose: int) -> Tensor:
    """For each index one of n things with replacement, int64 [B]; bias below n·2⁻²⁴."""
    return (uniform((1,), seed, index, purpose)[:, 0] * n).long().clamp_(max=n - 1)
