"""Section Look of the commands: sample, evaluate."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from orwcfm_fast.cli import console, effects
from orwcfm_fast.cli.app import command
from orwcfm_fast.cli.common import (
    Config,
    Data,
    Debug,
    Json,
    Model,
    Out,
    Overwrite,
    Preset,
    Quiet,
    option,
    settings,
)
from orwcfm_fast.cli.console import progress, say
from orwcfm_fast.cli.effects import check_effect
from orwcfm_fast.cli.options import options_of
from orwcfm_fast.errors import UserError
from orwcfm_fast.settings import (
    Evaluation,
    RewardOptions,
    RewardsWithHoldout,
    Sample,
    Settings,
    build,
    read_toml,
)

if TYPE_CHECKING:
    from orwcfm_fast.runs.load import Loaded, Loader

SECTION = "Look"
R = TypeVar("R", bound=RewardOptions)


def load(loader: "Loader", spec: str, quiet: bool) -> "Loaded":
    """Load a model, with a progress bar while the digits model is pretrained.

    Raises:
        UserError: there is no such model; a setting has no effect on it.
    """
    from dataclasses import replace

    from orwcfm_fast.runs.resolve import check_conditions

    with progress(1, "pretraining the digits model, once", quiet) as bar:
        loader = replace(loader, watch=lambda step, steps, loss: bar.at(step / steps, f"loss {loss:.4f}"))
        found = loader.load(spec)
    check_conditions(loader.how, found.policy, found.name)
    return found


@command(SECTION)
@options_of(Sample, most_used=("n", "out", "seed", "solver", "nfe"))
def sample(
    given: dict[str, Any],
    model: Model = "",
    preset: Preset = "",
    data: Data = "",
    config: Config = None,
    out: Out = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw samples, as a grid in one PNG, as a folder of PNGs or as an .npz file."""
    from orwcfm_fast.device import resolve_device
    from orwcfm_fast.method.rollout import sample as draw
    from orwcfm_fast.method.rollout import start_conditions, start_noise
    from orwcfm_fast.method.samplers import times
    from orwcfm_fast.reporting.output import check_target, write_samples
    from orwcfm_fast.runs.load import Loader
    from orwcfm_fast.runs.resolve import with_model_defaults

    s = settings(Sample, config, given)
    check_effect(
        effects.SAMPLE,
        given,
        s,
        models=[model] if model else [],
        preset=preset,
        data=data,
        out=out,
        overwrite=overwrite,
    )
    times(s.nfe, s.solver, s.grid)
    if out:
        check_target(out, overwrite)
    found = load(Loader(resolve_device(s.device), s.precision, preset, data, how=s), model, quiet)
    say(f"model: {found.name}", quiet)
    policy = found.policy
    s = with_model_defaults(s, policy.model)
    target = out or (
        found.run.samples / f"sample-seed{s.seed}-n{s.n}.png" if found.run else Path("samples.png")
    )
    x = policy.decode(
        draw(policy, start_noise(policy, s.n, s.seed), s, s.chunk), start_conditions(policy, s.n, s)
    )
    say(str(write_samples(x, target)))


@command(SECTION)
@options_of(Evaluation, most_used=("reward", "n", "reference", "against", "as_json"))
def evaluate(
    given: dict[str, Any],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="runs, checkpoints, .pt files or presets  [default: the newest run under ./runs]",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str,
        option(
            panel="Measures",
            help="model from which W2 is measured  [default: the reference of the run]",
            metavar="MODEL",
        ),
    ] = "",
    preset: Preset = "",
    data: Data = "",
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure reward, W2, diversity and fidelity of one or several models on held-out noise, with intervals."""
    from orwcfm_fast.batch_sizes import BatchSizes
    from orwcfm_fast.device import resolve_device
    from orwcfm_fast.evaluation.evaluate import evaluate as measure
    from orwcfm_fast.evaluation.evaluate import target_for
    from orwcfm_fast.evaluation.held_out import evaluator_for
    from orwcfm_fast.method.samplers import times
    from orwcfm_fast.networks.lora import has_adapter
    from orwcfm_fast.rewards import make_holdout, make_reward
    from orwcfm_fast.runs.load import Loader
    from orwcfm_fast.runs.resolve import with_model_defaults

    quiet = quiet or as_json
    s = settings(Evaluation, config, given)
    check_effect(
        effects.EVALUATE,
        given,
        s,
        models=[*(models or []), *([reference] if reference else [])],
        preset=preset,
        data=data,
    )
    times(s.nfe, s.solver, s.grid)
    loader = Loader(resolve_device(s.device), s.precision, preset, data, how=s)
    if s.reward:  # the model may bring prompts
        make_reward(s.reward, s.with_prompts())
    make_holdout(s.with_prompts())
    found = [load(loader, spec, quiet) for spec in models or [""]]
    for item in found:
        say(f"model: {item.name}", quiet)
    first = found[0]
    s = with_model_defaults(s, first.policy.model)
    for item in found[1:]:
        if item.policy.shape != first.policy.shape:
            raise UserError(
                f"{item.name}: samples {item.policy.shape}, {first.name} has {first.policy.shape}"
            )
    with_run = first.run if first.run and first.run.reference.is_dir() else None
    compared = reference or (str(with_run.reference) if with_run else "")
    # a pipeline under adapters is its own reference, at no further memory
    shared = first.policy.pipeline and not reference and has_adapter(first.policy.network)
    anchor = first.policy.frozen_copy() if shared else loader.load(compared).policy if compared else None
    options = reward_options(s, first, given)
    reward, holdout = make_reward(options.reward, options), make_holdout(options)
    for rewards in (reward, holdout):
        if rewards:
            rewards.check_prompts(first.policy)
    policies = {item.name: item.policy for item in found}
    if anchor and not reference:
        policies = {"reference": anchor, **policies}
    known = first.policy.data
    evaluator = evaluator_for(known, reward, reward.name, holdout, s.features, s)
    target = target_for(s.against, known, s.n, s.data_dir)
    measures = measure(
        policies,
        anchor,
        evaluator,
        s,
        s.n,
        BatchSizes(chunk=s.chunk),
        target=target,
        against_reference=s.against == "reference",
    )
    if as_json:
        print(json.dumps({"reward": reward.name, "models": [m.to_dict() for m in measures]}, indent=1))
    else:
        console.out.print(console.measures_table(measures, reward.name))


def reward_options(s: R, found: "Loaded", given: Iterable[str]) -> R:
    """The settings with a reward: the one that the user named, else that of the model's run, else that of its data.

    The run's reward comes with all the run set for it; what the user set stays.

    Args:
        given: names of the settings that were set on the command line.

    Raises:
        UserError: the run's reward is code; an option of the command line has no effect on the reward.
    """
    from orwcfm_fast.rewards import check_code_named
    from orwcfm_fast.runs.resolve import own_reward

    if not s.reward and found.run:
        config = found.run.config
        names = RewardsWithHoldout.model_fields.keys() & type(s).model_fields.keys()
        names -= Settings.model_fields.keys() | (s.model_fields_set - {"reward"})
        written = {k: v for k, v in read_toml(config).items() if k in names}
        checked = build(type(s), written, where=f"{config}: ")
        for key in ("reward", "holdout_reward"):
            check_code_named(written.get(key, []), (), config, key)
        s = s.model_copy(update={key: getattr(checked, key) for key in written})
    s = s.with_prompts() if found.policy.conditions else s
    s = s if s.reward else s.model_copy(update={"reward": [own_reward(found.policy)]})
    check_effect(effects.REWARDS, given, s)
    return s
