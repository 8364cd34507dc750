"""Panel Machine: bench, list, doctor."""

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
    from orwcfm_fast.rewards import REWARDS
    from orwcfm_fast.samplers import SOLVERS

    return {r.plural: r for r in (REWARDS, MODELS, DATA, SOLVERS)}


@app.command("list", rich_help_panel=PANEL)
def list_(
    kind: Annotated[
        str, typer.Argument(metavar="[rewards|models|data|solvers]", help="one kind; default: all")
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
