"""Section Machine of the commands: list and bench; doctor has a file of its own."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from orwcfm_fast.cli import console
from orwcfm_fast.cli.app import command
from orwcfm_fast.cli.common import Debug, Json, option
from orwcfm_fast.cli.completion import REGISTRIES, choices, registry
from orwcfm_fast.cli.console import say
from orwcfm_fast.errors import UserError

SECTION = "Machine"
BENCHMARKS = ("kernels", "loop", "race", "race-mnist")


@command(SECTION, "list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="|".join(REGISTRIES),
            help="one kind  [default: all]",
            show_default=False,
            autocompletion=choices(REGISTRIES),
        ),
    ] = "",
    debug: Debug = False,
) -> None:
    """List rewards, methods, models, datasets, solvers and recipes, with those of plugins."""
    from rich.table import Table

    from orwcfm_fast.registry import unknown

    if kind and kind not in REGISTRIES:
        raise unknown("kind", kind, REGISTRIES)
    for name in [kind] if kind else REGISTRIES:
        entries = registry(name)
        table = Table(box=None, pad_edge=False, show_header=False)
        for entry in entries.names():
            table.add_row(f"  {entry}", entries.summary(entry))
            if name == "models" and (own := _defaults(entry)):
                table.add_row("", own)
        if name == "models":
            table.add_row("  diffusers:FOLDER_OR_ID", "a flow-matching pipeline of diffusers")
            table.add_row(
                "", f"{_defaults('diffusers:')} guidance that a transformer embeds: the pipeline's own"
            )
        say(name)
        console.out.print(table)


def _defaults(model: str) -> str:
    """The defaults that a kind of model brings, as options."""
    from orwcfm_fast.networks.models import defaults_of

    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in defaults_of(model).items())


@command(SECTION)
def bench(
    what: Annotated[
        str,
        typer.Argument(
            metavar="|".join(BENCHMARKS),
            help="what to measure  [default: kernels and loop]",
            show_default=False,
            autocompletion=choices(BENCHMARKS),
        ),
    ] = "",
    full: Annotated[
        bool, option("--full", panel="Machine", help="measure all sizes, which takes many minutes")
    ] = False,
    out: Annotated[
        Path | None, option(panel="Output", help="folder for the results as JSON and plots", metavar="FOLDER")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the fused ops and the loop against eager torch, torch.compile and the plain loop, or race the methods."""
    import json

    from orwcfm_fast.registry import unknown

    if what not in ("", *BENCHMARKS):
        raise unknown("bench", what, BENCHMARKS)
    if full and what == "race-mnist":
        raise UserError("--full has no effect on race-mnist: its settings are those chosen on digits")
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "kernels": _kernels, "loop": _loop, "race": _race, "race-mnist": partial(_race, data="mnist"),
    }  # fmt: skip
    found = {part: parts[part](full, out, as_json) for part in ([what] if what else ("kernels", "loop"))}
    if as_json:
        print(json.dumps(found, indent=1))


def _kernels(full: bool, out: Path | None, quiet: bool) -> dict[str, Any]:
    from orwcfm_fast.benchmarks import kernels
    from orwcfm_fast.benchmarks.record import save
    from orwcfm_fast.device import resolve_device

    with console.progress(1, "kernels", quiet) as bar:
        found = kernels.run(
            resolve_device("auto"), short=not full, compiled=shutil.which("c++") is not None,
            on_case=lambda case: bar.at(0, case),
        )  # fmt: skip
    if not quiet:
        rows = map(kernels.cells, found["rows"])
        console.out.print(console.plain_table(list(kernels.COLUMNS.values()), rows))
    if out:
        say(str(save(found, out, kernels.plot)), quiet)
    return found


def _loop(full: bool, out: Path | None, quiet: bool) -> dict[str, Any]:
    from orwcfm_fast.benchmarks import loop
    from orwcfm_fast.benchmarks.record import save
    from orwcfm_fast.device import resolve_device

    with console.progress(1, "loop", quiet) as bar:
        found = loop.run(full, lambda case: bar.at(0, case), resolve_device("auto"))
    if not quiet:
        say(f"\nloop on {found['device']}; {found['solver']}; images/s and × plain")
        console.out.print(console.plain_table(loop.COLUMNS, map(loop.cells, found["rows"])))
        for line in loop.extra_lines(found):
            say(line)
    if out:
        say(str(save(found, out, loop.plot, "loop-")), quiet)
    return found


def _race(full: bool, out: Path | None, quiet: bool, data: str = "digits") -> dict[str, Any]:
    from orwcfm_fast.benchmarks import race, race_report
    from orwcfm_fast.benchmarks.record import save
    from orwcfm_fast.device import resolve_device

    with console.progress(1, "race", quiet) as bar:
        found = race.race(full, lambda text: bar.at(0, text), resolve_device("auto"), data)
    if not quiet:
        for goal in race_report.RANKED_BY:
            if not (rows := race_report.ranked(found, goal)):
                continue
            console.out.print(
                console.plain_table(race_report.columns(found, goal), map(race_report.cells, rows))
            )
            for row in rows:
                say(race_report.settings_of(row))
    if out:
        say(str(save(found, out, race_report.plot, f"race-{data}-")), quiet)
    return found
