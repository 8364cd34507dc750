"""What commands share: the common flags, and how settings are put together."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel

from orwcfm_fast.settings import build, read_toml

Config = Annotated[Path | None, typer.Option(help="TOML file of settings; flags win")]
Recipe = Annotated[
    str,
    typer.Option(help="an experiment that ships with the tool (orwcfm list recipes); config and flags win"),
]
Out = Annotated[Path | None, typer.Option(help="where results go")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
Quiet = Annotated[bool, typer.Option("--quiet", help="results only")]
Debug = Annotated[bool, typer.Option("--debug", help="tracebacks")]
Json = Annotated[bool, typer.Option("--json", help="results as JSON on standard output")]
Model = Annotated[
    str,
    typer.Argument(metavar="[MODEL]", help="run, checkpoint, .pt file or preset; default: the newest run"),
]

S = TypeVar("S", bound=BaseModel)


def settings(
    kind: type[S], config: Path | None, given: dict[str, Any], recipe: dict[str, Any] | None = None
) -> S:
    """Defaults, then a recipe, then the TOML file, then the flags."""
    file = read_toml(config) if config else {}
    return build(kind, recipe or {}, file, given, where=f"{config}: " if config else "")
