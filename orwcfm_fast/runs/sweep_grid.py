"""The grid of a sweep: every combination of --alpha, --tau and --set, each with a name that tells its values."""

import itertools
import tomllib
from pathlib import Path
from typing import Any

from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import unknown
from orwcfm_fast.rewards import check_code_named
from orwcfm_fast.runs.resolve import agrees, anchor_name
from orwcfm_fast.settings import Finetune, Sweep, build, read_toml

# settings of the model, which is loaded once
OF_THE_MODEL = (
    "checkpoint",
    "model",
    "data",
    "prompts",
    "eval_prompts",
    "prompt_tokens",
    "image_size",
    "guidance",
    "vae_chunk",
)
ONE_FOR_ALL = (*OF_THE_MODEL, "device", "precision", "log")
PLACE = ("device", "log", "graph", "compile")  # of the machine, not of the method
MAY_CHANGE = ("alpha", "tau", *PLACE)


def grid(s: Sweep) -> dict[str, Finetune]:
    """The settings of every run by the run's name: all combinations of --tau, --alpha and --set.

    With --target-w2, which chooses α itself, α is no axis.

    Raises:
        UserError: an axis that is empty, unknown or not to be varied; a value out of bounds; two runs that would be
            the same.
    """
    if not s.alpha or not s.tau:
        raise UserError("sweep: give at least one --alpha and one --tau")
    axes = [_axis(text) for text in s.set]
    names = [key for key, _ in axes]
    if len(set(names)) < len(names):
        raise UserError("--set: name every setting once, KEY=V1,V2")
    axes += [("tau", [*s.tau]), ("alpha", [Finetune().alpha] if chooses_alpha(s) else [*s.alpha])]
    common = s.model_dump(exclude={"alpha", "tau", "set"}, exclude_unset=True)
    runs = {}
    for values in itertools.product(*(values for _, values in axes)):
        point = dict(zip((key for key, _ in axes), values, strict=True))
        settings = build(Finetune, common, point, where="sweep: ")
        more = [f"{key.replace('_', '-')}={_plain(point[key])}" for key in names]
        name = "-".join([anchor_name(settings), f"t{settings.tau:g}", *more])
        runs["".join(c if c.isalnum() or c in "-+.=" else "_" for c in name)] = settings
    _check_distinct(runs)
    return runs


def chooses_alpha(s: Sweep) -> bool:
    """Whether every run has a --target-w2, which chooses α itself."""
    return s.target_w2 is not None or any(_axis(text)[0] == "target_w2" for text in s.set)


def _check_distinct(runs: dict[str, Finetune]) -> None:
    seen: dict[str, str] = {}
    for name, s in runs.items():
        if s.weights == "linear":  # uses neither
            s = s.model_copy(update={"tau": 0.0, "normalize_weights": True})
        first = seen.setdefault(s.model_dump_json(), name)
        if first != name:
            raise UserError(
                f"sweep: {first} and {name} would be the same run: --weights linear does not use τ"
            )


def _plain(value: Any) -> str:
    value = value[0] if isinstance(value, list) else value
    return f"{value:g}" if isinstance(value, float) else str(value)


def _axis(text: str) -> tuple[str, list[Any]]:
    """KEY=V1,V2 as the name of the setting and its values.

    Raises:
        UserError: another form, or a setting that cannot be varied.
    """
    key, _, rest = text.partition("=")
    key = key.strip().lstrip("-").replace("-", "_")
    values = [v.strip() for v in rest.split(",")]
    if not all([key, *values]):
        raise UserError(f"--set {text}: write KEY=V1,V2, as in --set lr=1e-3,3e-4")
    if key in ("alpha", "tau"):
        raise UserError(f"--set {text}: give --{key} for each value")
    if key in ONE_FOR_ALL:
        raise UserError(f"--set {text}: --{key} is the same for all runs of a sweep")
    if key not in Finetune.model_fields:
        raise UserError(f"--set {text}: {unknown('setting', key, Finetune.model_fields)}")
    kind = Finetune.model_fields[key].annotation
    if kind in (int, float, bool, float | None):
        return key, [_parsed(v) for v in values]
    return key, [[v] if kind == list[str] else v for v in values]


def _parsed(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # the settings tell what would be right


def check_named(runs: dict[str, Finetune], given: dict[str, Any], path: Path) -> None:
    """A sweep that exists may come from anyone: a reward that is code runs only if the user names it again."""
    for key in ("reward", "holdout_reward"):
        rewards = [*dict.fromkeys(name for s in runs.values() for name in getattr(s, key))]
        check_code_named(rewards, given.get(key, []), path / "config.toml", key)


def widened(path: Path, given: dict[str, Any]) -> Sweep:
    """The settings of a sweep that continues: its own, with the given values of α and τ added.

    Raises:
        UserError: another given setting differs from that of the sweep.
    """
    written = read_toml(path / "config.toml")
    own = build(Sweep, written, where=f"{path / 'config.toml'}: ")
    for key, value in given.items():
        if key not in Sweep.model_fields:
            raise unknown("setting", key, Sweep.model_fields)
        if key not in MAY_CHANGE and not agrees(key, value, getattr(own, key)):
            flag = f"--{key.replace('_', '-')}"
            raise UserError(
                f"--out {path}: this sweep has {flag} {getattr(own, key)}, not {value}; use another --out"
            )
    if chooses_alpha(own) and not set(given.get("alpha", [])) <= set(own.alpha):
        raise UserError(f"--alpha has no effect: --target-w2 of the sweep {path} chooses α itself")
    added = {key: [*dict.fromkeys([*getattr(own, key), *given.get(key, [])])] for key in ("alpha", "tau")}
    return build(Sweep, written, {k: given[k] for k in PLACE if k in given}, added)
