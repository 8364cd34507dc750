"""The grid of a sweep: every combination of --alpha, --tau and --set, each under a name that says it."""

import itertools
import tomllib
from typing import Any

from orwcfm_fast.errors import UserError
from orwcfm_fast.registry import unknown
from orwcfm_fast.runs.resolve import anchor_name
from orwcfm_fast.settings import Finetune, Sweep, build

# of the model that is loaded once, and of the machine
OF_THE_MODEL = (
    "checkpoint",
    "model",
    "data",
    "prompts",
    "prompt_tokens",
    "image_size",
    "guidance",
    "vae_chunk",
)
ONE_FOR_ALL = (*OF_THE_MODEL, "device", "precision", "log")


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
    steered = s.target_w2 is not None or "target_w2" in names
    axes += [("tau", [*s.tau]), ("alpha", [Finetune().alpha] if steered else [*s.alpha])]
    common = s.model_dump(exclude={"alpha", "tau", "set"})
    runs = {}
    for values in itertools.product(*(values for _, values in axes)):
        point = dict(zip((key for key, _ in axes), values, strict=True))
        settings = build(Finetune, common, point, where="sweep: ")
        more = [f"{key.replace('_', '-')}={_plain(point[key])}" for key in names]
        name = "-".join([anchor_name(settings), f"t{settings.tau:g}", *more])
        runs["".join(c if c.isalnum() or c in "-+.=" else "_" for c in name)] = settings
    _check_distinct(runs)
    return runs


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
    """'KEY=V1,V2' as the setting and its values."""
    key, _, rest = text.partition("=")
    key = key.strip().lstrip("-").replace("-", "_")
    values = [v.strip() for v in rest.split(",")]
    if not all([key, *values]):
        raise UserError(f"--set {text}: write KEY=V1,V2, as in --set lr=1e-3,3e-4")
    if key in ("alpha", "tau"):
        raise UserError(f"--set {text}: give --{key} for each value")
    if key in ONE_FOR_ALL:
        raise UserError(f"--set {text}: --{key} is one for all runs of a sweep")
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
        return text  # the settings say what would be right
