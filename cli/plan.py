"""Section Plan of the commands: predict."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from orwcfm_fast.cli import console, effects
from orwcfm_fast.cli.app import command
from orwcfm_fast.cli.common import Config, Data, Debug, Json, Model, Preset, Quiet, option, settings
from orwcfm_fast.cli.console import plain_table, say
from orwcfm_fast.cli.effects import check_effect
from orwcfm_fast.cli.look import load, reward_options
from orwcfm_fast.cli.options import options_of
from orwcfm_fast.errors import UserError
from orwcfm_fast.reporting.table import number
from orwcfm_fast.settings import Finetune, Predict, RewardOptions

if TYPE_CHECKING:
    from orwcfm_fast.theory import Recursion
    from orwcfm_fast.theory.forecast import Forecast
    from orwcfm_fast.theory.prediction import Verdict

SECTION = "Plan"
Exact = Annotated[
    bool,
    option(
        "--exact",
        panel="Method",
        help="solve the exact recursion of the method by quadrature (1-D and 2-D data)",
    ),
]
Versus = Annotated[
    Path | None, option(panel="Method", help="compare a finished run with its forecast", metavar="RUN")
]
Plot = Annotated[
    Path | None,
    option("--out", panel="Output", help="picture of the front  [default: forecast.png]", metavar="FILE"),
]


@command(SECTION)
@options_of(Predict, most_used=("alpha", "tau", "reward", "rounds", "want_reward"))
def predict(
    given: dict[str, Any],
    model: Model = "",
    exact: Exact = False,
    versus: Versus = None,
    preset: Preset = "",
    data: Data = "",
    config: Config = None,
    out: Plot = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Forecast the reward and W2 of settings before training, or find the α that reaches a reward."""
    from orwcfm_fast.data.datasets import source
    from orwcfm_fast.device import resolve_device
    from orwcfm_fast.method.samplers import times
    from orwcfm_fast.rewards import RewardSum, check_code_named, make_reward
    from orwcfm_fast.runs.load import Loader
    from orwcfm_fast.runs.resolve import with_model_defaults
    from orwcfm_fast.runs.run import Run
    from orwcfm_fast.theory import prediction

    s = settings(Predict, config, given)
    if not s.alpha or not s.tau or min(s.alpha) < 0:
        raise UserError("--alpha: should be 0 or more")
    times(s.nfe, s.solver, s.grid)
    check_effect(
        effects.PREDICT,
        given,
        s,
        models=[model] if model else [],
        exact=exact,
        versus=versus,
        preset=preset,
        data=data,
        out=out,
    )
    out = out or Path("forecast.png")
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UserError(f"--out {out}: should be a .png file in a folder that exists")
    loader = Loader(resolve_device(s.device), s.precision, preset, data, how=s)
    if versus:

        def reward_of(run: Finetune) -> RewardSum:
            check_code_named(run.reward, s.reward, versus)
            if s.reward and s.reward != run.reward:
                raise UserError(
                    f"--reward has no effect: --versus takes that of the run, {', '.join(run.reward)}"
                )
            check_effect(effects.REWARDS, given, run)
            own = {key: getattr(s, key) for key in s.model_fields_set & RewardOptions.model_fields.keys()}
            return make_reward(run.reward, run.model_copy(update=own))

        found = prediction.versus(Run(versus), lambda spec: loader.load(spec).policy, reward_of, s)
        _show_verdict(found, as_json)
        return
    if exact and data:
        name, shown = data, f"the density of {data}"
        s = s.model_copy(update={"reward": s.reward or [source(name)[0].reward]})
        check_effect(effects.REWARDS, given, s)
    else:
        loaded = load(loader, model, quiet or as_json)
        policy, name, shown = loaded.policy, loaded.policy.data, loaded.name
        s = with_model_defaults(s, policy.model)
        # a run is forecast from where it started
        if loaded.run and loaded.run.reference.is_dir() and not exact:
            model = str(loaded.run.reference)
            policy, shown = loader.load(model).policy, f"the reference of {shown}"
        s = reward_options(s, loaded, given)
    reward = make_reward(s.reward, s)
    say(f"model: {shown}; reward {reward.name}", quiet or as_json)
    if exact:
        _show_exact(prediction.exact_grid(prediction.known_density(name), reward, s), as_json)
        return
    reference = prediction.draw_reference(policy, reward, s)
    if s.want_reward is not None or s.want_w2 is not None:
        interval = prediction.wanted_alpha(reference, s)
        if as_json:
            print(json.dumps({"alpha_low": interval.low, "alpha_high": interval.high}))
        else:
            say(
                f"α between {interval.low:.3g} and {interval.high:.3g} at τ={s.tau[0]:g}, after {s.rounds} rounds of "
                f"{s.method}, for a network that fits its objective exactly"
            )
        return
    forecasts = prediction.forecast_grid(reference, s)
    _show_forecasts(forecasts, as_json)
    say(f"picture: {prediction.save_front(out, forecasts)}", quiet or as_json)
    rewards = s.reward if loaded.run or given.get("reward") else []
    of = {"--checkpoint": [model], "--model": [preset], "--data": [data], "--reward": rewards}
    more = [f"{flag} {shlex.quote(value)}" for flag, values in of.items() for value in values if value]
    _advise(float(reference.rewards.std()), more, quiet or as_json)


