"""--log: the metrics of metrics.jsonl, under the same names, in TensorBoard's and wandb's own files."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from orwcfm_fast.errors import UserError
from orwcfm_fast.reporting import tracking
from orwcfm_fast.reporting.tracking import TensorBoard, _wandb_id, check_loggers

SMALL = ("--rounds", 2, "--rollout", 32, "--batch", 16, "--steps-per-round", 2, "--eval-n", 32, "--probe", 8)


BLOCK = 32768


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_holds_every_metric_of_every_round(run_cli, tiny_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = run_cli("finetune", "--checkpoint", "base", "--log", "tensorboard", "--out", "t", *SMALL)
    assert made.code == 0, made.err
    found = EventAccumulator("t/tensorboard").Reload()
    written = records(Path("t"))
    numbers = {key for key, value in written[0].items() if isinstance(value, int | float)}
    assert len(numbers) > 15 and set(found.Tags()["scalars"]) == numbers
    for key in numbers:
        points = [(e.step, e.value) for e in found.Scalars(key)]
        assert points == [(r["round"], pytest.approx(r[key], rel=1e-6)) for r in written]


def log_records(file: Path) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format, after wandb's 7 bytes of its own."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline_holds_every_metric_of_every_round(run_cli, tiny_run, monkeypatch):
    """A real wandb session without network, read back from its own file."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    made = run_cli("finetune", "--checkpoint", "base", "--out", "w", "--log", "wandb:dogs", *SMALL)
    assert made.code == 0 and wandb.run is None, made.err
    wandb.teardown()
    (file,) = Path("w/wandb").glob("offline-run-*/*.wandb")
    history, projects = [], set()
    for data in log_records(file):
        record = Record.FromString(data)
        projects |= {record.run.project}
        if record.HasField("history"):
            items = {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            history.append({k: v for k, v in items.items() if not k.startswith("_")})
    assert projects == {"", "dogs"} and history == records(Path("w"))


def test_tensorboard_forgets_rounds_that_were_rolled_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for rounds in ((1, 2, 3, 2), (2, 3)):  # a rollback within a process, and a resumed one
        board = TensorBoard(tmp_path)
        for number in rounds:
            board.log({"round": number, "reward_mean": number + 0.5 * len(rounds)})
        board.close()
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("reward_mean")
    assert [(e.step, e.value) for e in found] == [(1, 3.0), (2, 3.0), (3, 4.0)]


def test_a_resumed_run_is_the_same_run_at_wandb(tmp_path):
    first = _wandb_id(tmp_path)
    (tmp_path / "other").mkdir()
    assert _wandb_id(tmp_path) == first and len(first) == 16 and _wandb_id(tmp_path / "other") != first


@pytest.mark.parametrize("name", ["tensorbord", "tensorboard:x", "wandb:"])
def test_an_unknown_logger_is_one_line(run_cli, name):
    result = run_cli("finetune", "--log", name)
    assert result.code == 2 and "should be tensorboard, wandb or wandb:PROJECT" in result.err
    assert not Path("runs").exists()


def test_a_logger_that_is_not_installed_is_said_before_any_work(monkeypatch):
    monkeypatch.setitem(tracking.PACKAGES, "wandb", "a_package_that_nobody_has")
    with pytest.raises(
        UserError, match=r"--log wandb: wandb is not installed; pip install 'orwcfm-fast\[wandb\]'"
    ):
        check_loggers(["wandb"])
