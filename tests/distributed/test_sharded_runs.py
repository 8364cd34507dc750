"""Runs whose weights lie in shards: saved and resumed on any number of ranks, killed, short of memory."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from kill_resume import difference
from many_ranks import LOOP, SMALL, base, records

FIGURES = ("reward_mean", "loss_fm", "loss_w2", "ess", "w2_coupled", "velocity_gap", "diversity")


def near(one: str, other: str) -> None:
    for mine, theirs in zip(records(one), records(other), strict=True):
        for key in FIGURES:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-3), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [(), ("--lora", 4), ("--method", "nft", "--micro-batch", 2)],
    ids=["all weights", "adapters", "averages"],
)
def test_saved_in_shards_on_four_ranks_resumed_whole_on_one_and_back(launch, run_cli, more):
    base(run_cli)
    assert not any(launch(1, *LOOP, "whole", *more).codes)
    cut = launch(4, *LOOP, "cut", *more, "--shard", act="signal")  # in the middle of round 2
    assert cut.codes == [130, 143, 130, 130], cut.err
    for world, how in ((1, "--no-shard"), (2, "--shard"), (4, "--shard"), (4, "--no-shard")):
        out = f"on{world}{how}"
        shutil.copytree("cut", out)
        ended = launch(world, "finetune", "--resume", out, how, "--quiet")
        assert not any(ended.codes), ended.err
        near("whole", out)
    assert not any(launch(4, *LOOP, "sharded", *more, "--shard").codes)
    assert difference(Path("sharded"), Path("on4--shard")) == ""
    launch(1, *LOOP, "other", *more, act="signal of the first")
    ended = launch(4, "finetune", "--resume", "other", "--shard", "--quiet")
    assert not any(ended.codes), ended.err
    near("whole", "other")


@pytest.mark.slow
def test_a_killed_rank_of_a_sharded_run_is_lost_to_the_others_and_the_same_command_goes_on(launch, run_cli):
    base(run_cli)
    assert not any(launch(2, *LOOP, "whole", "--shard").codes)
    killed = launch(2, *LOOP, "cut", "--shard", act="kill")  # in the middle of round 2
    assert killed.codes == [1, -9]
    assert (
        killed.err[0] == "error: lost another rank, which ended or cannot be reached; torchrun says which\n"
    )
    assert not any(launch(2, *LOOP, "cut", "--shard").codes)
    assert difference(Path("whole"), Path("cut")) == ""


def test_memory_that_runs_out_where_ranks_share_a_call_ends_the_run_with_one_line(launch, run_cli):
    base(run_cli)
    ended = launch(3, *LOOP, "run", "--shard", act="out of memory")
    error = "".join(ended.err)
    assert ended.codes == [1, 1, 1] and error.count("\n") == 1, error
    assert "out of memory with --shard; lower --micro-batch (it is 6)" in error


@pytest.mark.slow
def test_a_run_in_bfloat16_ends_in_shards_as_on_one_rank(launch, run_cli):
    base(run_cli)
    for world, out, how in ((1, "one", ()), (2, "sharded", ("--shard",)), (2, "replicated", ())):
        ended = launch(world, *LOOP, out, "--precision", "bf16", *how)
        assert not any(ended.codes), ended.err
        for mine, theirs in zip(records("one"), records(out), strict=True):
            for key in ("reward_mean", "loss_fm", "w2_coupled"):
                assert mine[key] == pytest.approx(theirs[key], rel=0.02), key


def test_one_process_has_nothing_to_shard(launch, run_cli):
    base(run_cli, steps=2)
    refused = launch(1, *LOOP, "run", "--shard")
    assert refused.codes == [2] and not Path("run").exists()
    assert "".join(refused.err) == (
        "error: --shard: spreads a model over several ranks, and there is one; start them by torchrun, or add "
        "--no-shard\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="all weights", marks=pytest.mark.soak),
        pytest.param(("--lora", 2, "--gradient-checkpointing"), id="adapters"),
    ],
)
def test_a_pipeline_in_bfloat16_trains_in_shards_as_replicated(
    launch, run_cli, pipeline_folder, prompts_file, more
):
    model = (
        "--model",
        f"diffusers:{pipeline_folder('flux')}",
        "--prompts",
        prompts_file,
        "--reward",
        "red.py:f",
    )
    sizes = ("--image-size", 8, "--prompt-tokens", 6, "--solver", "euler", "--grid", "own", "--nfe", 3)
    loop = (*SMALL, "--probe", 6, "--rounds", 2, "--precision", "bf16", "--weights", "advantage", "--quiet")
    Path("red.py").write_text("def f(x):\n    return x[:, 0].flatten(1).mean(1)\n")
    for out, how in (("replicated", ()), ("sharded", ("--shard",))):
        ended = launch(2, "finetune", *model, *loop, *sizes, *more, *how, "--out", out)
        assert not any(ended.codes), ended.err
    for mine, theirs in zip(records("replicated"), records("sharded"), strict=True):
        for key in ("reward_mean", "loss_fm", "grad_norm_mean", "ess"):
            assert mine[key] == pytest.approx(theirs[key], rel=0.05), key
