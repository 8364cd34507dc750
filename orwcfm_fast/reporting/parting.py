"""Where the reward that is trained on and a held-out one part: the sign of reward hacking."""

import math
from collections.abc import Sequence
from typing import Any


def parting(records: Sequence[dict[str, Any]], rollout: int) -> int | None:
    """The position of the round in which the held-out reward was highest, if the two have parted since.

    They have where, from that round to the last, the held-out reward fell and the trained one rose, each by more
    than two standard errors of the difference of two rounds' means.

    Args:
        records: of metrics.jsonl; without held-out rewards there is no parting.
        rollout: samples of a round, from which the standard errors follow.
    """
    if len(records) < 2 or any(r.get("holdout_std") is None for r in records):
        return None
    top = max(range(len(records)), key=lambda k: records[k]["holdout_mean"])

    def rise(key: str) -> float:
        """From the top to the last round, in standard errors; infinite where nothing spreads."""
        first, last = records[top], records[-1]
        error = math.hypot(first[f"{key}_std"], last[f"{key}_std"]) / math.sqrt(rollout)
        change = last[f"{key}_mean"] - first[f"{key}_mean"]
        return change / error if error else math.copysign(math.inf, change) if change else 0.0

    return top if rise("reward") > 2 and rise("holdout") < -2 else None


def parting_line(records: Sequence[dict[str, Any]], rollout: int) -> str | None:
    """What `parting` found, in words; None where it found nothing."""
    if (at := parting(records, rollout)) is None:
        return None
    first, last = records[at], records[-1]
    changes = [f"{r['reward_mean']:.4g} and {r['holdout_mean']:.4g}" for r in (first, last)]
    return (
        f"reward and held-out reward part after round {first['round']}: {changes[0]} then, {changes[1]} in round "
        f"{last['round']}; what was gained since may be reward hacking"
    )
