"""orwcfm: online reward-weighted fine-tuning of flow-matching models with Wasserstein-2 regularisation."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Finetune": "settings",
    "Loader": "runs.load",
    "ORWCFMTrainer": "paper",
    "Policy": "networks.policy",
    "Pretrain": "settings",
    "Trainer": "method.trainer",
    "dataset": "data.datasets",
    "evaluate": "evaluation.evaluate",
    "make_policy": "networks.policy",
    "make_reward": "rewards",
    "reward": "rewards",
    "solve": "method.samplers",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """Public names load their module, and torch with it, at first use."""
    if name not in _WHERE:
        raise AttributeError(f"module 'orwcfm' has no attribute '{name}'")
    return getattr(import_module(f"orwcfm_fast.{_WHERE[name]}"), name)
