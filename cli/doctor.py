"""The command doctor: what this machine has, and with --plan what a run would take."""

from typing import TYPE_CHECKING, Annotated, Any

from orwcfm_fast.cli import console, effects
from orwcfm_fast.cli.app import command
from orwcfm_fast.cli.common import Config, Debug, Json, Recipe, option, settings
from orwcfm_fast.cli.console import say
from orwcfm_fast.cli.effects import check_effect
from orwcfm_fast.cli.options import options_of
from orwcfm_fast.errors import UserError
from orwcfm_fast.settings import Finetune

if TYPE_CHECKING:
    from orwcfm_fast.planning.plan import Plan
    from orwcfm_fast.planning.scaling import Cluster, RoundWork

SECTION = "Machine"


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
    gpus_per_node: Annotated[
        int | None,
        option(panel="Machine", help="with --ranks: GPUs of a node  [default: 8]", metavar="INTEGER", min=1),
    ] = None,
    link_gbit: Annotated[
        float | None,
        option(
            panel="Machine",
            help="with --ranks: Gbit/s of each GPU's link to other nodes  [default: 400]",
            metavar="NUMBER",
            min=0.1,
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        option(
            panel="Machine",
            help="with --ranks: TFLOP/s that a GPU reaches  [default: 400, two fifths of an H100's]",
            metavar="NUMBER",
            min=0.001,
        ),
    ] = None,
    reward_seconds: Annotated[
        float | None,
        option(
            panel="Machine",
            help="with --ranks: seconds that a reward server takes for a sample",
            metavar="NUMBER",
            min=0,
        ),
    ] = None,
    recipe: Recipe = "",
    config: Config = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show versions, device and which kernels run and why; with --plan, what a finetune would take."""
    import json

    on: dict[str, Any] = {"gpus_per_node": gpus_per_node, "link_gbit": link_gbit, "tflops": tflops}
    on = {key: value for key, value in on.items() if value is not None}
    if plan:
        from orwcfm_fast.runs.recipe import RECIPES

        s = settings(Finetune, config, given, RECIPES.get(recipe).finetune if recipe else {})
        check_effect((*effects.FINETUNE, *effects.PLAN), given, s, ranks=ranks)
        if ranks == 1 and (on or reward_seconds is not None):
            raise UserError("--gpus-per-node, --link-gbit, --tflops, --reward-seconds: give --ranks as well")
        from orwcfm_fast.planning.scaling import Cluster

        cluster = Cluster(ranks, **on)
        plans = _plans(s, gpu_gib, ranks, as_json)
        work = {name: _work(name, one, s, reward_seconds or 0.0) for name, one in plans.items()}
        if as_json:
            _print_json(plans, work, cluster)
            return
        for name, one in plans.items():
            if name:
                say(f"training {name}")
            _show_plan(one, s)
            if ranks > 1:
                _show_scaling(work[name], cluster)
        return
    if given or recipe or config or gpu_gib or ranks > 1 or on or reward_seconds is not None:
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


def _plans(s: Finetune, gpu_gib: float | None, ranks: int, as_json: bool) -> dict[str, "Plan"]:
    """By what is trained, where there is a choice."""
    from orwcfm_fast.networks.flow.library import is_pipeline

    with console.progress(1, "planning", as_json):
        if is_pipeline(s.model):
            from orwcfm_fast.planning.pipeline import plan_pipeline
            from orwcfm_fast.runs.resolve import with_model_defaults

            return plan_pipeline(with_model_defaults(s, s.model), gpu_gib, ranks)
        if gpu_gib:
            raise UserError(
                "--gpu-gib: plans a diffusers pipeline; any other model is measured on this machine"
            )
        from orwcfm_fast.planning.network import plan_run

        return {"": plan_run(s, ranks)}


def _work(name: str, plan: "Plan", s: Finetune, reward_seconds: float) -> "RoundWork":
    from orwcfm_fast.planning.scaling import RoundWork

    lora = s.lora or int("adapters" in name)
    s = s.model_copy(update={"lora": lora, "micro_batch": plan.micro_batch, "chunk": plan.chunk})
    return RoundWork.of(s, plan.flops, plan.weights, plan.gradients, reward_seconds)


def _print_json(plans: dict[str, "Plan"], work: dict[str, "RoundWork"], cluster: "Cluster") -> None:
    import json
    from dataclasses import asdict

    from orwcfm_fast.planning.scaling import ladder

    found = {
        name: asdict(p) | {"peak": p.peak, "fits": p.fits}
        | ({"rounds": [asdict(t) for t in ladder(work[name], cluster)]} if cluster.ranks > 1 else {})
        for name, p in plans.items()
    }  # fmt: skip
    print(json.dumps(found.get("", found), indent=1))


def _show_scaling(work: "RoundWork", cluster: "Cluster") -> None:
    from orwcfm_fast.planning.scaling import ladder, stops_at, why_it_stops

    times = ladder(work, cluster)
    rows = [
        [
            f"{t.ranks}",
            *(f"{x:.3g}" for x in (t.rollout, t.anchors, t.steps, t.exchange, t.total)),
            f"{times[0].total / t.total:.3g}",
            f"{t.bytes / 2**30:.3g}",
            *([f"{t.reward_servers}"] if work.reward_seconds else []),
        ]
        for t in times
    ]
    say(f"a round by number of ranks, on paper, at {cluster.tflops:g} TFLOP/s")
    columns = ["ranks", "rollout s", "anchors s", "steps s", "waiting s", "round s", "faster", "GiB received"]
    console.out.print(console.plain_table(columns + ["reward servers"] * (work.reward_seconds > 0), rows))
    if found := stops_at(times):
        say(f"more than {found[0].ranks} do not pay: {why_it_stops(work, found[1])}")


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
