"""A run's checkpoints: the newest whole one is taken, the last few and the best are kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from orwcfm_fast.checkpoints import checkpoint, retention
from orwcfm_fast.errors import UserError

SMALL = ("--rollout", 32, "--batch", 16, "--steps-per-round", 2, "--eval-n", 16, "--probe", 8, "--quiet")


@pytest.fixture
def folder(tmp_path):
    for step in (3, 6, 9, 12):
        checkpoint.save(tmp_path / f"step_{step}", {"step": step}, model={"a": torch.full((4,), float(step))})
    return tmp_path


def damage(path: Path, how: str = "flip") -> None:
    file = path / "model.safetensors"
    if how == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif how == "gone":
        (path / "state.json").unlink()
    else:
        file.write_bytes(b"")


def test_a_kill_between_the_last_save_and_its_pruning_is_made_good(run_cli, tiny_run, monkeypatch):
    args = ("finetune", "--checkpoint", "base", *SMALL, "--keep", 1, "--best", "none", "--rounds")
    with monkeypatch.context() as patch:
        patch.setattr(retention, "prune", lambda *args: None)
        assert run_cli(*args, 3, "--out", "o").code == 0
    assert len(retention.steps(Path("o/checkpoints"))) == 3
    assert run_cli("finetune", "--resume", "o", "--quiet").code == 0
    assert [p.name for p in retention.steps(Path("o/checkpoints"))] == ["step_6"]


@pytest.mark.parametrize("how", ["flip", "gone", "empty"])
def test_a_damaged_newest_is_named_in_one_line_and_the_one_before_taken(folder, capsys, how):
    damage(folder / "step_12", how)
    found = retention.load_newest(folder)
    assert found.state["step"] == 9
    said = capsys.readouterr().err
    assert "step_12" in said and "taking step_9" in said and said.count("\n") == 1
    assert (folder / "step_12").exists(), "a reader changes nothing"


def test_damaged_ones_are_set_aside_only_by_who_goes_on(folder, capsys):
    for step in (9, 12):
        damage(folder / f"step_{step}")
    assert retention.load_newest(folder, set_aside=True).state["step"] == 6
    assert {p.name for p in folder.iterdir()} == {"step_3", "step_6", "step_9.damaged", "step_12.damaged"}
    assert "set aside" in capsys.readouterr().err


def test_no_whole_checkpoint_at_all_is_an_error_and_none_there_is_not(folder, tmp_path):
    for path in retention.steps(folder):
        damage(path)
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        retention.load_newest(folder)
    assert retention.load_newest(tmp_path / "nothing") is None


def test_the_newest_k_and_the_best_are_kept(folder):
    retention.prune(folder, 2, folder / "step_3")
    assert {p.name for p in folder.iterdir()} == {"best", "step_3", "step_9", "step_12"}
    assert checkpoint.load(folder / "best").state["step"] == 3
    retention.prune(folder, 1, folder / "step_9")
    assert {p.name for p in folder.iterdir()} == {"best", "step_9", "step_12"}


def test_what_an_interruption_wrote_goes_when_there_is_a_newer_one(folder):
    """Regular every 6 steps: 3 and 9 are of interruptions."""
    retention.prune(folder, 1, None, 6)
    assert {p.name for p in folder.iterdir()} == {"step_12"}
    checkpoint.save(folder / "step_15", {"step": 15}, model={"a": torch.zeros(1)})
    retention.prune(folder, 1, None, 6)
    assert {p.name for p in folder.iterdir()} == {"step_12", "step_15"}
    assert retention.load_newest(folder).state["step"] == 15
    assert retention.load_newest(folder, every=6).state["step"] == 12


def test_a_reward_is_that_of_the_policy_before_the_round_and_w2_of_the_one_after(folder):
    """Rounds of 3 steps. The rollout of round 3 came from the policy that round 2 left, at step 6."""
    reward, w2 = [0.1, 0.2, 0.9, 0.3], [0.5, 0.1, 0.2, 0.3]
    records = [{"round": n + 1, "reward_mean": reward[n], "w2_coupled": w2[n]} for n in range(4)]
    at = {m: retention.best_step(folder, records, m, lambda n: 3 * n) for m in ("reward_mean", "w2_coupled")}
    assert at["reward_mean"].name == "step_6" and at["w2_coupled"].name == "step_6"
    shutil.rmtree(folder / "step_6")
    assert retention.best_step(folder, records, "reward_mean", lambda n: 3 * n).name == "step_9"
    assert retention.best_step(folder, records[:1], "reward_mean", lambda n: 3 * n) is None


def test_a_run_keeps_its_best_and_says_so_after_a_resume_too(run_cli, tiny_run):
    """Reward falls when τ < 0, so that an early checkpoint stays the best."""
    args = ("--checkpoint", "base", *SMALL, "--tau", "-6", "--alpha", "0", "--lr", "0.01", "--warmup", "0")
    args += ("--reward", "coordinate", "--best", "reward_mean", "--keep", "1", "--out", "o")
    assert run_cli("finetune", *args, "--rounds", 4).code == 0
    assert run_cli("finetune", "--resume", "o", "--rounds", 6, "--quiet").code == 0
    records = [json.loads(line) for line in Path("o/metrics.jsonl").read_text().splitlines()]
    rewards = [r["reward_mean"] for r in records][1:]  # of the checkpoints of rounds 1 … 5
    best = 2 * (1 + max(range(len(rewards)), key=rewards.__getitem__))
    assert best < 12
    assert {p.name for p in Path("o/checkpoints").iterdir()} == {"best", f"step_{best}", "step_12"}
    assert Path("o/checkpoints/best").resolve().name == f"step_{best}"
    assert json.loads(Path("o/summary.json").read_text())["best"] == f"checkpoints/step_{best}"
    assert run_cli("sample", "o/checkpoints/best", "-n", 4, "--out", "x.npz").code == 0


def test_resuming_past_a_damaged_newest_ends_as_if_it_were_whole(run_cli, tiny_run):
    args = ("finetune", "--checkpoint", "base", *SMALL, "--rounds")
    assert run_cli(*args, 4, "--out", "whole").code == 0
    assert run_cli(*args, 3, "--out", "cut").code == 0
    damage(Path("cut/checkpoints/step_6"))
    shown = run_cli("sample", "cut", "-n", 4, "--out", "x.npz")
    assert shown.code == 0 and "step_6: model.safetensors is damaged" in shown.err
    assert "taking step_4" in shown.err
    resumed = run_cli("finetune", "--resume", "cut", "--rounds", 4, "--quiet")
    assert resumed.code == 0 and "taking step_4" in resumed.err and resumed.err.count("\n") == 1
    for step in ("step_6", "step_8"):
        model, optimizer = (
            [Path(run, "checkpoints", step, f"{name}.safetensors").read_bytes() for run in ("whole", "cut")]
            for name in ("model", "optimizer")
        )
        assert model[0] == model[1] and optimizer[0] == optimizer[1]
    rounds = [json.loads(line)["round"] for line in Path("cut/metrics.jsonl").read_text().splitlines()]
    assert rounds == [1, 2, 3, 4]


def test_a_copy_that_followed_the_link_to_the_best_goes_on(folder):
    retention.prune(folder, 2, folder / "step_6")
    copied = folder.parent / "copied"
    shutil.copytree(folder, copied)
    assert (copied / "best").is_dir() and not (copied / "best").is_symlink()
    retention.prune(copied, 2, copied / "step_9")
    assert (copied / "best").is_symlink() and (copied / "best").resolve() == copied / "step_9"


@pytest.mark.parametrize(
    "tail",
    ['{"round": 3', '{"round": 2}\n{"round": 2}\n', "\x00\x00", "[1]\n", '{"a": 1}\n', '{"round": 3}\n'],
)
def test_metrics_have_no_duplicate_and_no_missing_round_after_a_resume(run_cli, tiny_run, tail):
    with (tiny_run / "metrics.jsonl").open("a") as file:
        file.write(tail)
    assert run_cli("finetune", "--resume", tiny_run, "--rounds", 3, "--quiet").code == 0
    lines = (tiny_run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]
    assert all("reward_mean" in json.loads(line) for line in lines)
