"""Ranks save, resume, fail and stop as one."""

import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from orwcfm_fast.distributed import ProcessGroup
from orwcfm_fast.errors import UserError

sys.path.append(str(Path(__file__).parents[1]))
from kill_resume import difference
from many_ranks import LOOP, base, records


def test_saved_on_four_ranks_resumed_on_one_two_and_four(launch, run_cli):
    base(run_cli)
    assert not any(launch(4, *LOOP, "whole").codes)
    cut = launch(4, *LOOP, "cut", act="signal")  # on one rank, in the middle of round 2
    assert cut.codes == [130, 143, 130, 130]
    assert "".join(cut.err) == (
        "error: interrupted in round 2, saved at cut/checkpoints/step_6; orwcfm finetune --resume cut\n"
    )
    for world in (1, 2, 4):
        shutil.copytree("cut", f"on{world}")
        ended = launch(world, "finetune", "--resume", f"on{world}", "--quiet")
        assert not any(ended.codes), ended.err
        assert "".join(ended.out) == f"run on{world}\n"
        for mine, theirs in zip(records("whole"), records(f"on{world}"), strict=True):
            assert mine.keys() == theirs.keys()
            for key in (
                "reward_mean",
                "loss_fm",
                "loss_w2",
                "ess",
                "w2_coupled",
                "velocity_gap",
                "diversity",
            ):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-3)
    assert difference(Path("whole"), Path("on4")) == ""
    assert "partial_round.safetensors" in {p.name for p in Path("cut/checkpoints/step_6").iterdir()}


def test_memory_that_runs_out_on_one_rank_is_known_to_all(launch, run_cli):
    base(run_cli)
    assert not any(launch(3, *LOOP, "run", act="out of memory").codes)
    found = records("run")
    assert any("micro-batch of 3" in text for text in found[0]["guard"])
    assert [r["micro_batch"] for r in found] == [3, 3, 3]


FAILS = """
import os
calls = []
def f(x):
    calls.append(1)
    if os.environ["RANK"] == "2" and len(calls) == {call}:
        raise ValueError("boom")
    return x[:, 0]
"""
ON_2 = "error: rank 2: reward bad.py:f, round {round}: ValueError: boom (bad.py:7)"


def test_what_fails_on_one_rank_ends_all_with_one_line(launch, run_cli):
    base(run_cli)
    Path("bad.py").write_text(FAILS.format(call=1))
    failed = launch(4, *LOOP, "bad", "--reward", "bad.py:f")
    assert failed.codes == [1] * 4 and "".join(failed.err) == ON_2.format(round=1) + "\n"
    assert not Path("bad").exists(), "a run that came to nothing leaves nothing"
    Path("bad.py").write_text(FAILS.format(call=2))
    failed = launch(4, *LOOP, "bad", "--reward", "bad.py:f")
    saved = "; the run is saved at bad/checkpoints/step_4\n"
    assert failed.codes == [1] * 4 and "".join(failed.err) == ON_2.format(round=2) + saved
    failed = launch(2, *LOOP, "bug", act="bug")
    assert (
        failed.codes == [1, 1]
        and "".join(failed.err) == "error: RuntimeError: lost (--debug shows the traceback)\n"
    )


def test_ranks_that_disagree_say_so_once(launch, run_cli):
    base(run_cli)
    for act, words in (
        ("other packages", "torch is "),
        ("other settings", "alpha is 1.0 on rank 0 and 3.0 on rank 1"),
    ):
        refused = launch(3, *LOOP, "run", act=act)
        error = "".join(refused.err)
        assert refused.codes == [2, 2, 2] and error.count("\n") == 1
        assert error.startswith(f"error: the ranks disagree: {words}")
        assert not Path("run").exists()


def test_a_killed_rank_is_lost_to_the_others_and_the_same_command_goes_on(launch, run_cli):
    base(run_cli)
    assert not any(launch(2, *LOOP, "whole").codes)
    killed = launch(2, *LOOP, "cut", act="kill")  # in the middle of round 2
    assert killed.codes == [1, -9]
    assert (
        killed.err[0] == "error: lost another rank, which ended or cannot be reached; torchrun says which\n"
    )
    assert not any(launch(2, *LOOP, "cut").codes)
    assert difference(Path("whole"), Path("cut")) == ""
    other = launch(2, *LOOP, "cut", "--alpha", 3)
    assert other.codes == [2, 2]
    assert "".join(other.err) == "error: --out cut: holds a run with --alpha 1.0, not 3.0; choose another\n"


def test_a_run_from_before_a_setting_existed_is_continued_by_the_same_command(launch, run_cli):
    """As it was: with uniform times."""
    base(run_cli)
    uniform = (*LOOP, "whole", "--times", "uniform")
    assert not any(launch(2, *uniform).codes)
    cut = launch(2, *LOOP, "cut", "--times", "uniform", act="signal")
    assert cut.codes == [130, 143]
    config = Path("cut/config.toml")
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith(("times", "lora_targets"))))
    assert not any(launch(2, *LOOP, "cut").codes)
    kept = ("reward_mean", "loss_fm", "grad_norm_max")
    whole, gone_on = ([[r[key] for key in kept] for r in records(run)] for run in ("whole", "cut"))
    assert whole == gone_on


def test_a_rank_that_hangs_is_missed_and_the_same_command_goes_on(launch, run_cli):
    """Its sockets stay open, so that gloo and NCCL would wait for it."""
    base(run_cli)
    assert not any(launch(2, *LOOP, "whole").codes)
    hung = launch(2, *LOOP, "cut", act="hang")
    assert hung.codes[0] == 1
    assert hung.err[0].startswith(
        "error: no sign of life of rank 1, or of the host where all ranks meet, for 2 s"
    )
    assert hung.err[0].count("\n") == 1
    assert not any(launch(2, *LOOP, "cut").codes)
    assert difference(Path("whole"), Path("cut")) == ""


def test_tasks_that_see_one_gpu_each_take_it_and_two_of_one_gpu_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    seen = SimpleNamespace(uuid="GPU-b")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: seen)
    ranks = ProcessGroup(1, 2)
    host = socket.gethostname()
    for other in ((host, "GPU-a", 1), ("elsewhere", "GPU-b", 1), ("elsewhere", "GPU-c", 8)):
        monkeypatch.setattr(ranks, "all", lambda own, first=other: [first, own])
        assert ranks.device(torch.device("cuda")) == torch.device("cuda", 0)
    monkeypatch.setattr(ranks, "all", lambda own: [(host, "GPU-b", 1), own])
    with pytest.raises(UserError, match="has 1 GPUs"):
        ranks.device(torch.device("cuda"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((*LOOP, "run", "--overwrite"), "--overwrite: a restart by torchrun would replace the trained run"),
        (LOOP[:-1], "--max-restarts: name the run with --out DIR"),
        ((*LOOP, "run", "--probe", 2), "--probe 2: is less than a sample for each of 3 ranks"),
        (("sweep", "--rounds", 1), "sweep: works in one process; torchrun is for finetune"),
        ((*LOOP, "run", "--alhpa", 3), "No such option"),
    ],
)
def test_what_ranks_cannot_do_is_refused_in_one_line(launch, run_cli, args, words):
    if "--probe" in args:
        base(run_cli, steps=2)
    refused = launch(3, *args, TORCHELASTIC_MAX_RESTARTS="2")
    error = "".join(refused.err)
    assert refused.codes == [2, 2, 2] and words in error and error.count("\n") == 1, error
    assert not Path("run").exists()
