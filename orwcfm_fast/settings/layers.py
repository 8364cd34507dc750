"""Settings from layers of values (defaults, recipe, TOML file, flags), and the TOML files themselves."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from orwcfm_fast.errors import UserError
from orwcfm_fast.files import read_text
from orwcfm_fast.registry import unknown

MAX_TOML_BYTES = 24 << 10  # tomllib takes time quadratic in the length of a dotted key

S = TypeVar("S", bound=BaseModel)


def build(kind: type[S], *layers: dict[str, Any], where: str = "") -> S:
    """Settings of a class from layers of values; a later layer overrides an earlier one, None overrides nothing.

    Raises:
        UserError: an unknown key (with the nearest known one), a wrong type or a value out of bounds.
    """
    values = {k: v for layer in layers for k, v in layer.items() if v is not None}
    for key in values:
        if key not in kind.model_fields:
            raise UserError(where + str(unknown("setting", key, kind.model_fields)))
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        field = kind.model_fields.get(name)
        meaning = f" ({field.description})" if field else ""
        wanted = first["msg"][0].lower() + first["msg"][1:]
        shown = repr(first["input"])
        shown = shown if len(shown) <= 80 else shown[:80] + "…"
        raise UserError(f"{where}{name} = {shown}: {wanted}{meaning}") from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a TOML file; a hyphen in a key is read as an underscore.

    Raises:
        UserError: the file is missing, too large or not TOML.
    """
    try:
        text = read_text(Path(path), MAX_TOML_BYTES)
        return {k.replace("-", "_"): v for k, v in tomllib.loads(text).items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # of tomllib, of decoding, of an integer with too many digits
        raise UserError(f"{path}: not a TOML file: {error}") from None


def to_toml(values: dict[str, Any]) -> str:
    """Flat settings as TOML; a value of None is left out."""
    return tomli_w.dumps({k: v for k, v in values.items() if v is not None})
