"""The commands `orwcfm rewards …`."""

from typing import Annotated, Any

import typer

from orwcfm_fast.cli.app import group
from orwcfm_fast.cli.common import Debug
from orwcfm_fast.cli.help import SectionedCommand
from orwcfm_fast.cli.options import options_of
from orwcfm_fast.settings import Serve, build

rewards = group("Machine", "rewards", "Serve a reward to other machines and languages.")


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
