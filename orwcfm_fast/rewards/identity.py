"""Whether two names are one reward, and whether a reward's code is the one that a run began with."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from orwcfm_fast.errors import warn
from orwcfm_fast.files import read_small, write_text
from orwcfm_fast.rewards.combine import split_weight, user_code

RECORD = "reward_code.json"
MAX_BYTES = 16 << 20


def _parts(spec: str) -> tuple[str, str, float]:
    """The file or module, the function or other argument, and the weight of NAME[:ARG][=WEIGHT]."""
    name, weight = split_weight(spec)
    where, _, function = name.rpartition(":")
    return where.rpartition(":")[2] if name.startswith("process:") else where, function, weight


def _resolved(spec: str) -> str:
    where, function, weight = _parts(spec)
    if not where.endswith(".py"):
        return spec
    kind = spec.partition(where)[0]  # "process:PYTHON:" or nothing
    return f"{kind}{Path(where).resolve()}:{function}={weight:g}"


def code_of(spec: str) -> str:
    """The sha256 of the file that holds a user's reward; "" where it has none or cannot be read."""
    where, _, _ = _parts(spec)
    try:
        if not where.endswith(".py"):
            found = importlib.util.find_spec(where)
            where = (found and found.origin) or ""
        return hashlib.sha256(read_small(Path(where), MAX_BYTES)).hexdigest()
    except (OSError, ImportError, ValueError, AttributeError):
        return ""


def _recorded(folder: Path) -> dict[str, str]:
    try:
        found = json.loads(read_small(folder / RECORD, MAX_BYTES))
        return {str(key): str(value) for key, value in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _key(spec: str) -> str:
    where, function, _ = _parts(spec)
    return f"{Path(where).name}:{function}"


def same_rewards(given: Sequence[str], written: Sequence[str], folder: Path) -> bool:
    """Whether rewards named for a run are those that it has, perhaps by other paths.

    Args:
        folder: of the run, which holds a record of its rewards' code: the same function of a file with the same
            content is the same reward, wherever the file lies.
    """
    known = _recorded(folder)

    def same(a: str, b: str) -> bool:
        if a == b or _resolved(a) == _resolved(b):
            return True
        alike = _key(a) == _key(b) and split_weight(a)[1] == split_weight(b)[1]
        return alike and bool(user_code([a]) and user_code([b])) and known.get(_key(b), "-") == code_of(a)

    return len(given) == len(written) and all(same(a, b) for a, b in zip(given, written, strict=True))


def record_code(specs: Sequence[str], folder: Path) -> None:
    """Write which code the rewards of a run have; warn where it is another than was written before."""
    known = _recorded(folder)
    found = {_key(spec): code_of(spec) for spec in user_code(specs)}
    for spec, code in found.items():
        if known.get(spec, code) != code:
            warn(f"reward {spec}: its code has changed since this run began; its rounds are not comparable")
    if found:
        write_text(folder / RECORD, json.dumps(found, indent=1) + "\n")
