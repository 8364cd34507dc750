"""An average of past policies, held as tensors beside the network that is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from orwcfm_fast.sharding import like


class PolicyAverage:
    """average ← keep · average + (1 − keep) · parameters; begins as the parameters are.

    Args:
        parameters: those that are trained.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.values: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Begin again from the parameters as they are."""
        self.values = [p.detach().clone() for p in self.parameters]

    def update(self, keep: float) -> None:
        """Take in the parameters as they are now."""
        get_ema_multi_avg_fn(keep)(self.values, [p.detach() for p in self.parameters], 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network has the averaged parameters."""
        own = [p.detach().clone() for p in self.parameters]
        self._write(self.values)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {f"{k:05d}": value for k, value in enumerate(self.values)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`.

        Raises:
            ValueError: an average of another network.
        """
        found = [tensors[key] for key in sorted(tensors)]
        if [x.shape for x in found] != [x.shape for x in self.values]:
            raise ValueError("an average of another network")
        self.values = [like(x.to(own.device), own) for x, own in zip(found, self.values, strict=True)]
