"""The `orwcfm` command: the sections of its help, and how an error ends it."""

import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from orwcfm_fast.cli.console import err
from orwcfm_fast.cli.help import COMMAND_SECTIONS, SectionedCommand, write_sections
from orwcfm_fast.errors import Interrupted, UserError, WorkError


class OneLineErrors(TyperGroup):
    """Ends every error in one line: exit code 2 for the user's, 1 for a failure at work, 130 on Ctrl-C."""

    def main(self, args=None, prog_name=None, standalone_mode: bool = True, **extra):  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        debug = "--debug" in (sys.argv if args is None else args)
        try:
            code = super().main(args, prog_name or "orwcfm", standalone_mode=False, **extra)
            sys.exit(code if isinstance(code, int) else 0)
        except (UserError, WorkError) as error:
            if debug:
                raise
            _fail(str(error), 2 if isinstance(error, UserError) else 1)
        except Interrupted as error:
            _fail(str(error), error.code)
        except Exception as error:
            if hasattr(error, "format_message"):  # Typer's own, for a wrong option or argument
                _fail(" ".join(error.format_message().split()), 2)
            if debug:
                raise
            _fail(f"{type(error).__name__}: {error} (--debug shows the traceback)", 1)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # outside training; Typer would end without a message
            raise Interrupted("interrupted") from None

    def format_commands(self, ctx, formatter) -> None:
        commands: list[Any] = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        rows = [(c.rich_help_panel, c.name, c.get_short_help_str(limit=200)) for c in commands]
        write_sections(formatter, COMMAND_SECTIONS, rows)


def _fail(text: str, code: int) -> None:
    err.print("error: " + " ".join(text.split("\n")), markup=False)
    sys.exit(code)


def all_commands(group: Any) -> dict[str, Any]:
    """The commands of a group and of the groups in it by what follows `orwcfm`, e.g. "rewards serve"."""
    found: dict[str, Any] = {}
    for name, one in group.commands.items():
        inner = (
            {f"{name} {k}": v for k, v in all_commands(one).items()}
            if hasattr(one, "commands")
            else {name: one}
        )
        found |= inner
    return found


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Fine-tune flow-matching models online with any reward (ORW-CFM-W2).",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def command(section: str, name: str | None = None) -> Callable[[Callable], Callable]:
    """Decorator: a command of `orwcfm` under one of COMMAND_SECTIONS."""
    return app.command(name, cls=SectionedCommand, rich_help_panel=section)


def group(section: str, name: str, help: str) -> typer.Typer:
    """A group of commands, `orwcfm NAME COMMAND`, under one of COMMAND_SECTIONS."""
    made = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=help)
    app.add_typer(made, name=name, rich_help_panel=section)
    return made


def _version(value: bool) -> None:
    if value:
        from orwcfm_fast import __version__

        print(f"orwcfm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    ctx: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    if os.environ.get("WORLD_SIZE", "1") == "1" or ctx.invoked_subcommand == "finetune":
        return
    from orwcfm_fast.distributed import launched

    if launched():
        raise UserError(f"{ctx.invoked_subcommand}: works in one process; torchrun is for finetune")
