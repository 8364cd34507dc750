"""GroupNorm, then SiLU, of channels_last maps, in the dtype of the map."""

import torch
from torch import Tensor, nn

from orwcfm_fast.kernels.group_norm_silu import group_norm_silu


class GroupNorm(nn.GroupNorm):
    """32 groups, eps 1e-5, computed in float32 and returned in the dtype of x; then SiLU if asked."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, silu, self.eps)[0]
