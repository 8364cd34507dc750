"""Panel Machine: bench, list, doctor."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from orwcfm_fast.cli import console
from orwcfm_fast.cli.app import app
from orwcfm_fast.cli.common import Debug, Json
from orwcfm_fast.cli.console import say
from orwcfm_fast.errors import UserError

PANEL = "Machine"


def _registries():
    from orwcfm_fast.data import DATA
    from orwcfm_fast.models import MODELS
    from orwcfm_fast.recipe import RECIPES
    from orwcfm_fast.rewards import REWARDS
    from orwcfm_fast.samplers import SOLVERS

    return {r.plural: r for r in (REWARDS, MODELS, DATA, SOLVERS, RECIPES)}


@app.command("list", rich_help_panel=PANEL)
def list_(
    kind: Annotated[
        str, typer.Argument(metavar="[rewards|models|data|solvers|recipes]", help="one kind; default: all")
    ] = "",
    debug: Debug = False,
) -> None:
    """What there is, plugins included."""
    from rich.table import Table

    from orwcfm_fast.registry import unknown

    registries = _registries()
    if kind and kind not in registries:
        raise UserError(str(unknown("kind", kind, registries)))
    for name, registry in registries.items():
        if kind in ("", name):
            table = Table(box=None, pad_edge=False, show_header=False)
            for entry in registry.names():
                table.add_row(f"  {entry}", registry.summary(entry))
            say(name)
            console.out.print(table)


@app.command(rich_help_panel=PANEL)
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Versions, device, precision, and which kernels run and why."""
    import json

    from orwcfm_fast.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, lines in found.items():
        say(title)
        for key, value in lines.items():
            say(f"  {key:<22}{value}")


@app.command(rich_help_panel=PANEL)
def bench(
    what: Annotated[str, typer.Argument(metavar="[kernels|loop]", help="default: both, short")] = "",
    full: Annotated[bool, typer.Option("--full", help="all sizes; many minutes")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for the JSON and the plot of the kernels")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The fused ops and the loop against eager, torch.compile and the plain loop."""
    import json

    from orwcfm_fast.registry import unknown

    if what not in ("", "kernels", "loop"):
        raise UserError(str(unknown("bench", what, ("kernels", "loop"))))
    found = {}
    if what != "loop":
        from orwcfm_fast.benchmarks import kernels
        from orwcfm_fast.device import resolve_device

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
            say(str(kernels.save(found["kernels"], out)), as_json)
    if what != "kernels":
        from orwcfm_fast.benchmarks import loop

        with console.progress(1, "loop", as_json) as bar:
            found["loop"] = loop.run(full, lambda case: bar.at(0, case))
        if not as_json:
            say(f"\nloop on {found['loop']['device']}; {found['loop']['solver']}; images/s and × plain")
            console.out.print(console.plain_table(loop.COLUMNS, map(loop.cells, found["loop"]["rows"])))
    if as_json:
        print(json.dumps(found, indent=1))
