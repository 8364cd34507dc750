"""The `orwcfm` command: its panels, and how errors end it."""

import os
import shutil
import sys

import typer
from typer.core import TyperGroup

from orwcfm_fast.cli.console import err
from orwcfm_fast.errors import Interrupted, UserError, WorkError

WIDE = 110  # columns that the longest option needs beside its text


class OneLineErrors(TyperGroup):
    """Ends every error in one line: 2 for the user's, 1 at work, 130 on Ctrl-C; tracebacks with --debug."""

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
            if hasattr(error, "format_message"):  # click's: a wrong option or argument
                _fail(" ".join(error.format_message().split()), 2)
            if debug:
                raise
            _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)

    def get_command(self, ctx, cmd_name):
        command = super().get_command(ctx, cmd_name)
        if command and shutil.get_terminal_size().columns < WIDE:
            command.rich_markup_mode = None  # type: ignore[attr-defined]  # its table would cut long names off
        return command

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # outside training; typer would end it without a word
            raise Interrupted("interrupted") from None


def _fail(text: str, code: int) -> None:
    err.print("error: " + " ".join(text.split("\n")), markup=False)
    sys.exit(code)


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    help="Fine-tune flow-matching models online with any reward (ORW-CFM-W2).",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from orwcfm_fast import __version__

        print(f"orwcfm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    ctx: typer.Context, version: bool = typer.Option(False, "--version", callback=_version, is_eager=True)
) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1" and ctx.invoked_subcommand != "finetune":
        raise UserError(f"{ctx.invoked_subcommand}: works in one process; torchrun is for finetune")
