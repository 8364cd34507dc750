"""The two ways a command ends badly; anything else is a bug and shows as one."""


class UserError(ValueError):
    """A mistake in what the user gave: an argument, a value, a file. One line; exit code 2."""


class WorkError(RuntimeError):
    """A failure at work, with everything before it saved. One line; exit code 1."""


class RewardError(WorkError):
    """The reward raised, or returned what is no reward."""


class Interrupted(RuntimeError):
    """Ctrl-C; says what is saved. Exit code 130."""
