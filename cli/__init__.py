"""The command line: parses options, calls the library and prints the results."""


def load_app():
    """The Typer app with all commands."""
    # each registers its commands
    from orwcfm_fast.cli import doctor, look, machine, plan, rewards, train  # noqa: F401
    from orwcfm_fast.cli.app import app

    return app


def main() -> None:
    """Entry point of `orwcfm`."""
    import signal
    import sys

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without ± or α shows ? in their place
            stream.reconfigure(errors="replace")
    # SIGTERM runs the clean-up code of the command; training handles it itself
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load_app()()
