"""Rewards of a round to mean 0 and deviation 1."""

import torch
from torch import Tensor

NO_SPREAD = 1e-6


def standardize(values: Tensor) -> Tensor:
    """(value − mean) / deviation of values [N], in their dtype; 0 for all where they differ by rounding alone.

    Values count as equal where their deviation is at most `NO_SPREAD` of the largest of them: about eight units in
    the last place of float32.
    """
    exact = values.double()
    deviation = exact.std(correction=0)
    if float(deviation) <= NO_SPREAD * float(exact.abs().max()):
        return torch.zeros_like(values)
    return ((exact - exact.mean()) / deviation).to(values.dtype)
