"""From a settings class to the options of a command; name, type, default, bounds and help are declared there."""

import copy
import functools
import inspect
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orwcfm_fast.cli.completion import choices, names_of
from orwcfm_fast.cli.help import MOST_USED

PLACEHOLDERS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


def options_of(kind: type[BaseModel], most_used: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Decorator: the command gets an option for each field of `kind`, and `given`, the options that the user set.

    Only a value that the user set reaches the command, so that a TOML file overrides a default and a flag both.

    Args:
        most_used: names of the options that `--help` lists first.
    """

    def decorate(command: Callable) -> Callable:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "given"]

        @functools.wraps(command)
        def wrapped(**arguments: Any) -> Any:
            mine = {p.name: arguments[p.name] for p in own}
            given = {k: v for k, v in arguments.items() if k not in mine and v is not None and v != []}
            return command(**mine, given=given)

        options = [*own, *(_parameter(name, field) for name, field in kind.model_fields.items())]
        first = [_first(p) for name in most_used for p in options if p.name == name]
        options = [
            p.replace(kind=p.KEYWORD_ONLY)
            for p in (*first, *options)
            if p in first or p.name not in most_used
        ]
        wrapped.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in options}
        return wrapped

    return decorate


def _first(parameter: inspect.Parameter) -> inspect.Parameter:
    kind, option = get_args(parameter.annotation)
    option = copy.copy(option)
    option.rich_help_panel = MOST_USED
    return parameter.replace(annotation=Annotated[kind, option])


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    shown: dict[str, str] = field.json_schema_extra  # type: ignore[assignment]
    annotation: Any = field.annotation
    repeated = get_origin(annotation) is list
    value = get_args(annotation)[0] if repeated or float in get_args(annotation) else annotation
    allowed = get_args(value) if get_origin(value) is Literal else ()
    value = str if allowed else value  # the settings check a choice, and their message names the choices
    flag = "--" + name.replace("_", "-")
    names = ["-n"] if name == "n" else [f"{flag}/--no-{flag[2:]}"] if value is bool else [flag]
    option = typer.Option(
        *names,
        help=f"{field.description}{_default(field, shown['default_text'])}",
        show_default=False,
        rich_help_panel=shown["panel"],
        metavar=shown["metavar"] or (f"[{'|'.join(allowed)}]" if allowed else PLACEHOLDERS.get(value)),
        autocompletion=choices(allowed)
        if allowed
        else names_of(shown["complete"])
        if shown["complete"]
        else None,
    )
    kind: Any = list[value] if repeated else value  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | NoneType, option]
    )


def _default(field: FieldInfo, words: str) -> str:
    """The default as a user would type it, or in the words of the setting."""
    value = field.default
    if not words and (value is None or value is False or value in ("", [])):
        return ""
    if value is True:
        words = words or "on"
    each = value if isinstance(value, list) else [value]
    plain = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in each)
    return f"  [default: {words or plain}]"
