"""Transport plans are solved beside the steps, once each, and are those of their minibatches."""

import threading

import pytest
import torch

from orwcfm_fast.distributed import SINGLE_PROCESS
from orwcfm_fast.errors import UserError
from orwcfm_fast.method import minibatches, noise
from orwcfm_fast.method.coupling import couple
from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.method.plans import AHEAD
from orwcfm_fast.method.rollout import Rollout
from orwcfm_fast.settings import Finetune

S = Finetune(method="orw", coupling="ot", rollout=32, batch=8, steps_per_round=6)
SEED, ONE = torch.tensor(3), torch.ones(())


def batches_of(signal):
    x1 = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    rollout = Rollout(x1, torch.arange(32), signal)
    return minibatches.Minibatches(rollout, signal, 0.5, 2, METHODS.get("orw"), S, SEED, SINGLE_PROCESS, ONE)


def test_each_minibatch_has_the_plan_of_its_own_samples_solved_once_ahead_of_its_step(monkeypatch):
    solved = []

    def noted(*args, solve=minibatches.weighted_plan_draw):
        solved.append(threading.current_thread() is threading.main_thread())
        return solve(*args)

    monkeypatch.setattr(minibatches, "weighted_plan_draw", noted)
    batches = batches_of(torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1)
    found = [batches[0]]
    assert [*batches.pairs.found] == [*range(AHEAD + 1)]
    found += [batches[k] for k in range(1, 6)]
    for k, batch in enumerate([*found, *batches]):
        k %= 6
        pick = batches.order[8 * k : 8 * (k + 1)]
        index = noise.indices((2 * 6 + k) * 8, 8, "cpu")
        expected = couple(batches.rollout.x1[pick], batches.signal[pick], 0.5, SEED, index, "ot")
        for name in ("x1", "w", "a", "x_t"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), (k, name)
    assert solved == [False] * 6


def test_an_error_of_the_thread_is_the_loops():
    with pytest.raises(UserError, match="positive"):
        batches_of(torch.zeros(32))[0]
