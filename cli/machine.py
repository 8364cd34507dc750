"""Panel Machine: bench, list, doctor."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orwcfm_fast.cli import console
from orwcfm_fast.cli.app import app
from orwcfm_fast.cli.common import Config, Debug, Json, settings
from orwcfm_fast.cli.console import say
from orwcfm_fast.cli.options import options_of
from orwcfm_fast.errors import UserError
from orwcfm_fast.settings import Finetune

if TYPE_CHECKING:
    from orwcfm_fast.planning.plan import Plan

PANEL = "Machine"


def _registries():
    from orwcfm_fast.data.datasets import DATA
    from orwcfm_fast.method.samplers import SOLVERS
    from orwcfm_fast.networks.models import MODELS
    from orwcfm_fast.rewards import REWARDS
    from orwcfm_fast.runs.recipe import RECIPES

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
@options_of(Finetune)
def doctor(
    given: dict[str, Any],
    plan: Annotated[
        bool, typer.Option("--plan", help="memory and time of a run with these settings")
    ] = False,
    gpu_gib: Annotated[
        float | None,
        typer.Option(help="plan a diffusers pipeline for a GPU with this memory, in GiB", min=0.1),
    ] = None,
    ranks: Annotated[int, typer.Option(help="plan for each of so many ranks", min=1)] = 1,
    config: Config = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Versions, device, precision, which kernels run and why; --plan: what a finetune would take."""
    import json

    if plan:
        _plan(settings(Finetune, config, given), gpu_gib, ranks, as_json)
        return
    if given or config or gpu_gib or ranks > 1:
        raise UserError("settings say what to plan: give --plan as well")
    from orwcfm_fast.planning.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, lines in found.items():
        say(title)
        for key, value in lines.items():
            say(f"  {key:<22}{value}")


def _plan(s: Finetune, gpu_gib: float | None, ranks: int, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from orwcfm_fast.networks.diffusers import is_pipeline

    with console.progress(1, "probing", as_json):
        if is_pipeline(s.model):
            from orwcfm_fast.planning.pipeline import plan_pipeline

            plans = plan_pipeline(s, gpu_gib, ranks)
        elif gpu_gib:
            raise UserError(
                "--gpu-gib: plans a diffusers pipeline; other models are probed on the device here"
            )
        else:
            from orwcfm_fast.planning.network import plan_run

            plans = {"": plan_run(s, ranks)}
    if as_json:
        found = {k: asdict(p) | {"peak": p.peak, "fits": p.fits} for k, p in plans.items()}
        print(json.dumps(found.get("", found), indent=1))
        return
    for name, one in plans.items():
        if name:
            say(f"training {name}")
        _show_plan(one, s)


def _show_plan(found: "Plan", s: Finetune) -> None:
    sizes = {
        "step": f"micro-batch {found.micro_batch}",
        "rollout": f"chunk {found.chunk}",
        "reward": f"{found.reward_batch} samples at once" if found.reward_batch else "whole rollout",
        "probe": "after a round",
        "evaluation": "after the last",
        "encoding": "before the rest",
    }
    rows = [[name, f"{n / 2**20:.1f}"] for name, n in found.held.items()]
    for phase, size in sizes.items():
        rows += [
            [f"{phase}: {name}, {size}", f"{n / 2**20:.1f}"] for name, n in getattr(found, phase).items()
        ]
    rows += [["Python, torch, libraries", f"{found.process / 2**20:.1f}"]] if found.process else []
    rows += [[f"peak, in the {max(found.phases, key=found.phases.__getitem__)}", f"{found.peak / 2**20:.1f}"],
             [f"there is, on {found.device}", f"{found.limit / 2**20:.1f}"]]  # fmt: skip
    console.out.print(console.plain_table(["memory", "MiB"], rows))
    if found.seconds:
        seconds = ", ".join(f"{name} {value:.2g}" for name, value in found.seconds.items())
        a_round = sum(found.seconds.values())
        say(f"a round takes about {a_round:.2g} s ({seconds}); {s.rounds} rounds {a_round * s.rounds:.3g} s")
    fits = f"fits with --micro-batch {found.micro_batch} --chunk {found.chunk}"
    fits += f" --reward-batch {found.reward_batch}" if found.reward_batch else ""
    say(fits if found.fits else "does not fit, even one sample at a time")


@app.command(rich_help_panel=PANEL)
def bench(
    what: Annotated[str, typer.Argument(metavar="[kernels|loop]", help="default: both, short")] = "",
    full: Annotated[bool, typer.Option("--full", help="all sizes; many minutes")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for the JSON files and the plots")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The fused ops and the loop against eager, torch.compile and the plain loop."""
    import json

    from orwcfm_fast.registry import unknown

    if what not in ("", "kernels", "loop"):
        raise UserError(str(unknown("bench", what, ("kernels", "loop"))))
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
