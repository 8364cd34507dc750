"""Section Machine of the commands: list, doctor and bench."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orwcfm_fast.cli import console, effects
from orwcfm_fast.cli.app import command
from orwcfm_fast.cli.common import Config, Debug, Json, option, settings
from orwcfm_fast.cli.completion import REGISTRIES, choices, registry
from orwcfm_fast.cli.console import say
from orwcfm_fast.cli.effects import check_effect
from orwcfm_fast.cli.options import options_of
from orwcfm_fast.errors import UserError
from orwcfm_fast.settings import Finetune

if TYPE_CHECKING:
    from orwcfm_fast.planning.plan import Plan

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
@options_of(Finetune, most_used=("plan", "model", "gpu_gib", "batch", "rollout"))
def doctor(
    given: dict[str, Any],
    plan: Annotated[
        bool,
        option("--plan", panel="Machine", help="plan memory and time of orwcfm finetune with these settings"),
    ] = False,
    gpu_gib: Annotated[
        float | None,
        option(
            panel="Machine",
            help="plan a pipeline for a GPU with so many GiB of memory",
            metavar="NUMBER",
            min=0.1,
        ),
    ] = None,
    ranks: Annotated[
        int,
        option(
            panel="Machine",
            help="plan one of so many processes under torchrun  [default: 1]",
            metavar="INTEGER",
            min=1,
        ),
    ] = 1,
    config: Config = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show versions, device and which kernels run and why; with --plan, what a finetune would take."""
    import json

    if plan:
        s = settings(Finetune, config, given)
        check_effect(effects.FINETUNE, given, s)
        _plan(s, gpu_gib, ranks, as_json)
        return
    if given or config or gpu_gib or ranks > 1:
        raise UserError("settings are for a plan: give --plan as well")
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

    from orwcfm_fast.networks.flow.library import is_pipeline

    with console.progress(1, "planning", as_json):
        if is_pipeline(s.model):
            from orwcfm_fast.planning.pipeline import plan_pipeline
            from orwcfm_fast.runs.resolve import with_model_defaults

            plans = plan_pipeline(with_model_defaults(s, s.model), gpu_gib, ranks)
        elif gpu_gib:
            raise UserError(
                "--gpu-gib: plans a diffusers pipeline; any other model is measured on this machine"
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
             [f"available on {found.device}", f"{found.limit / 2**20:.1f}"]]  # fmt: skip
    console.out.print(console.plain_table(["memory", "MiB"], rows))
    if found.seconds:
        seconds = ", ".join(f"{name} {value:.2g}" for name, value in found.seconds.items())
        a_round = sum(found.seconds.values())
        say(f"a round takes about {a_round:.2g} s ({seconds}); {s.rounds} rounds {a_round * s.rounds:.3g} s")
    fits = f"fits with --micro-batch {found.micro_batch} --chunk {found.chunk}"
    fits += f" --reward-batch {found.reward_batch}" if found.reward_batch else ""
    say(fits if found.fits else "does not fit, even one sample at a time")


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
