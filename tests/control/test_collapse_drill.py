"""Collapse to one digit, τ = 20 without an anchor: shown, announced, taken back, and steered away from."""

import json
from pathlib import Path

import pytest

SIZES = (
    "--rollout",
    512,
    "--batch",
    64,
    "--steps-per-round",
    64,
    "--warmup",
    20,
    "--eval-n",
    512,
    "--nfe",
    10,
)


def drill(run_cli, *flags):
    """digit:8, α = 0, τ = 20: what was printed, the records, and (before, after) on held-out noise."""
    made = run_cli(
        "finetune", "--reward", "digit:8", "--alpha", 0, "--tau", 20, "--out", "run", *SIZES, *flags
    )
    assert made.code == 0, made.err
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    found = json.loads(Path("run/summary.json").read_text())
    before, after = found["before"], found["after"]
    share = after["diversity"]["mean"] / before["diversity"]["mean"]
    rewards = [m["reward"]["mean"] for m in (before, after)]
    for r in records:
        print(r["round"], f"α {r['alpha']:.3g} τ {r['tau']:.3g} share {r['diversity_share']:.3f}", r["guard"])
    print(flags, f"diversity {share:.3f} of the reference's, reward {rewards[0]:.3f} to {rewards[1]:.3f}")
    return made.out, records, share, rewards


@pytest.mark.soak
def test_unguarded_it_collapses_and_warn_speaks_before(run_cli):
    out, records, share, _ = drill(run_cli, "--guard", "off", "--rounds", 2)
    assert share < 0.7 and all(r["guard"] == [] for r in records) and "guard:" not in out
    out, warned, share, _ = drill(run_cli, "--guard", "warn", "--rounds", 2, "--overwrite")
    assert share < 0.7
    low = next(r for r in warned if r["diversity_share"] < 0.7)
    assert 0 <= out.index("guard: ESS") < out.index(f"round {low['round']:>3}/")
    assert any("ESS" in text for r in warned[: low["round"]] for text in r["guard"])


@pytest.mark.soak
@pytest.mark.parametrize(
    "answer", [("--guard", "rollback"), ("--target-w2", 1.5)], ids=["rollback", "target-w2"]
)
def test_guarded_or_steered_it_keeps_its_diversity_and_still_gains(run_cli, answer):
    _, records, share, (before, after) = drill(run_cli, *answer, "--rounds", 4)
    assert share >= 0.8
    assert after > before
    assert [r["round"] for r in records] == [1, 2, 3, 4]
