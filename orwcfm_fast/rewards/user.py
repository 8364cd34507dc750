"""Rewards that users bring: `file.py:function` or `package.module:function`, run only when named."""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards.isolation import describe, isolated
from orwcfm_fast.rewards.registry import Reward

_folders: set[str] = set()
"""Those of the reward files loaded so far."""


def is_user_reward(spec: str) -> bool:
    """Whether a name that is not registered has the form of a user's function."""
    where, colon, _ = spec.rpartition(":")
    return bool(colon) and (where.endswith(".py") or all(part.isidentifier() for part in where.split(".")))


def load_user_reward(spec: str) -> Reward:
    """The function that `spec` names; its module is imported within `isolated`.

    Raises:
        UserError: the file, module or function is not there, or importing it fails.
    """
    where, _, name = spec.rpartition(":")
    try:
        with isolated():
            module = _file(Path(where)) if where.endswith(".py") else _module(where)
    except (Exception, SystemExit) as error:
        raise UserError(f"reward '{spec}': {describe(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        callables = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise UserError(
            f"reward '{spec}': {where} has no function '{name}' (has: {', '.join(callables) or 'none'})"
        )
    # one that is called in a thread must leave the module path alone: its imports stand at the top of its file
    alone = not where.endswith(".py") or getattr(function, "concurrent", False)
    return function if alone else _beside(function, str(Path(where).resolve().parent))


def _beside(function: Reward, folder: str) -> Reward:
    """The function with the modules of its folder at hand, for imports within it."""

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        with _neighbours(folder):
            return function(*args, **named)

    return call


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(f"orwcfm_user_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _neighbours(str(path.parent)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _neighbours(folder: str) -> Iterator[None]:
    """Modules beside a reward's file can be imported, as when Python runs the file.

    The modules of another reward's folder are hidden meanwhile, since both may have, say, a utils.py.
    """
    others = [name for name, module in [*sys.modules.items()] if _folder(module) in _folders - {folder}]
    hidden = {name: sys.modules.pop(name) for name in others if not name.startswith("orwcfm_user_")}
    before = list(sys.path)
    sys.path[:] = [folder, *(entry for entry in sys.path if entry not in _folders)]
    try:
        yield
    finally:
        _folders.add(folder)
        sys.path[:] = before
        sys.modules.update(hidden)


def _folder(module: ModuleType) -> str:
    return os.path.dirname(getattr(module, "__file__", None) or "")


def _module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)
