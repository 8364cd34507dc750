"""A round that was left between its steps: what a checkpoint keeps of it, and how it is taken up again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.checkpoints.checkpoint import Checkpoint, Tensors
from orwcfm_fast.method import noise
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import RewardSum, Scores
from orwcfm_fast.settings import Finetune


@dataclass
class PartialRound:
    """A round that has begun.

    Attributes:
        rollout: scored.
        losses: [3] of each step taken so far.
    """

    rollout: Rollout
    losses: list[Tensor]


def pack(
    begun: PartialRound, scores: Scores, held_out: Scores | None, seconds: dict[str, float]
) -> tuple[Tensors, dict[str, Any]]:
    """Tensors, and JSON values, from which `unpack` makes the same round again, `seconds` by phase among them."""
    x1 = begun.rollout.x1
    tensors = {"x1": x1, "losses": torch.stack(begun.losses)}
    # convolutions may round otherwise on samples laid out otherwise
    state: dict[str, Any] = {"x1_stride": list(x1.stride()), "seconds": seconds}
    for kind, found in (("scores", scores), ("held_out", held_out)):
        if found:
            tensors |= {f"{kind}.{k}": v for k, v in enumerate(found.values.values())}
            state[f"seconds_{kind}"] = [*found.seconds.values()]
    return tensors, state


def unpack(
    found: Checkpoint, number: int, policy: Policy, s: Finetune, reward: RewardSum, holdout: RewardSum | None
) -> tuple[PartialRound, Scores, Scores | None, dict[str, float]]:
    """Round `number` as it was when `pack` was called; its rollout's reward is left to be made of its scores.

    Raises:
        ValueError, LookupError, TypeError, RuntimeError: what was kept is not a round of this run.
    """
    saved, state, device = found.tensors["begun"], found.state["begun"], policy.device
    if saved["x1"].shape != (s.rollout, *policy.shape):
        raise ValueError("a rollout of another run")
    stride = [int(n) for n in state["x1_stride"]]
    if sum((n - 1) * k for n, k in zip(saved["x1"].shape, stride, strict=True)) >= saved["x1"].numel():
        raise ValueError("strides that leave gaps")
    x1 = torch.empty_strided(saved["x1"].shape, stride, device=device).copy_(saved["x1"])
    index = noise.indices(number * s.rollout, s.rollout, device)
    rollout = Rollout(x1, index, torch.empty(0), policy.draw_conditions(index, s.seed, s.group))

    def scores(kind: str, rewards: RewardSum) -> Scores:
        again = Scores({}, {}, {})
        for k, (name, weight, _) in enumerate(rewards.terms):
            values = saved[f"{kind}.{k}"].to(device)
            if values.shape != (s.rollout,):
                raise ValueError("rewards of another run")
            again.values[name], again.weights[name] = values, weight
            again.seconds[name] = float(state[f"seconds_{kind}"][k])
        return again

    seconds = {name: float(value) for name, value in state["seconds"].items()}
    losses = [*saved["losses"].to(device)]
    held_out = scores("held_out", holdout) if holdout else None
    return PartialRound(rollout, losses), scores("scores", reward), held_out, seconds
