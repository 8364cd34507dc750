"""The output of the commands: plain lines, progress bars and tables."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from orwcfm_fast.reporting.table import measure_rows

if TYPE_CHECKING:
    from orwcfm_fast.distributed import ProcessGroup
    from orwcfm_fast.evaluation.evaluate import Measures
    from orwcfm_fast.runs.result import Result

out = Console(highlight=False, soft_wrap=True)
if not out.is_terminal:
    out.width = 200  # so that no table is cut on a pipe
# before the processes of a launch are connected, the first one of each machine reports errors
err = Console(stderr=True, highlight=False, soft_wrap=True, quiet=os.environ.get("LOCAL_RANK", "0") != "0")


@contextmanager
def report_once(ranks: "ProcessGroup") -> Iterator[None]:
    """Only the first rank prints results, and only the rank that meets an error first prints it."""
    out.quiet = not ranks.first
    try:
        yield
    except BaseException:
        err.quiet = not ranks.speaks()
        raise


def say(text: str, quiet: bool = False) -> None:
    """Print a line as it is: square brackets are no markup."""
    if not quiet:
        out.print(text, markup=False)


@contextmanager
def progress(total: int, label: str, quiet: bool) -> Iterator["Bar"]:
    """A progress bar on a terminal; on a pipe only the lines of `Bar.line` are printed."""
    shown = out.is_terminal and not quiet
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=out, disable=not shown, transient=True)
    # older releases of rich end a bar that is not shown with an empty line
    with bar if shown else nullcontext():
        yield Bar(bar, bar.add_task(label, total=total, note=""), shown, quiet)


class Bar:
    """A progress bar that is shown."""

    def __init__(self, bar: Progress, task, shown: bool, quiet: bool) -> None:
        self._bar, self._task, self._shown, self._quiet = bar, task, shown, quiet

    def at(self, done: float, note: str | None = None) -> None:
        """Move to `done`, in the units of the bar's total."""
        self._bar.update(self._task, completed=done)
        if note is not None:
            self._bar.update(self._task, note=note)

    def line(self, text: str) -> None:
        """Print a line that stays above the bar."""
        if not self._quiet:
            self._bar.console.print(text, markup=False)


def round_line(record: dict[str, Any], rounds: int) -> str:
    """The record of a round as one line."""
    holdout = f"  holdout {record['holdout_mean']:.4g}" if "holdout_mean" in record else ""
    if record.get("eval_reward_mean") is not None:
        holdout += f"  held-out prompts {record['eval_reward_mean']:.4g}"
    return (
        f"round {record['round']:>3}/{rounds}  reward {record['reward_mean']:.4g}{holdout}  "
        f"W2 {record['w2_coupled']:.3g}  α {record['alpha']:.3g}  ESS {record['ess']:.0f}  "
        f"diversity {record['diversity']:.3g}  "
        f"{record['images_per_s_rollout']:.0f} rollout img/s  {record['images_per_s_train']:.0f} train img/s"
    )


def plain_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table without rules; the first column is aligned left, the others right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def measures_table(measures: list["Measures"], reward: str) -> Table:
    """A table with a column for each model and a row for each measure."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for m in measures:
        table.add_column(m.name, justify="right")
    for row in measure_rows(measures, reward):
        table.add_row(*row)
    return table


def closing(result: "Result") -> None:
    """Print what a fine-tuning run reached, where its time went, where its files are and what to do next."""
    out.print()
    out.print(measures_table(result.measured, "+".join(result.settings.reward)))
    summary = result.summary()
    phases = result.by_phase()
    total = sum(phases.values()) or 1.0
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in phases.items())
    say(
        f"\nESS {summary['ess']:.0f} of {result.settings.rollout}; rollout {summary['images_per_s_rollout']:.0f} "
        f"images/s, training {summary['images_per_s_train']:.0f} images/s; {result.seconds:.0f} s in all"
    )
    say(f"time: {shares}")
    if each := result.by_reward():
        say("of it, rewards: " + ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in each.items()))
    if forecast := result.forecast():
        say(forecast)
    if drop := result.reward_drop():
        say(drop)
    if parted := result.parting():
        say(parted)
    more = "" if drop or not (command := result.next_command()) else f" · {command} (more reward, more drift)"
    say(
        f"look at {result.run.path / 'report.html'} and {result.run.samples / 'before_after.png'}\n"
        f"next: orwcfm sample · orwcfm evaluate{more}"
    )
