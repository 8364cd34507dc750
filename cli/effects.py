"""An option that would do nothing beside the others ends the command, with an error that says why.

Checked are the options of the command line alone: a TOML file may hold more settings than one command uses.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel

from orwcfm_fast.errors import UserError
from orwcfm_fast.settings import Conditioned, Settings

FLAGS = {"n": "-n", "preset": "--model", "models": "MODEL"}
OF_PROMPTS = ("pickscore", "hpsv2", "imagereward", "clipscore")
REMOTE = ("judge", "http", "https")
CONDITIONS = tuple(key for key in Conditioned.model_fields if key not in Settings.model_fields)


@dataclass(frozen=True)
class Rule:
    """The options do nothing where `idle` is true of the command's settings and arguments."""

    options: tuple[str, ...]
    idle: Callable[[Any], bool]
    because: str


def check_effect(rules: Iterable[Rule], given: Iterable[str], *settings: BaseModel, **arguments: Any) -> None:
    """Apply rules to the options that the user set.

    Args:
        given: names of the settings that were set on the command line.
        settings: of the command; of each run for a sweep, in all of which an option must do nothing.
        arguments: options of the command that are no settings.

    Raises:
        UserError: one of the options would have no effect.
    """
    named = {*given, *(key for key, value in arguments.items() if value not in (None, "", False, []))}
    cases = [SimpleNamespace(**(vars(s) | arguments)) for s in settings]
    for rule in rules:
        for option in rule.options:
            if option in named and all(rule.idle(case) for case in cases):
                flag = FLAGS.get(option, f"--{option.replace('_', '-')}")
                raise UserError(f"{flag} has no effect: {rule.because.format_map(vars(cases[0]))}")


def _no_drift(v: Any) -> bool:
    from orwcfm_fast.runs.drift_control import is_idle

    return is_idle(v)


def _adaptive(v: Any) -> bool:
    from orwcfm_fast.method.samplers import SOLVERS

    return SOLVERS.get(v.solver).adaptive


def _no_reward(*names: str, features: str = "") -> Callable[[Any], bool]:
    """No reward is one of these, nor a plugin, which may read any option."""

    def idle(v: Any) -> bool:
        specs = [*v.reward, *getattr(v, "holdout_reward", [])]
        plugins = [point.name for point in entry_points(group="orwcfm.rewards")]
        used = any(spec.partition("=")[0].partition(":")[0] in (*names, *plugins) for spec in specs)
        return not used and (not features or getattr(v, "features", "") != features)

    return idle


def _clip_has_text(v: Any) -> bool:
    specs = [*v.reward, *getattr(v, "holdout_reward", [])]
    clip = [spec for spec in specs if spec.partition("=")[0].partition(":")[0] == "clip"]
    return bool(clip) and all(":" in spec for spec in clip) and _no_reward(*OF_PROMPTS)(v)


def _no_file(v: Any) -> bool:
    """No model is a .pt file, whose network and data must be named; a pipeline may be named by --model alone."""
    from orwcfm_fast.networks.flow.library import is_pipeline

    return not (is_pipeline(v.preset) and not any(v.models)) and not any(Path(m).is_file() for m in v.models)


def _wanted(v: Any) -> bool:
    return v.want_reward is not None or v.want_w2 is not None


def _in_place(v: Any) -> bool:
    from orwcfm_fast.data.datasets import SHIPPED

    return v.data.partition(":")[0] in (*SHIPPED, "folder")


def _digits_model(v: Any) -> bool:
    return not v.checkpoint and not v.model


def _other_method(*names: str) -> Callable[[Any], bool]:
    return lambda v: v.method not in names


def _no_alpha(v: Any) -> bool:
    from orwcfm_fast.method.objectives import METHODS

    return not METHODS.get(v.method).uses_alpha


def _signal_is_not(kind: str) -> Callable[[Any], bool]:
    def idle(v: Any) -> bool:
        from orwcfm_fast.method.objectives import METHODS

        return METHODS.get(v.method).signal != kind

    return idle


