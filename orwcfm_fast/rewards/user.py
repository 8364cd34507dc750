"""Rewards that users bring: `file.py:function` or `package.module:function`, run only when named."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards.registry import Reward


def is_user_reward(spec: str) -> bool:
    """Whether a name that is not registered has the form of a user's function."""
    where, colon, _ = spec.rpartition(":")
    return bool(colon) and (where.endswith(".py") or all(part.isidentifier() for part in where.split(".")))


def load_user_reward(spec: str) -> Reward:
    """The function that `spec` names.

    Raises:
        UserError: the file, module or function is not there, or importing it fails.
    """
    where, _, name = spec.rpartition(":")
    try:
        module = _file(Path(where)) if where.endswith(".py") else _module(where)
    except Exception as error:
        raise UserError(f"reward '{spec}': {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        callables = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise UserError(
            f"reward '{spec}': {where} has no function '{name}' (has: {', '.join(callables) or 'none'})"
        )
    return function


def _file(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"orwcfm_user_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str):
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)
