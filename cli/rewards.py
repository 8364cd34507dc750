"""The commands `orwcfm rewards …`."""

import sys
from typing import Annotated, Any

import typer

from orwcfm_fast.cli.app import group
from orwcfm_fast.cli.common import Debug, option
from orwcfm_fast.cli.console import say
from orwcfm_fast.cli.help import SectionedCommand
from orwcfm_fast.cli.options import options_of
from orwcfm_fast.settings import Serve, build

rewards = group(
    "Machine",
    "rewards",
    "Serve a reward to other machines; install one with an environment of its own.",
)


@rewards.command("serve", cls=SectionedCommand)
@options_of(Serve)
def serve(
    given: dict[str, Any],
    reward: Annotated[
        str,
        typer.Argument(
            metavar="REWARD", help="FILE.py:FUNCTION, or another reward by its name", show_default=False
        ),
    ],
    debug: Debug = False,
) -> None:
    """Serve a reward function over HTTP, for --reward http://HOST:PORT."""
    from orwcfm_fast.rewards import server

    server.serve(reward, build(Serve, given))


@rewards.command("install", cls=SectionedCommand)
def install(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="of the reward, e.g. hpsv3", show_default=False)
    ],
    python: Annotated[
        str,
        option(panel="Machine", help="interpreter of the environment  [default: this one]", metavar="PYTHON"),
    ] = "",
    debug: Debug = False,
) -> None:
    """Make the Python environment of a reward whose packages clash with others, and import the reward once."""
    from orwcfm_fast.rewards import environment

    folder = environment.install(name, python or sys.executable, say)
    say(f"{folder}: use it with --reward {name}")
