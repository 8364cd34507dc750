"""Replicated and in shards, on digits and on a tiny FLUX, many processes do what one does."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))
from many_ranks import base

from orwcfm_fast.networks.policy import make_policy
from orwcfm_fast.planning.network import make_plan
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.settings import Finetune

COMMON = dict(
    rollout=24,
    chunk=6,
    batch=10,
    steps_per_round=3,
    rounds=3,
    probe=6,
    lr=3e-3,
    warmup=0,
    weights="advantage",
)
DIGITS = COMMON | dict(nfe=6)
FLUX = COMMON | dict(image_size=8, prompt_tokens=6, solver="euler", grid="own", nfe=3, vae_chunk=8)


@pytest.fixture
def settings(run_cli, pipeline_folder, prompts_file):
    """settings("digits" or "flux"): of a short loop."""

    def of(model: str) -> dict:
        if model == "flux":
            return FLUX | {"model": f"diffusers:{pipeline_folder('flux')}", "prompts": str(prompts_file)}
        base(run_cli, "digits", 20)
        return DIGITS

    return of


def same(one: dict, many: list[dict]) -> None:
    """Noise and minibatches exactly, the first gradient to 1e-5 of its largest value, samples to 1e-3."""
    for key in ("x0", "drawn", "index"):
        for k, whole in enumerate(one[key]):
            assert torch.equal(torch.cat([rank[key][k] for rank in many]), whole), (key, k)
    whole = one["gradient"][0]
    for rank in many:
        assert (rank["gradient"][0] - whole).abs().max() <= 1e-5 * whole.abs().max()
        assert (rank["samples"] - one["samples"]).abs().max() <= 1e-3
        assert torch.equal(rank["samples"], many[0]["samples"])


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize(
    ("model", "lora"),
    [
        pytest.param("digits", 0, id="digits-all weights"),
        pytest.param("flux", 2, id="flux-adapters"),
        pytest.param("digits", 2, id="digits-adapters", marks=pytest.mark.soak),
        pytest.param("flux", 0, id="flux-all weights", marks=pytest.mark.soak),
    ],
)
def test_ranks_train_as_one_does(launch, settings, model, lora, shard):
    s = settings(model) | {"lora": lora}
    (one,) = launch.loop(1, **s)
    assert (one["samples"] - launch.loop(1, **s | {"lr": 1e-9})[0]["samples"]).abs().max() > 4e-3
    for world in (2, 4):
        same(one, launch.loop(world, **s | {"shard": shard}))
        same(
            one, launch.loop(world, **s | {"shard": shard, "micro_batch": 2})
        )  # of 3 and 2 samples: 2 parts and 1


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 8], ids=["all weights", "adapters"])
def test_shards_take_their_part_of_the_memory_as_planned(launch, settings, lora):
    s = settings("digits") | {"lora": lora, "rounds": 1}
    (one,) = launch.loop(1, **s)
    policy = make_policy("unet-digits", "digits", (1, 8, 8), torch.device("cpu"), "fp32")
    for world in (2, 4):
        largest = max(max(rank["held_bytes"]) for rank in launch.loop(world, **s | {"shard": True}))
        assert largest <= 1.1 * max(one["held_bytes"]) / world
        reward = make_reward(lambda x: x.flatten(1).mean(1))
        plan = make_plan(policy.trainable_copy(), reward, Finetune(**s, shard=True), ranks=world)
        planned = plan.held["weights"] + plan.held["optimizer"] + plan.step["gradients"]
        assert planned == pytest.approx(largest, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
def test_a_rank_without_samples_takes_part_in_every_exchange(launch, settings, shard):
    s = settings("flux") | {"batch": 3}
    same(launch.loop(1, **s)[0], launch.loop(4, **s | {"shard": shard}))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nft", "awm"])
def test_a_rank_without_samples_averages_its_shard_as_all_do(launch, settings, method):
    """Of three samples a step the fourth rank has none, and a quarter of the average of past policies."""
    s = settings("digits") | {"batch": 3, "method": method}
    same(launch.loop(1, **s)[0], launch.loop(4, **s | {"shard": True}))


def test_buckets_are_exchanged_while_the_backward_pass_goes_on_and_in_its_last_part_alone(launch, settings):
    for rank in launch.loop(2, "noting exchanges", **settings("digits") | {"rounds": 1, "micro_batch": 2}):
        assert len(rank["events"]) == 3
        for step in rank["events"]:
            *early, last, after = step.split("|")
            assert len(early) == 2 and all(set(part) == {"g"} for part in early) and not after
            assert last.count("b") == 2 and "g" in last[last.index("b") :]
