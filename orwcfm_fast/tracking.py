"""Metrics to Weights & Biases as well, where the user asks for it and it is installed."""

from collections.abc import Callable
from typing import Any

from orwcfm_fast.errors import warn
from orwcfm_fast.settings import Finetune

Log = Callable[[dict[str, Any]], Any]


def tracker(settings: Finetune, name: str | None = None, folder: str | None = None) -> Log:
    """A function that logs a round's metrics under their own names; without wandb one warning, then nothing."""
    if not settings.wandb:
        return lambda record: None
    try:
        import wandb
    except ImportError:
        warn("wandb is not installed (pip install orwcfm-fast[wandb]); going on without")
        return lambda record: None
    run = wandb.run or wandb.init(project=settings.wandb, name=name, dir=folder, config=settings.model_dump())
    return lambda record: run.log(record, step=record["round"])
