"""No room, or the directory taken away: one clear line, and every earlier checkpoint whole."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orwcfm_fast.checkpoints import checkpoint, retention

SMALL = ("--rollout", 32, "--batch", 16, "--steps-per-round", 2, "--eval-n", 16, "--probe", 8, "--quiet")


class Breaker:
    """Lets `count` writing calls through, and breaks the next, as a full disk does."""

    def __init__(self, monkeypatch, count: int) -> None:
        self.left = count
        for owner, name in (
            (os, "fsync"),
            (Path, "mkdir"),
            (Path, "open"),
            (Path, "rename"),
            (Path, "symlink_to"),
        ):
            self.wrap(monkeypatch, owner, name)

    def wrap(self, monkeypatch, owner, name: str) -> None:
        original = getattr(owner, name)

        def may_break(*args, **more):
            if name == "open" and not any(str(a).startswith("w") for a in args[1:2]):
                return original(*args, **more)
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **more)

        monkeypatch.setattr(owner, name, may_break)


def test_a_failing_write_at_each_write_of_a_checkpoint_loses_no_earlier_one(tmp_path, monkeypatch):
    """Every open, flush, rename and link of a save and of the pruning after it, in turn."""
    tensors = {
        "model": {"a": torch.ones(8)},
        "optimizer": {"b": torch.ones(8)},
        "begun": {"c": torch.ones(2)},
    }
    for step in (1, 2):
        checkpoint.save(tmp_path / f"step_{step}", {"step": step}, **tensors)
    broke = 0
    while True:
        with monkeypatch.context() as patch:
            breaker = Breaker(patch, broke)
            try:
                checkpoint.save(tmp_path / "step_3", {"step": 3}, **tensors)
                retention.prune(tmp_path, 2, tmp_path / "step_2")
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                break
        assert breaker.left == -1
        whole = [int(p.name[5:]) for p in retention.steps(tmp_path)]
        assert whole in ([2, 1], [3, 2, 1]), f"after write {broke}"
        assert [checkpoint.load(tmp_path / f"step_{n}").state["step"] for n in whole] == whole
        assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part") and p.is_dir()]
        shutil.rmtree(tmp_path / "step_3", ignore_errors=True)
        broke += 1
    assert broke >= 15, "four files, opened and flushed, two folders, renames, a link"
    assert {p.name for p in tmp_path.iterdir()} == {"best", "step_2", "step_3"}


@pytest.fixture(params=["tmpfs", "file size limit"])
def full_disk(request, tmp_path, tiny_run):
    """A folder, and two functions: make its room end after about two checkpoints; give room."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "tmpfs":
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"the system refuses to mount: {mounted.stderr.decode().strip()}")

        def room(megabytes: float) -> None:
            # what is written already stays; the rest shrinks to less than a checkpoint
            subprocess.run(["mount", "-o", f"remount,size={int(megabytes * 2**20)}", folder], check=True)

        def fill() -> None:
            used = os.statvfs(folder)
            room((used.f_blocks - used.f_bfree) * used.f_frsize / 2**20 + 0.3)

        yield folder, fill, lambda: room(16)
        subprocess.run(["umount", folder], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield (
            folder,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard)),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="mounts and limits are Linux's")
def test_a_full_disk_stops_a_run_with_one_line_and_room_lets_it_go_on(run_cli, tiny_run, full_disk):
    folder, fill, free = full_disk
    run = folder / "run"
    args = ("finetune", "--checkpoint", "base", *SMALL, "--rounds")
    assert run_cli(*args, 4, "--out", "whole").code == 0
    assert run_cli(*args, 2, "--out", run).code == 0
    fill()
    failed = run_cli("finetune", "--resume", run, "--rounds", 4, "--quiet")
    assert failed.code == 1 and failed.err.count("\n") == 1, failed.err
    assert "No space left on device" in failed.err or "File too large" in failed.err
    assert f"orwcfm finetune --resume {run}" in failed.err
    for path in retention.steps(run / "checkpoints"):
        checkpoint.load(path)
    assert (run / "checkpoints" / "step_4").exists()
    free()
    assert run_cli("finetune", "--resume", run, "--rounds", 4, "--quiet").code == 0
    for name in ("model", "optimizer"):
        a, b = (path / f"checkpoints/step_8/{name}.safetensors" for path in (Path("whole"), run))
        assert a.read_bytes() == b.read_bytes()
    assert not list((run / "checkpoints").glob(".*"))


GONE = "import shutil\ncalls = 0\ndef f(x):\n    global calls\n    calls += 1\n"
GONE += "    if calls > 1: shutil.rmtree(shutil.move('o', 'taken'), ignore_errors=True)\n    return x[:, 0]\n"


def test_a_directory_that_is_taken_away_stops_the_run_and_is_not_made_again(run_cli, tiny_run):
    Path("gone.py").write_text(GONE)
    args = ("finetune", "--checkpoint", "base", *SMALL, "--rounds", 3, "--out", "o", "--reward", "gone.py:f")
    failed = run_cli(*args)
    assert failed.code == 1 and failed.err.count("\n") == 1
    # whichever is written next, the round's record or the checkpoint of the round before
    assert re.search(r" o/\S+: No such file or directory; no checkpoint is left", failed.err), failed.err
    assert not Path("o").exists()


def test_a_pretraining_without_room_is_one_line_too(run_cli, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "_write", full)
    failed = run_cli("pretrain", "--data", "moons", "--steps", 2, "--batch", 8, "--out", "p", "--quiet")
    assert failed.code == 1 and failed.err.count("\n") == 1
    assert "No space left on device; no checkpoint is left" in failed.err
