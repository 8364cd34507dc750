"""What a checkpoint holds of a trainer, fine-tuning or pretraining, and how the trainer continues from it."""

from pathlib import Path
from typing import Any

import torch

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.method.pretrain import Pretrainer
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.method.weighting import GROWTH
from orwcfm_fast.networks.lora import load_lora
from orwcfm_fast.runs import partial_round


def trained_files(trainer: Trainer) -> dict[str, checkpoint.Tensors]:
    """The tensors that training changes, by file; in shards where the trainer's are."""
    return {
        "optimizer": checkpoint.optimizer_tensors(trainer.optimizer.optimizer),
        **trainer.policy.tensors(),
        **({"average": trainer.average.tensors()} if trainer.average else {}),
    }


def trainer_contents(
    trainer: Trainer, more: dict[str, Any], files: dict[str, checkpoint.Tensors] | None = None
) -> tuple[dict[str, Any], dict[str, checkpoint.Tensors]]:
    """The state and files of a checkpoint from which `restore_trainer` continues: bit for bit on a CPU.

    Args:
        more: JSON values to keep beside the trainer's own.
        files: `trained_files`, gathered, where they are in shards.
    """
    state = {
        "kind": "finetune",
        "round": trainer.round,
        "step": trainer.steps_taken,
        "grown": float(trainer.grown),
    }
    current: dict[str, checkpoint.Tensors] = {}
    if trainer.current and trainer.current.losses:
        if trainer.ranks.world == 1:
            trainer.gather_anchors()
        trainer.phases.add(seconds := trainer.phases.read())
        current["partial_round"], state["partial_round"] = partial_round.to_state(trainer.current, seconds)
    return {**state, **trainer.policy.describe(), **more}, {
        **(trained_files(trainer) if files is None else files),
        **current,
    }


def save_trainer(trainer: Trainer, path: str | Path, more: dict[str, Any]) -> None:
    """Write `trainer_contents`."""
    state, files = trainer_contents(trainer, more)
    checkpoint.save(path, state, **files)


def restore_trainer(trainer: Trainer, found: checkpoint.Checkpoint) -> None:
    """Continue from a checkpoint written by `save_trainer`.

    Raises:
        UserError: it is of another kind or another model.
    """
    policy, where = trainer.policy, str(found.path)
    with checkpoint.reading(found):
        if trainer.settings.lora:
            load_lora(policy.network, policy.adapters_from(found.tensors), where)
        else:
            checkpoint.load_weights(policy.network, found.tensors["model"], where)
        checkpoint.load_optimizer(trainer.optimizer.optimizer, found.tensors["optimizer"], where)
        if trainer.average:
            trainer.average.load(found.tensors["average"])
        number, step = int(found.state["round"]), int(found.state["step"])
        current = None
        if "partial_round" in found.tensors:
            current, seconds = partial_round.from_state(found, number, trainer)
            trainer.phases.add(seconds)
        taken = number * trainer.settings.steps_per_round + (len(current.losses) if current else 0)
        if taken != step or not 0 <= step < 2**62:
            raise ValueError("its round and its step do not agree")
        grown = float(found.state.get("grown", 1))  # a checkpoint of before held no such thing
        if not 1 <= grown <= GROWTH:
            raise ValueError(f"errors have grown {grown:g} times")
    trainer.continue_from(number, current, grown)


def save_pretrainer(trainer: Pretrainer, path: str | Path, more: dict[str, Any] | None = None) -> None:
    """Write a checkpoint; readers take its averaged weights.

    Args:
        more: JSON values to keep beside the trainer's own.
    """
    losses = {"losses": {"losses": torch.stack(trainer.losses)}} if trainer.losses else {}
    checkpoint.save(
        path,
        {"kind": "pretrain", "step": trainer.steps, **trainer.policy.describe(), **(more or {})},
        model=trainer.policy.network.state_dict(),
        ema=trainer.ema.state_dict(),
        optimizer=checkpoint.optimizer_tensors(trainer.optimizer),
        **losses,
    )


def restore_pretrainer(trainer: Pretrainer, found: checkpoint.Checkpoint) -> None:
    """Continue from a checkpoint written by `save_pretrainer`.

    Raises:
        UserError: it is of another kind or another model.
    """
    where = str(found.path)
    with checkpoint.reading(found):
        checkpoint.load_weights(trainer.policy.network, found.tensors["model"], where)
        checkpoint.load_weights(trainer.ema, found.tensors["ema"], where)
        checkpoint.load_optimizer(trainer.optimizer, found.tensors["optimizer"], where)
        trainer.steps = int(found.state["step"])
        if not 0 <= trainer.steps <= trainer.settings.steps:
            raise ValueError(f"at step {trainer.steps} of {trainer.settings.steps}")
        losses = found.tensors.get("losses", {"losses": torch.empty(0)})["losses"]
        trainer.losses = [*losses.to(trainer.policy.device)]
