"""From a settings class to a command's options: name, type, default, bounds and help stay declared once."""

import functools
import inspect
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel

HIDDEN_DEFAULT: tuple = ("", [], None)


def options_of(kind: type[BaseModel]) -> Callable[[Callable], Callable]:
    """Decorator: the command gets one option for each field of `kind`, and `given`: what the user set.

    A field's value reaches the command only if it was given, so that TOML files come between default and flag.
    """

    def decorate(command: Callable) -> Callable:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "given"]

        @functools.wraps(command)
        def wrapped(**arguments: Any) -> Any:
            mine = {p.name: arguments[p.name] for p in own}
            given = {k: v for k, v in arguments.items() if k not in mine and v is not None and v != []}
            return command(**mine, given=given)

        extra = [_parameter(name, field) for name, field in kind.model_fields.items()]
        wrapped.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in (*own, *extra)}
        return wrapped

    return decorate


def _parameter(name: str, field) -> inspect.Parameter:
    annotation = field.annotation
    flag = "--" + name.replace("_", "-")
    names = ["-n"] if name == "n" else [f"{flag}/--no-{flag[2:]}"] if annotation is bool else [flag]
    if get_origin(annotation) is list:
        kind: Any = list[get_args(annotation)[0]]  # type: ignore[misc]
    elif annotation in (bool, int, float):
        kind = annotation
    elif annotation == float | None:
        kind = float
    else:
        kind = str  # Literals are checked by the settings, whose message names the choices
    shown = field.default
    show = False if shown in HIDDEN_DEFAULT and not isinstance(shown, bool | int) else str(shown)
    option = typer.Option(*names, help=field.description, show_default=show)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | NoneType, option]
    )
