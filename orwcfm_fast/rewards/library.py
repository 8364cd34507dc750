"""The libraries of the extra `rewards`, imported where a reward needs one."""

from importlib import import_module
from typing import Any

from orwcfm_fast.errors import UserError


def library(module: str, reward: str) -> Any:
    """The module of that name.

    Raises:
        UserError: it is not installed; names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise UserError(
            f"reward '{reward}': {missing} is not installed; pip install 'orwcfm-fast[rewards]'"
        ) from None
