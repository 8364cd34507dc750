"""The velocities that a round holds its policy to, computed before its first step, without gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orwcfm_fast.batch_sizes import BatchSizes
from orwcfm_fast.distributed import ProcessGroup
from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.networks.policy import Policy

if TYPE_CHECKING:
    from orwcfm_fast.method.minibatches import Minibatches

GPU_SHARE = 0.5  # of the memory that is free; what takes more lies in pinned host memory


@dataclass
class Anchors:
    """By name ("anchor", or "v_old" and "v_ref"): a velocity [b, *shape] for each gradient step of a round.

    b is this process's share of the minibatch. `drift` is the mean of 1/D ‖v_old − v_ref‖² over the share, 0-d, or
    None where one of them is not computed; from `gather` on it is the mean over all processes.
    """

    steps: dict[str, list[Tensor]] = field(default_factory=dict)
    drift: Tensor | None = None
    whole: dict[str, Tensor] = field(default_factory=dict)  # [steps, batch, *shape] by name, from `gather`

    def gather(self, ranks: ProcessGroup, batch: int) -> None:
        """Make `whole` and the drift of all, from the shares of all processes, for a checkpoint."""
        drift = self.mean_drift(ranks)
        self.drift = None if drift is None else torch.tensor(drift, dtype=torch.float64)
        self.whole = {
            name: torch.stack([ranks.gather(v, batch) for v in found]) for name, found in self.steps.items()
        }

    def mean_drift(self, ranks: ProcessGroup) -> float | None:
        """The mean drift over all processes; called on all of them."""
        found = [d for d in ranks.all(None if self.drift is None else float(self.drift)) if d is not None]
        return sum(found) / len(found) if found else None

    @classmethod
    def from_whole(
        cls, whole: dict[str, Tensor], drift: float | None, share: slice, device: torch.device
    ) -> "Anchors":
        """A process's share of what `gather` made."""
        steps = {name: [*v[:, share].to(device)] for name, v in whole.items()}
        return cls(steps, None if drift is None else torch.tensor(drift, dtype=torch.float64))

    def of_step(self, k: int, device: torch.device) -> dict[str, Tensor]:
        """Those of one step, on the device."""
        return {name: found[k].to(device, non_blocking=True) for name, found in self.steps.items()}


def blend(v_old: Tensor | None, v_ref: Tensor | None, b: Tensor, a: Tensor) -> Tensor:
    """(b·v_old + a·v_ref)/(a + b) of velocities [B, *shape] and weights [B]; exactly v_old where both are equal.

    Where a + b is 0 it is as if it were 1e-6: the gradient a·(v − v_ref) + b·(v − v_old) does not vanish there.
    """
    if v_old is None or v_ref is None:
        found = v_ref if v_old is None else v_old
        assert found is not None
        return found
    total = a + b
    total = torch.where(total.abs() < 1e-6, 1e-6, total)
    share = (a / total).view(-1, *[1] * (v_old.dim() - 1))
    return (v_old.float() + share * (v_ref.float() - v_old.float())).to(v_old.dtype)


def velocities(policy: Policy, batch: Batch, sizes: BatchSizes) -> Tensor:
    """Velocities [B, *shape] of a policy at a batch's draws, without gradient.

    They are computed with as many rows at once as in the gradient step, so that both round alike: a policy that has
    not moved has a residual of exactly zero.
    """

    def compute(size: int) -> Tensor:
        with torch.no_grad():
            parts = [policy.velocity(p.t, p.x_t, p.condition) for p in batch.split(size)]
        return torch.cat(parts) if parts else batch.x_t  # a process's share may be empty

    return sizes.fit("micro_batch", compute, max(1, len(batch.w)))


def compute_anchors(
    batches: "Sequence[Batch] | Minibatches",
    old: Callable[[Batch], Tensor] | None,
    reference: Callable[[Batch], Tensor] | None,
    blended: bool,
) -> Anchors:
    """Anchors of a round's minibatches.

    Args:
        old, reference: velocities at a batch's draws; None where the method has no such term.
        blended: one anchor a draw; else v_old and v_ref apart, for the step to blend.
    """
    found, drifts, place = Anchors(), [], None
    for batch in batches if old or reference else ():
        v_old, v_ref = old and old(batch), reference and reference(batch)
        if v_old is not None and v_ref is not None:
            drifts.append((v_old.float() - v_ref.float()).square().flatten(1).mean(1))
        b = torch.zeros_like(batch.a) if batch.b is None else batch.b
        named = {"anchor": blend(v_old, v_ref, b, batch.a)} if blended else {"v_old": v_old, "v_ref": v_ref}
        for name, v in named.items():
            if v is not None:
                place = place or _place(v, len(batches) * len(named))
                found.steps.setdefault(name, []).append(place(v))
    found.drift = torch.cat(drifts).mean() if sum(map(len, drifts)) else None
    return found


def _place(v: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """Where `count` tensors like v are kept: on their device, or in pinned host memory where they do not fit."""
    if v.device.type != "cuda" or count * v.nbytes <= GPU_SHARE * torch.cuda.mem_get_info(v.device)[0]:
        return lambda v: v
    return lambda v: torch.empty_like(v, device="cpu", pin_memory=True).copy_(v, non_blocking=True)
