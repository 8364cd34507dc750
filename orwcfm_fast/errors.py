"""The two ways a command ends badly; anything else is a bug and shows as one."""

import sys


class UserError(ValueError):
    """A mistake in what the user gave: an argument, a value, a file. One line; exit code 2."""


class WorkError(RuntimeError):
    """A failure at work, with everything before it saved. One line; exit code 1."""


class RewardError(WorkError):
    """The reward raised, or returned what is no reward."""


class Interrupted(RuntimeError):
    """Ctrl-C or SIGTERM; says what is saved. Exit code 130 or 143."""

    def __init__(self, text: str, code: int = 130) -> None:
        super().__init__(text)
        self.code = code


def warn(text: str) -> None:
    """One line on standard error; the work goes on."""
    print(f"warning: {text}", file=sys.stderr)
