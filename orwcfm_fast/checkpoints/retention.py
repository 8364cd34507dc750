"""A run's folder of checkpoints: which one a run continues from, which ones are kept."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orwcfm_fast.checkpoints.checkpoint import Checkpoint, load
from orwcfm_fast.errors import UserError, warn

BEST = "best"
Records = list[dict[str, Any]]
OF_THE_ROLLOUT = ("reward_mean", "reward_max", "ess", "diversity")
"""Metrics of a round's rollout, which is drawn from the policy as the round before left it."""
LOWER_IS_BETTER = ("w2_coupled",)


def steps(folder: Path, every: int = 1) -> list[Path]:
    """Every `step_N` with N a multiple of `every`, damaged ones too, newest first."""
    found = [p for p in folder.glob("step_*") if p.name[5:].isascii() and p.name[5:].isdigit()]
    found = [p for p in found if int(p.name[5:]) % every == 0]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def load_newest(
    folder: Path, only: tuple[str, ...] | None = None, set_aside: bool = False, every: int = 1
) -> Checkpoint | None:
    """The newest whole checkpoint; one warning names those that are damaged. None where there is none at all.

    Args:
        only: stems of the files to read; all where None.
        every: steps between the run's regular checkpoints; those that an interruption wrote are passed over.
        set_aside: rename damaged ones to `step_N.damaged`, so that the run can write that step again.

    Raises:
        UserError: every one is damaged.
    """
    damaged: list[tuple[Path, UserError]] = []
    for path in steps(folder, every):
        try:
            found = load(path, only)
        except UserError as error:
            damaged.append((path, error))
            continue
        if damaged:
            where = f"; set aside as {damaged[0][0]}.damaged" if set_aside else ""
            warn(f"{'; '.join(str(error) for _, error in damaged)}; taking {path.name}{where}")
        for broken, _ in damaged if set_aside else ():
            shutil.rmtree(aside := broken.with_name(f"{broken.name}.damaged"), ignore_errors=True)
            broken.rename(aside)
        return found
    if damaged:
        raise UserError(f"{damaged[0][1]}; no whole checkpoint is left in {folder}")
    return None


def prune(folder: Path, keep: int, best: Path | None = None, every: int = 1) -> None:
    """Remove all but the `keep` newest regular `step_N`, the newest of all, and `best`, where a link then points.

    Args:
        every: steps between regular checkpoints; one that an interruption wrote goes when there is a newer one,
            so that a resumed run keeps what the uninterrupted one does.
    """
    if best:
        link = folder / f".{BEST}.part"
        link.unlink(missing_ok=True)
        link.symlink_to(best.name)
        if not (folder / BEST).is_symlink():  # the run came here by a copy that follows links
            shutil.rmtree(folder / BEST, ignore_errors=True)
        link.replace(folder / BEST)
    kept = {*steps(folder)[:1], *steps(folder, every)[:keep], best}
    for path in steps(folder):
        if path not in kept:
            # out of sight first: a reader sees a whole one or none
            path = path.rename(path.with_name(f".{path.name}.old"))
            shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what writes that were cut off have left; only for who holds the run's lock."""
    for pattern in (".step_*.part", ".step_*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def best_step(
    folder: Path,
    records: Records,
    metric: str,
    step_of: Callable[[int], int],
    every: int = 1,
    closing: Mapping[str, float] | None = None,
) -> Path | None:
    """The kept checkpoint with the best value of a metric; None where none of them has a value.

    Args:
        records: the lines of metrics.jsonl.
        metric: one of `settings.Best`.
        step_of: the gradient steps taken after so many rounds.
        every: steps between regular checkpoints; others have no vote.
        closing: metrics of the final policy, of which there is no rollout.
    """
    sign, before = -1.0 if metric in LOWER_IS_BETTER else 1.0, int(metric in OF_THE_ROLLOUT)
    values = {step_of(r["round"] - before): sign * r[metric] for r in records if metric in r}
    if records and before and closing and metric in closing:
        values[step_of(records[-1]["round"])] = sign * closing[metric]
    found = [p for p in steps(folder, every) if int(p.name[5:]) in values]
    return max(found, key=lambda p: values[int(p.name[5:])], default=None)
