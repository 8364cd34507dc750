"""Section Machine of the commands: list and bench; doctor has a file of its own."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from orwcfm_fast.cli import console
from orwcfm_fast.cli.app import command
from orwcfm_fast.cli.common import Debug, Json, option
from orwcfm_fast.cli.completion import REGISTRIES, choices, registry
from orwcfm_fast.cli.console import say

SECTION = "Machine"


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
            metavar="kernels|loop",
            help="what to measure  [default: both]",
            show_default=False,
            autocompletion=choices(("kernels", "loop")),
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
    """Measure the fused ops and the loop against eager torch, torch.compile and the plain loop."""
    import json

    from orwcfm_fast.registry import unknown

    if what not in ("", "kernels", "loop"):
        raise unknown("bench", what, ("kernels", "loop"))
    from orwcfm_fast.benchmarks.record import save
    from orwcfm_fast.device import resolve_device

    found = {}
    if what != "loop":
        from orwcfm_fast.benchmarks import kernels

        with console.progress(1, "kernels", as_json) as bar:
            found["kernels"] = kernels.run(
                resolve_device("auto"), short=not full, compiled=shutil.which("c++") is not None,
                on_case=lambda case: bar.at(0, case),
            )  # fmt: skip
        if not as_json:
            console.out.print(
                console.plain_table(
                    list(kernels.COLUMNS.values()), map(kernels.cells, found["kernels"]["rows"])
                )
            )
        if out:
            say(str(save(found["kernels"], out, kernels.plot)), as_json)
    if what != "kernels":
        from orwcfm_fast.benchmarks import loop

        with console.progress(1, "loop", as_json) as bar:
            found["loop"] = loop.run(full, lambda case: bar.at(0, case), resolve_device("auto"))
        if not as_json:
            say(f"\nloop on {found['loop']['device']}; {found['loop']['solver']}; images/s and × plain")
            console.out.print(console.plain_table(loop.COLUMNS, map(loop.cells, found["loop"]["rows"])))
            for line in loop.extra_lines(found["loop"]):
                say(line)
        if out:
            say(str(save(found["loop"], out, loop.plot, "loop-")), as_json)
    if as_json:
        print(json.dumps(found, indent=1))
