"""A round that was left between its steps: what a checkpoint keeps of it, and how it is continued."""

from typing import Any

import torch

from orwcfm_fast.checkpoints.checkpoint import Checkpoint, Tensors
from orwcfm_fast.method import noise
from orwcfm_fast.method.anchors import Anchors
from orwcfm_fast.method.rollout import Rollout, start_conditions
from orwcfm_fast.method.trainer import RoundState, Trainer
from orwcfm_fast.rewards import RewardSum, Scores


def to_state(current: RoundState, seconds: dict[str, float]) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and JSON values from which `from_state` makes the same round again; `seconds` so far, by phase."""
    x1 = current.rollout.x1
    tensors = {"x1": x1, "losses": torch.stack(current.losses)}
    # convolutions may round otherwise on samples laid out otherwise
    state: dict[str, Any] = {"x1_stride": list(x1.stride()), "seconds": seconds}
    if current.anchors:
        tensors |= {f"anchors.{name}": v for name, v in current.anchors.whole.items()}
        state["drift"] = None if current.anchors.drift is None else float(current.anchors.drift)
    for kind, found in (("scores", current.scores), ("held_out", current.held_out)):
        if found:
            tensors |= {f"{kind}.{k}": v for k, v in enumerate(found.values.values())}
            state[f"seconds_{kind}"] = [*found.seconds.values()]
    return tensors, state


def from_state(found: Checkpoint, number: int, trainer: Trainer) -> tuple[RoundState, dict[str, float]]:
    """Round `number` as it was when `to_state` was called, and its seconds by phase.

    Raises:
        ValueError, LookupError, TypeError, RuntimeError: what was kept is not a round of this run.
    """
    s, policy = trainer.settings, trainer.policy
    saved, state, device = found.tensors["partial_round"], found.state["partial_round"], policy.device
    if saved["x1"].shape != (s.rollout, *policy.shape):
        raise ValueError("a rollout of another run")
    stride = [int(n) for n in state["x1_stride"]]
    if sum((n - 1) * k for n, k in zip(saved["x1"].shape, stride, strict=True)) >= saved["x1"].numel():
        raise ValueError("strides that leave gaps")
    x1 = torch.empty_strided(saved["x1"].shape, stride, device=device).copy_(saved["x1"])
    index = noise.indices(number * s.rollout, s.rollout, device)

    def scores(kind: str, rewards: RewardSum) -> Scores:
        again = Scores({}, {}, {})
        for k, (name, weight, _) in enumerate(rewards.terms):
            values = saved[f"{kind}.{k}"].to(device)
            if values.shape != (s.rollout,):
                raise ValueError("rewards of another run")
            again.values[name], again.weights[name] = values, weight
            again.seconds[name] = float(state[f"seconds_{kind}"][k])
        return again

    trained = scores("scores", trainer.reward)
    condition = start_conditions(policy, s.rollout, s, number * s.rollout)
    rollout = Rollout(x1, index, trainer.trained_on(trained), condition)
    held_out = scores("held_out", trainer.holdout) if trainer.holdout else None
    seconds = {name: float(value) for name, value in state["seconds"].items()}
    whole = {name.removeprefix("anchors."): v for name, v in saved.items() if name.startswith("anchors.")}
    for v in whole.values():
        if v.shape != (s.steps_per_round, s.batch, *policy.shape):
            raise ValueError("anchors of another run")
    anchors = Anchors.from_whole(whole, state["drift"], trainer.ranks.share(s.batch), device)
    return RoundState(rollout, trained, held_out, anchors, [*saved["losses"].to(device)]), seconds
