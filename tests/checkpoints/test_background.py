"""Checkpoints of whole rounds are written in a thread while training goes on."""

import errno
import json
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from orwcfm_fast.checkpoints import checkpoint, retention
from orwcfm_fast.checkpoints.background import BackgroundWriter
from orwcfm_fast.control.controller import RunController
from orwcfm_fast.method.trainer import Trainer
from orwcfm_fast.runs.checkpointing import CheckpointManager

SIZES = "--rollout 32 --batch 16 --steps-per-round 2 --eval-n 16 --probe 8 --keep 9 --rounds 3"
RUN = ("finetune", "--checkpoint", "base", *SIZES.split(), "--quiet", "--out")


@pytest.fixture
def write(monkeypatch):
    """write.before(path): called in the thread before each file of a checkpoint in `checkpoints/` is written."""
    original = checkpoint._write

    class Hook:
        @staticmethod
        def before(path):
            pass

    def hooked(path, parts):
        if path.parent.name.startswith(".step_"):
            Hook.before(path)
        return original(path, parts)

    monkeypatch.setattr(checkpoint, "_write", hooked)
    return Hook


def around_rounds(monkeypatch, before=lambda number: None, after=lambda number: None):
    """Call these before and after the so-manyth round."""
    original = Trainer.one_round

    def one_round(trainer):
        number = trainer.round + 1
        before(number)
        record = original(trainer)
        after(number)
        return record

    monkeypatch.setattr(Trainer, "one_round", one_round)


def test_a_round_is_trained_while_the_checkpoint_of_the_one_before_is_written(
    run_cli, tiny_run, monkeypatch, write
):
    assert run_cli(*RUN, "undisturbed").code == 0
    trained, waited = threading.Event(), []
    around_rounds(monkeypatch, after=lambda number: number == 2 and trained.set())
    write.before = lambda path: waited.append(trained.wait(60))
    assert run_cli(*RUN, "o").code == 0
    assert all(waited), "round 2 was not trained before the checkpoint of round 1 was written"
    for step in ("step_2", "step_4", "step_6"):
        for name in ("model", "optimizer"):
            a, b = (Path(run, "checkpoints", step, f"{name}.safetensors") for run in ("undisturbed", "o"))
            assert a.read_bytes() == b.read_bytes(), f"{step} holds what was trained after it"


def test_what_is_said_while_a_checkpoint_is_written_is_not_in_it(run_cli, tiny_run, monkeypatch, write):
    said = threading.Event()
    monkeypatch.setattr(RunController, "on_rollout", lambda self, *more: self.note("later"))
    around_rounds(monkeypatch, after=lambda number: number == 2 and said.set())
    write.before = lambda path: said.wait(60)
    assert run_cli(*RUN, "o").code == 0
    assert said.is_set() and "later" not in checkpoint.load("o/checkpoints/step_2").state["notes"]


def test_a_checkpoint_goes_where_the_run_is_whatever_a_reward_does_meanwhile(
    run_cli, tiny_run, monkeypatch, write
):
    """The working directory and the module path belong to the process, and a reward may change them."""
    away, back = threading.Event(), threading.Event()

    def reward(x):
        away.set()
        os.chdir("/")
        path, sys.path[:] = sys.path[:], []
        back.wait(0.3)
        sys.path[:] = path
        return x[:, 0]

    module = types.ModuleType("of_the_test")
    module.reward = reward
    monkeypatch.setitem(sys.modules, "of_the_test", module)
    checkpoint.versions.cache_clear()
    first = []
    write.before = lambda path: first.append(path) or (len(first) == 1 and away.clear()) or away.wait(1)
    assert run_cli(*RUN, "o", "--reward", "of_the_test:reward").code == 0
    assert [path.name for path in retention.steps(Path("o/checkpoints"))] == ["step_6", "step_4", "step_2"]


def test_a_failed_write_is_raised_in_the_next_round_and_a_later_checkpoint_still_saves(
    run_cli, tiny_run, monkeypatch, write
):
    full_for = [1]  # writes

    def full(path):
        if full_for and full_for.pop():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    write.before = full
    failed = run_cli(*RUN, "o", "--save-every", 2, "--rounds", 9)
    assert failed.code == 1 and "No space left on device" in failed.err
    assert len(Path("o/metrics.jsonl").read_text().splitlines()) <= 4, "it went on for long"

    def interrupt(number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(
        CheckpointManager, "check", lambda self: None
    )  # seen only when the next one is written
    around_rounds(monkeypatch, before=interrupt)
    assert run_cli(*RUN, "p", "--save-every", 2, "--rounds", 9).code == 130
    assert checkpoint.load(retention.steps(Path("p/checkpoints"))[0]).state["round"] >= 2


def test_an_interruption_waits_for_the_checkpoint_that_is_being_written(
    run_cli, tiny_run, monkeypatch, write
):
    interrupted = threading.Event()

    def interrupt(number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            interrupted.set()

    def slow(path):
        interrupted.wait(60)
        time.sleep(0.1)

    around_rounds(monkeypatch, before=interrupt)
    write.before = slow
    assert run_cli(*RUN, "o").code == 130
    assert checkpoint.load("o/checkpoints/step_2").state["round"] == 1
    assert not list(Path("o/checkpoints").glob(".*"))


def test_the_time_that_a_checkpoint_takes_from_training_is_recorded(run_cli, tiny_run):
    done = run_cli(*(value for value in RUN if value != "--quiet"), "o")
    assert "checkpoint" in next(line for line in done.out.splitlines() if line.startswith("time:"))
    first, second, _ = (json.loads(line) for line in Path("o/metrics.jsonl").read_text().splitlines())
    assert first["seconds_checkpoint"] == 0 < second["seconds_checkpoint"]


def test_what_a_write_raises_comes_out_once():
    writer = BackgroundWriter()

    def full():
        raise OSError("no room")

    writer.start(full)
    with pytest.raises(OSError, match="no room"):
        writer.start(lambda: None)
    writer.wait()
