"""Couplings: which noise goes with which sample of a minibatch, and with what loss weights."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.kernels.interpolate import interpolate_at_random_times
from orwcfm_fast.method import noise
from orwcfm_fast.method.weighting import check_positive


@dataclass(frozen=True)
class Batch:
    """One minibatch, coupled.

    Attributes:
        x1: samples [B, *shape]; t: times [B]; x_t: points [B, *shape] of the probability path.
        index: global numbers [B] of the draws; they name x0.
        w, a, b: weights [B] of the terms with u, with v_ref and with v_old; b is 0 where it is None. Of a method whose
            weights follow the policy's velocity, w is the signal of each sample until the step makes weights of it.
        anchor: velocity [B, *shape] that the policy is held to, with weight a + b; None where there is none.
        v_old, v_ref: velocities of which the step blends the anchor, where the weights follow the velocity.
        condition: rows [B] of the policy's prompts, where it has some.
        whole: samples of the minibatch that this is a part of; 0 where it is no part.
    """

    x1: Tensor
    t: Tensor
    x_t: Tensor
    index: Tensor
    w: Tensor
    a: Tensor
    b: Tensor | None = None
    anchor: Tensor | None = None
    v_old: Tensor | None = None
    v_ref: Tensor | None = None
    condition: Tensor | None = None
    whole: int = 0

    @property
    def anchor_weight(self) -> Tensor:
        """a + b [B]."""
        return self.a if self.b is None else self.a + self.b

    @property
    def size(self) -> int:
        """Samples of the whole minibatch, over which its loss is a mean."""
        return self.whole or len(self.w)

    def part(self, rows: slice) -> "Batch":
        """Some of its samples, which stay a part of the same minibatch."""
        tensors: dict[str, Any] = {k: x[rows] for k, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, whole=self.size, **tensors)

    def filler(self) -> "Batch":
        """A row of weight 0 and the same minibatch, for a process that has none or fewer than others."""
        x = self.x1.new_zeros(1, *self.x1.shape[1:])
        nothing, first = self.w.new_zeros(1), self.index.new_zeros(1)
        condition = None if self.condition is None else self.condition.new_zeros(1)
        return Batch(x, nothing + 0.5, x, first, nothing, nothing, condition=condition, whole=self.size)

    def split(self, size: int) -> Iterator["Batch"]:
        """Parts of at most `size` samples, in order."""
        for i in range(0, len(self.w), size):
            yield self.part(slice(i, i + size))


def couple(
    x1: Tensor,
    w: Tensor,
    alpha: float,
    seed: Tensor,
    index: Tensor,
    coupling: str = "independent",
    late: bool = False,
    pairs: Tensor | None = None,
) -> Batch:
    """Couple samples x1 [B, *shape] of weights w [B] with the noise x0 of draws `index` [B].

    independent: p_t(x | x1) of the paper; loss weights w and α.
    ot: exact plan between x0 (uniform) and x1 (∝ w) for the squared distance; each x0 draws its x1 from the
    plan, loss weight w̄ = mean w, anchor weight α·w̄/w: both terms are unbiased (Tong et al., TMLR 2024,
    reweighted).

    Args:
        late: t has density 2t in place of 1.
        pairs: of ot, `weighted_plan_draw` of these arguments, where it is known.

    Raises:
        UserError: ot with a weight that is not positive.
    """
    if coupling == "ot":
        pick = weighted_plan_draw(x1, w, seed, index) if pairs is None else pairs
        mean = w.mean()
        x1, a, w = x1[pick], alpha * mean / w[pick], mean.expand(len(w)).contiguous()
    else:
        a = torch.full_like(w, alpha)
    x_t, t = interpolate_at_random_times(x1, seed, index, late)
    return Batch(x1, t, x_t, index, w, a)


def weighted_plan_draw(x1: Tensor, w: Tensor, seed: Tensor, index: Tensor) -> Tensor:
    """For each x0 one x1 drawn from the optimal plan with target marginal ∝ w, int64 [B]."""
    check_positive(w)
    import ot

    x0 = noise.normal(tuple(x1.shape[1:]), seed, index, noise.X0)
    cost = torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square().cpu().numpy()
    target = w.double().cpu()
    source = torch.full_like(target, 1 / len(target))
    plan = torch.as_tensor(ot.emd(source.numpy(), (target / target.sum()).numpy(), cost)).to(x1.device)
    mass = plan.cumsum(1)
    u = noise.uniform((1,), seed, index, noise.PAIRING).double() * mass[:, -1:]
    return torch.searchsorted(mass, u, right=True).clamp_(max=len(w) - 1)[:, 0]
