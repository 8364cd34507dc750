"""What the settings of a run do where no reward counts: what of its gain and its drift is no merit of the reward."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from orwcfm_fast.method.callbacks import Callback
from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.networks.lora import load_lora, lora_state
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.settings import Finetune

NAME = "after, with τ = 0"


def is_idle(s: Finetune) -> bool:
    """Whether there is nothing to report: the method rests at τ = 0, has no τ, or the run has τ = 0 itself."""
    method = METHODS.get(s.method)
    return method.rests or method.signal != "weight" or s.weights == "linear" or s.tau == 0


@contextmanager
def trained_at_rest(trainer: Trainer, *callbacks: Callback) -> Iterator[Policy]:
    """Inside, the trainer's policy is what its settings make of the reference at τ = 0; afterwards it is as before.

    α is the one in force. No reward is called, for none has a say.
    """
    s, policy = trainer.settings, trainer.policy
    state = lora_state(policy.network) if s.lora else policy.network.state_dict()
    trained = {key: value.clone() if s.shard else value.to("cpu", copy=True) for key, value in state.items()}
    still = copy.copy(trainer)
    still.callbacks, still.tau, still.holdout = list(callbacks), 0.0, None
    still.reward = make_reward(_nothing, name="none")
    still.reward.sizes = trainer.sizes
    still.reset()
    try:
        for _ in still.train(s.rounds):
            pass
        yield policy
    finally:
        if s.lora:
            load_lora(policy.network, trained, "the run")
        else:
            policy.network.load_state_dict(trained)


def _nothing(samples: Tensor) -> Tensor:
    return torch.zeros(len(samples), device=samples.device)
