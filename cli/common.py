"""The options that several commands share, and how a command's settings are put together."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel

from orwcfm_fast.cli.completion import names_of
from orwcfm_fast.settings import build, read_toml


def option(*names: str, panel: str, help: str, metavar: str = "", **more: Any) -> Any:
    """An option of a command that is no setting; `metavar` is the placeholder of its value."""
    return typer.Option(
        *names, help=help, rich_help_panel=panel, metavar=metavar or None, show_default=False, **more
    )


Config = Annotated[
    Path | None,
    option(panel="Machine", help="TOML file of settings; a flag overrides it", metavar="FILE"),
]
Recipe = Annotated[
    str,
    option(
        panel="Model and data",
        help="settings of an experiment that ships with orwcfm (orwcfm list recipes); --config and flags override it",
        metavar="NAME",
        autocompletion=names_of("recipes"),
    ),
]
Out = Annotated[Path | None, option(panel="Output", help="where the results go", metavar="PATH")]
Overwrite = Annotated[bool, option("--overwrite", panel="Output", help="replace what is at --out")]
Quiet = Annotated[bool, option("--quiet", panel="Output", help="print the results only")]
Json = Annotated[bool, option("--json", panel="Output", help="print the results as JSON")]
Debug = Annotated[bool, option("--debug", panel="Machine", help="show the traceback of an error")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a run, a checkpoint, a .pt file or a preset  [default: the newest run under ./runs]",
        show_default=False,
    ),
]
Preset = Annotated[
    str,
    option(
        "--model",
        panel="Model and data",
        help="network preset of a .pt file (orwcfm list models)",
        metavar="NAME",
        autocompletion=names_of("models"),
    ),
]
Data = Annotated[
    str,
    option(
        "--data",
        panel="Model and data",
        help="digits or mnist: take the model that ships; else the data of a .pt file (orwcfm list data)",
        metavar="NAME",
        autocompletion=names_of("data"),
    ),
]

S = TypeVar("S", bound=BaseModel)


def settings(
    kind: type[S], config: Path | None, given: dict[str, Any], recipe: dict[str, Any] | None = None
) -> S:
    """The defaults, overridden by a recipe, by the TOML file and by the flags, in this order.

    Raises:
        UserError: an unknown setting or a wrong value; names the file where it is from one. The file names a reward
            that is code, and no flag names it.
    """
    file = read_toml(config) if config else {}
    built = build(kind, recipe or {}, file, given, where=f"{config}: " if config else "")
    for key in {"reward", "holdout_reward"} & (file.keys() - given.keys()):
        from orwcfm_fast.rewards import check_code_named

        assert config
        check_code_named(getattr(built, key), (), config, key)
    return built
