"""Only one process at a time works in a run directory."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orwcfm_fast.errors import UserError
from orwcfm_fast.runs.lock import RunLock

HOLD = "import sys, time; from pathlib import Path; from orwcfm_fast.runs.lock import RunLock;"
HOLD += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); {then}; time.sleep(60)"


def holder(folder: Path, then: str = "0") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then=then), folder], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_into_one_directory_is_refused_by_name(run_cli, tiny_run):
    process = holder(tiny_run)
    before = {p: p.read_bytes() for p in tiny_run.rglob("*") if p.is_file()}
    try:
        for args in (
            ("finetune", "--resume", tiny_run, "--rounds", 3),
            ("finetune", "--checkpoint", "base", "--out", tiny_run, "--overwrite"),
        ):
            refused = run_cli(*args)
            assert refused.code == 2 and refused.err.count("\n") == 1, refused.err
            assert f"process {process.pid} (since" in refused.err and "is at work in it" in refused.err
        assert {p: p.read_bytes() for p in tiny_run.rglob("*") if p.is_file()} == before
    finally:
        process.kill()
        process.wait()


def test_a_second_pretraining_is_refused(run_cli):
    args = ("pretrain", "--data", "moons", "--steps", 2, "--batch", 8, "--quiet", "--out", "p")
    assert run_cli(*args).code == 0
    process = holder(Path("p"))
    try:
        assert "is at work" in run_cli("pretrain", "--resume", "p").err
    finally:
        process.kill()
        process.wait()


def test_a_killed_holders_lock_is_free(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(UserError, match="is at work"):
        RunLock(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert str(process.pid) in (tmp_path / ".lock").read_text(), "stale text is no lock"
    RunLock(tmp_path).release()


def test_a_worker_that_outlives_a_killed_holder_does_not_keep_its_lock(tmp_path):
    process = holder(tmp_path, "import os; os.write(1, b'%d\\n' % os.fork())")
    worker = max(int(process.stdout.readline()), int(process.stdout.readline()))
    process.kill()
    process.wait()
    try:
        os.kill(worker, 0)
        lock = RunLock(tmp_path)
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
        lock.release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_is_never_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        RunLock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "keep"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(handle, operation):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    RunLock(tmp_path).release()
    assert "has no locks" in capsys.readouterr().err


def test_a_finished_run_lets_go_in_the_same_process(run_cli, tiny_run):
    assert run_cli("finetune", "--resume", tiny_run, "--rounds", 3, "--quiet").code == 0
    RunLock(tiny_run).release()


def test_a_run_that_died_at_its_very_first_file_can_be_begun_again(run_cli, tiny_run):
    args = ("finetune", "--checkpoint", "base", "--rounds", 1, "--rollout", 32, "--eval-n", 16, "--quiet")
    Path("dead").mkdir()
    for name in (".lock", ".config.toml.part"):
        Path("dead", name).touch()
    begun = run_cli(*args, "--out", "dead")
    assert begun.code == 0, begun.err
