"""The command line: parses, calls the library, prints."""


def main() -> None:
    """Entry point of `orwcfm`."""
    from orwcfm_fast.cli import look, machine, train  # noqa: F401  (they register their commands)
    from orwcfm_fast.cli.app import app

    app()