OVERWRITE = (Rule(("overwrite",), lambda v: v.out is None, "it is about --out, which is not given"),)
SAMPLING = (Rule(("nfe", "grid"), _adaptive, "solver {solver} chooses its own time steps"),)
WEIGHTING = (
    Rule(("alpha",), _no_alpha, "--method {method} does not use α"),
    Rule(("weights", "normalize_weights"), _signal_is_not("weight"), "--method {method} has no weights"),
    Rule(("adrpo_beta0",), _other_method("adrpo"), "it is for --method adrpo"),
    Rule(("ram_m",), _other_method("ram"), "it is for --method ram"),
    Rule(("raft_best_of",), _signal_is_not("best"), "it is for --method raft"),
    Rule(("nft_beta",), _other_method("nft"), "it is for --method nft"),
    Rule(("kl",), _other_method("nft", "awm"), "it is for --method nft or awm"),
    Rule(
        ("tau",), lambda v: v.weights == "linear", "--weights linear takes the rewards themselves as weights"
    ),
    Rule(
        ("normalize_weights",), lambda v: v.weights == "linear", "--weights linear always divides by the mean"
    ),
)
REWARDS = (
    Rule(("prompt",), _no_reward("clip", *OF_PROMPTS), "no reward compares samples with a text"),
    Rule(("negative", "clip_score"), _no_reward("clip"), "no reward is clip"),
    Rule(("prompt",), _clip_has_text, "the reward clip:TEXT names its own text"),
    Rule(
        ("clip_model", "clip_weights", "clip_precision"),
        _no_reward("clip", "aesthetic", "geneval", features="clip"),
        "no reward and no features use CLIP",
    ),
    Rule(("classifier_size", "classifier_pixels"), _no_reward("classifier"), "no reward is a classifier"),
    Rule(
        ("reward_timeout",),
        _no_reward("process", *REMOTE),
        "no reward runs in a process of its own or on a server",
    ),
    Rule(("reward_requests",), _no_reward(*REMOTE), "no reward runs on a server"),
    Rule(
        ("question", "judge_answer", "judge_rate", "judge_dry_run"),
        _no_reward("judge"),
        "no reward is a judge",
    ),
)
PLAN = (Rule(("shard",), lambda v: v.ranks == 1, "one rank holds everything; name several with --ranks"),)

FINETUNE = (
    *OVERWRITE,
    *SAMPLING,
    *WEIGHTING,
    *REWARDS,
    Rule(("drift_control",), _no_drift, "with these settings nothing moves at τ = 0, or no τ is used"),
    Rule(("alpha",), lambda v: v.target_w2 is not None, "--target-w2 chooses α anew every round"),
    Rule(
        ("standardize_rewards",),
        lambda v: v.standardize_rewards and v.weights == "advantage" and len(v.reward) < 2,
        "--weights advantage standardises a single reward already",
    ),
    Rule(
        ("guard_ess", "guard_w2", "guard_velocity", "guard_diversity"),
        lambda v: v.guard == "off",
        "--guard is off",
    ),
    Rule(("micro_batch",), lambda v: v.micro_batch >= v.batch, "a batch of {batch} is no larger"),
    Rule(
        (*CONDITIONS, "gradient_checkpointing", "eval_prompts", "lora_init"),
        _digits_model,
        "the digits model is no pipeline with prompts",
    ),
    Rule(
        ("lora_alpha", "lora_kind", "lora_targets"),
        lambda v: not v.lora and not v.lora_init,
        "it is about the adapters of --lora, which is not given",
    ),
    Rule(("lora_targets",), lambda v: bool(v.lora_init), "the layers are those of --lora-init"),
)
PRETRAIN = (*OVERWRITE, Rule(("data_dir",), _in_place, "the dataset {data} is not downloaded"))
PRESET = (Rule(("preset", "data"), _no_file, "it describes a .pt file, and no MODEL is one"),)
SAMPLE = (*OVERWRITE, *SAMPLING, *PRESET)
EVALUATE = (*SAMPLING, *PRESET)
PREDICT = (
    Rule(
        ("alpha", "tau", "rounds", "weights", "normalize_weights", "models", "preset", "data"),
        lambda v: v.versus is not None,
        "--versus takes it from the run",
    ),
    Rule(("exact",), lambda v: v.versus is not None, "--versus shows the exact answer where there is one"),
    Rule(("want_reward", "want_w2"), lambda v: v.exact or v.versus is not None, "only a forecast finds an α"),
    Rule(
        ("out",),
        lambda v: v.exact or v.versus is not None or _wanted(v),
        "only a table of forecasts has a picture",
    ),
    Rule(("models", "preset"), lambda v: v.exact and v.data, "--exact --data {data} needs no model"),
    Rule(
        ("n", "scored", "chunk", "solver", "nfe", "grid", "seed", "device", "precision", *CONDITIONS),
        lambda v: v.exact,
        "--exact draws no samples",
    ),
    Rule(("preset", "data"), lambda v: not v.exact and _no_file(v), PRESET[0].because),
    Rule(("alpha",), _wanted, "--want-reward and --want-w2 find the α"),
    Rule(("tau",), lambda v: _wanted(v) and len(v.tau) > 1, "α is found for one τ; give --tau once"),
    *SAMPLING,
    *WEIGHTING,
)
