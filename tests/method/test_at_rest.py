"""At τ = 0 nothing moves over eight rounds: on digits, with adapters, in bf16, under guidance, on two ranks."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))
from many_ranks import base

from orwcfm_fast.runs.build import build_trainer
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Finetune

CPU = torch.device("cpu")
RESTING = ["orw-centred", "adrpo", "ram", "nft", "awm"]
SMALL = dict(
    rounds=8,
    rollout=16,
    batch=8,
    steps_per_round=3,
    probe=8,
    chunk=16,
    nfe=4,
    warmup=0,
    lr=1e-2,
    tau=0.0,
    kl=0.1,
)


def weights(policy):
    return [p.detach().clone() for p in policy.network.parameters()]


def rest(policy, **settings):
    """Train with nothing to learn; whether all weights, and what is drawn, stayed as they were."""
    s = Finetune(**SMALL | settings)
    trainer = build_trainer(policy, lambda x: x.flatten(1).mean(1), s)
    before = weights(policy)
    records = [*trainer.train(s.rounds)]
    assert len(records) == 8
    assert max(record["w2_coupled"] for record in records) <= 0.01
    same = [torch.equal(one, two) for one, two in zip(before, weights(policy), strict=True)]
    assert all(same), f"{same.count(False)} of {len(same)} tensors moved"


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "lora"), [("fp32", 0), ("bf16", 0), ("fp32", 4)])
@pytest.mark.parametrize("method", RESTING)
def test_on_digits(method, lora, precision, digits_model):
    policy = Loader(CPU, precision).default().policy.trainable_copy()
    rest(policy, method=method, lora=lora)


@pytest.mark.parametrize("method", RESTING)
def test_on_a_guided_pipeline(method, pipeline_folder, prompts_file):
    asked = dict(prompts=str(prompts_file), prompt_tokens=6, image_size=16, guidance=4.0)
    how = Finetune(**SMALL | asked)
    policy = Loader(CPU, "fp32", how=how).load(f"diffusers:{pipeline_folder('sd3')}").policy
    small = dict(rollout=8, batch=4, probe=4, steps_per_round=2, solver="euler", grid="own", nfe=3, chunk=4)
    rest(policy, method=method, lora=4, **asked | small)


@pytest.mark.parametrize("method", RESTING)
def test_on_two_ranks(method, launch, run_cli):
    base(run_cli, steps=20)
    settings = dict(
        rollout=16, chunk=8, batch=6, steps_per_round=3, nfe=4, probe=6, tau=0.0, rounds=8, kl=0.1
    )
    start = torch.cat([p.flatten() for p in weights(Loader(CPU, "fp32").load("base").policy)])
    for rank in launch.loop(2, method=method, **settings):
        assert len(rank["records"]) == 8 and torch.equal(rank["parameters"], start)
