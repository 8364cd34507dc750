"""The errors that a user sees as one line; any other exception is a bug and shows its type."""

import sys


class UserError(ValueError):
    """A wrong argument, value or file of the user. The command prints one line and exits with code 2."""


class WorkError(RuntimeError):
    """A failure during the work; what was done before it is saved. The command prints one line and exits with 1."""


class RewardError(WorkError):
    """A reward raised an exception, or returned something else than one finite number for each sample."""


class Interrupted(RuntimeError):
    """Ctrl-C or SIGTERM ended the work; the message tells what is saved. Exit code 130 or 143."""

    def __init__(self, text: str, code: int = 130) -> None:
        super().__init__(text)
        self.code = code


def warn(text: str) -> None:
    """Print one line to standard error; the work continues."""
    print(f"warning: {text}", file=sys.stderr)