def _advise(spread: float, more: list[str], quiet: bool) -> None:
    from orwcfm_fast.theory.advice import WISHES

    if spread <= 0:
        return
    say(f"advice, for rewards of standard deviation {spread:.2g}:", quiet)
    for wish in WISHES:
        say(f"  {wish.name}: {wish.command(spread, more)}", quiet)


def _show_forecasts(forecasts: list["Forecast"], as_json: bool) -> None:
    if as_json:
        found = [
            {"alpha": f.alpha, "tau": f.tau, "doubt": f.doubt, "rounds": [vars(r) for r in f.rounds]}
            for f in forecasts
        ]
        print(json.dumps(found, indent=1, default=float))
        return
    rounds = _shown(len(forecasts[0].rounds))
    columns = ["α", "τ", *(f"r{k}" for k in rounds), "±", "W2 coupled", "least", "W2", "diversity", "ESS"]
    rows = [
        [f"{f.alpha:g}", f"{f.tau:g}", *(f"{f.rounds[k].reward:.3f}" for k in rounds),
         f"{2 * f.final.reward_error:.3f}",
         number(f.final.w2_coupled), number(f.final.w2_least), number(f.final.w2), number(f.final.diversity),
         f"{f.final.ess:.0f}"]
        for f in forecasts
    ]  # fmt: skip
    say(f"reward before training {forecasts[0].rounds[0].reward:.3f}; reward after each round:")
    console.out.print(plain_table(columns, rows))
    for f in forecasts:
        if f.doubt:
            say(f"α={f.alpha:g} τ={f.tau:g}: {f.doubt}")


def _shown(rounds: int) -> list[int]:
    """The numbers of at most six rounds with the last one, so that the table fits."""
    step = max(1, -(-(rounds - 1) // 6))
    return sorted({*range(rounds - 1, 0, -step)})


def _show_exact(found: list["Recursion"], as_json: bool) -> None:
    if as_json:
        keys = ("round", "reward", "w2", "entropy", "drift")
        plain = [
            {"alpha": f.alpha, "tau": f.tau, "rounds": [{k: getattr(r, k) for k in keys} for r in f.rounds],
             "error": f.error}
            for f in found
        ]  # fmt: skip
        print(json.dumps(plain, indent=1))
        return
    rounds = _shown(len(found[0].rounds))
    columns = [
        "α",
        "τ",
        *(f"r{k}" for k in rounds),
        "± (halving)",
        "W2",
        "entropy",
        "paper's D",
    ]
    rows = [
        [f"{f.alpha:g}", f"{f.tau:g}", *(f"{f.rounds[k].reward:.3f}" for k in rounds), f"{f.error['reward']:.0e}",
         number(f.rounds[-1].w2), number(f.rounds[-1].entropy), number(f.rounds[-1].drift)]
        for f in found
    ]  # fmt: skip
    console.out.print(plain_table(columns, rows))


def _show_verdict(found: "Verdict", as_json: bool) -> None:
    if as_json:
        print(json.dumps({"reached": found.reached, "forecast": [r.reward for r in found.forecast.rounds],
                          "exact": found.exact and [r.reward for r in found.exact.rounds],
                          "verdict": found.line}, indent=1))  # fmt: skip
        return
    columns = ["round", *(str(k) for k in range(len(found.reached)))]
    rows = [["reached", *(f"{r:.3f}" for r in found.reached)]]
    rows.append(["forecast", *(f"{r.reward:.3f}" for r in found.forecast.rounds)])
    if found.exact:
        rows.append(["exact", *(f"{r.reward:.3f}" for r in found.exact.rounds)])
    say(f"run {found.run.path}: α={found.settings.alpha:g} τ={found.settings.tau:g}")
    console.out.print(plain_table(columns, rows))
    say(found.line)
