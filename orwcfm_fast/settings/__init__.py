"""Every setting, declared once: it is an option of the command line, a key of TOML files and a Python argument."""

from orwcfm_fast.settings.declare import PANELS, Settings, setting
from orwcfm_fast.settings.finetuning import Best, Finetune, Sweep
from orwcfm_fast.settings.layers import S, build, read_toml, to_toml
from orwcfm_fast.settings.measuring import Evaluation, Predict
from orwcfm_fast.settings.method import Weights
from orwcfm_fast.settings.rewards import RewardOptions, RewardsWithHoldout, Serve
from orwcfm_fast.settings.sampling import Conditioned, Sample, Sampling
from orwcfm_fast.settings.training import Pretrain, Training

__all__ = [
    "PANELS",
    "Best",
    "Conditioned",
    "Evaluation",
    "Finetune",
    "Predict",
    "Pretrain",
    "RewardOptions",
    "RewardsWithHoldout",
    "S",
    "Sample",
    "Sampling",
    "Serve",
    "Settings",
    "Sweep",
    "Training",
    "Weights",
    "build",
    "read_toml",
    "setting",
    "to_toml",
]
