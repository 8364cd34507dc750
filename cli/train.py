"""Section Train of the commands: pretrain, finetune, sweep."""

import time
from pathlib import Path
from typing import Annotated, Any

from orwcfm_fast.cli import effects
from orwcfm_fast.cli.app import command
from orwcfm_fast.cli.common import Config, Debug, Out, Overwrite, Quiet, Recipe, option, settings
from orwcfm_fast.cli.console import closing, progress, report_once, round_line, say
from orwcfm_fast.cli.effects import check_effect
from orwcfm_fast.cli.options import options_of
from orwcfm_fast.errors import UserError
from orwcfm_fast.reporting.table import interval
from orwcfm_fast.settings import Finetune, Pretrain, Sweep

SECTION = "Train"
PRETRAINING = "pretraining the digits model, once"
Resume = Annotated[
    Path | None,
    option(panel="Safety", help="continue this run with its own settings", metavar="RUN"),
]


@command(SECTION)
@options_of(Pretrain, most_used=("data", "model", "steps", "batch", "out"))
def pretrain(
    given: dict[str, Any],
    recipe: Recipe = "",
    config: Config = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a flow-matching model on a dataset."""
    from orwcfm_fast.runs.pretrain_run import PretrainRun
    from orwcfm_fast.runs.recipe import RECIPES
    from orwcfm_fast.runs.run import Run

    ingredients = RECIPES.get(recipe).pretraining() if recipe else {}
    if resume:
        _only_resume(config, out, overwrite, recipe)
        task = PretrainRun.resume(Run(resume), given)
    else:
        s = settings(Pretrain, config, given, ingredients)
        check_effect(effects.PRETRAIN, given, s, out=out, overwrite=overwrite)
        task = PretrainRun.new(s, out, overwrite)
    say(f"run {task.run.path}: {task.settings.model} on {task.settings.data}", quiet)
    with progress(task.settings.steps, "pretraining", quiet) as bar:
        loss = task.train(lambda step, loss: bar.at(step, f"loss {loss:.4f}"))
    say(f"loss {loss:.4f}, {task.images_per_s():.0f} images/s", quiet)
    say(f"samples in {task.samples_path}\nrun {task.run.path}", quiet)
    finetune = f"orwcfm finetune {f'--recipe {recipe} ' if recipe else ''}--checkpoint {task.run.path}"
    say(f"next: orwcfm sample · {finetune}", quiet)


@command(SECTION)
@options_of(Finetune, most_used=("reward", "alpha", "tau", "rounds", "checkpoint"))
def finetune(
    given: dict[str, Any],
    recipe: Recipe = "",
    config: Config = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model online with a reward; without options, make more even digits on any machine."""
    from orwcfm_fast.distributed import joined

    with joined() as ranks, report_once(ranks):
        _finetune(ranks, given, recipe, config, out, overwrite, resume, quiet or not ranks.first)


def _finetune(ranks, given, recipe, config, out, overwrite, resume, quiet) -> None:
    from orwcfm_fast.runs.finetune_run import Finetuning

    began, new = time.perf_counter(), None
    if resume:
        _only_resume(config, out, overwrite, recipe)
    else:
        new = _finetune_settings(recipe, config, given)
        check_effect(effects.FINETUNE, given, new, out=out, overwrite=overwrite)
    with progress(Pretrain().steps, PRETRAINING, quiet) as bar:
        task = Finetuning.prepare(
            new,
            given,
            resume=resume,
            out=out,
            overwrite=overwrite,
            watch_pretraining=lambda step, steps, loss: bar.at(step, f"loss {loss:.4f}"),
            ranks=ranks,
        )
    s = task.settings
    say(f"run {task.run.path}: {'+'.join(s.reward)} on {task.loaded.name}", quiet)
    for line in task.notes():
        say(line, quiet)
    with progress(s.rounds * s.steps_per_round, "fine-tuning", quiet) as bar:
        task.train(
            watch=lambda p: bar.at(p.round * s.steps_per_round + p.step, p.stage),
            on_round=lambda record: bar.line(round_line(record, s.rounds)),
            on_line=bar.line,
        )
    say("measuring before and after on held-out noise", quiet)
    shown = task.has_drift_control and not quiet
    with progress(s.rounds * s.steps_per_round, "once more with τ = 0", not shown) as bar:
        result = task.finish(began, lambda p: bar.at(p.round * s.steps_per_round + p.step, p.stage))
    if result and not quiet:
        closing(result)
    say(f"run {task.run.path}")


@command(SECTION)
@options_of(Sweep, most_used=("reward", "alpha", "tau", "set", "checkpoint"))
def sweep(
    given: dict[str, Any],
    config: Config = None,
    out: Out = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune over a grid of α, τ and other settings, and draw the fronts; the same --out continues a sweep."""
    from orwcfm_fast.runs.run import read_command
    from orwcfm_fast.runs.sweep import Sweeping
    from orwcfm_fast.runs.sweep_grid import grid
    from orwcfm_fast.settings import read_toml

    s = settings(Sweep, config, given)
    if overwrite or not out or read_command(out) != "sweep":  # or it has settings of its own
        check_effect(effects.FINETUNE, given, *grid(s).values(), out=out, overwrite=overwrite)
    given = (read_toml(config) if config else {}) | given
    with progress(Pretrain().steps, PRETRAINING, quiet) as bar:
        task = Sweeping.prepare(
            s,
            given,
            out,
            overwrite,
            watch_pretraining=lambda step, steps, loss: bar.at(step, f"loss {loss:.4f}"),
        )
    s, runs = task.settings, task.runs
    say(f"sweep {task.run.path}: {len(runs)} runs of {'+'.join(s.reward)} on {task.base.name}", quiet)
    if done := task.finished():
        say(f"done before: {', '.join(done)}", quiet)
    say(task.forecast(), quiet)
    with progress(len(runs), "sweep", quiet) as bar:
        task.train_all(
            watch=lambda run, share: bar.at(len(task.finished()) + share, run),
            on_result=lambda o: bar.line(
                f"{o.path.name}: reward {interval(o.after.reward)}, W2 {interval(o.after.w2_coupled)}, "
                f"diversity {interval(o.after.diversity)}, {o.seconds:.0f} s"
            ),
        )
    task.write()
    say(f"look at {task.run.path / 'report.html'}, fronts.png and fronts.csv beside it", quiet)
    say(f"sweep {task.run.path}")


def _finetune_settings(recipe: str, config: Path | None, given: dict[str, Any]) -> Finetune:
    """The settings of a new run; a recipe starts from its own pretrained model unless another one is named."""
    if not recipe:
        return settings(Finetune, config, given)
    from orwcfm_fast.runs.recipe import RECIPES

    found = RECIPES.get(recipe)
    s = settings(Finetune, config, given, found.finetune)
    return (
        s if s.checkpoint or not found.pretrain else s.model_copy(update={"checkpoint": found.pretrained()})
    )


def _only_resume(config: Path | None, out: Path | None, overwrite: bool, recipe: str) -> None:
    if config or out or overwrite or recipe:
        raise UserError(
            "--resume takes the settings and the folder of the run; leave out --config, --out, --overwrite, --recipe"
        )
