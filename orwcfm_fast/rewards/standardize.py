"""Rewards of a round to mean 0 and deviation 1."""

import torch
from torch import Tensor

NO_SPREAD = 1e-6


def standardize(values: Tensor, mass: Tensor | None = None) -> Tensor:
    """(value − mean) / deviation of values [N], in their dtype; 0 for all where they differ by rounding alone.

    Values count as equal where their deviation is at most `NO_SPREAD` of the largest of them: about eight units in
    the last place of float32.

    Args:
        mass: probabilities [N] of the values, under which mean and deviation are taken; equal where None.
    """
    exact = values.double()
    p = torch.full_like(exact, 1 / len(exact)) if mass is None else mass.double()
    centred = exact - p @ exact
    deviation = (p @ centred.square()).sqrt()
    if float(deviation) <= NO_SPREAD * float(exact.abs().max()):
        return torch.zeros_like(values)
    return (centred / deviation).to(values.dtype)
