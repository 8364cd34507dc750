"""Names to functions: one registry for each kind of thing, filled by decorators and by plugins.

A file dropped into a registry's package folder is found without any other edit: the first look-up imports every
module of that folder, and with it runs their decorators.
"""

import difflib
import pkgutil
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from orwcfm_fast.errors import UserError


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """The error for a name that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(name, known := sorted(known), n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    return UserError(f"unknown {kind} '{name}'; {hint}" + (f" ({where})" if where else ""))


class Registry:
    """Entries of one kind by name.

    Args:
        kind: what an entry is called in messages and by `orwcfm list`, e.g. "reward".
        package: every module of it is imported before the first look-up.
        group: entry-point group of plugins; each entry point names one entry.
    """

    def __init__(self, kind: str, package: str | None = None, group: str | None = None) -> None:
        self.kind, self._package, self._group = kind, package, group
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator: the entry `name`."""

        def add(entry: Any) -> Any:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered twice; give one of them another name")
            self._entries[name] = entry
            return entry

        return add

    def _load(self) -> None:
        """Import every module of the package.

        Raises:
            UserError: one of them cannot be imported; names it.
        """
        package, self._package = self._package, None
        for module in pkgutil.iter_modules(import_module(package).__path__) if package else ():
            try:
                import_module(f"{package}.{module.name}")
            except Exception as error:
                self._package = package  # the next look-up says so again
                text = f"{type(error).__name__}: {error}"
                raise UserError(f"{self.kind} module {package}.{module.name}: {text}") from error

    def _plugins(self) -> dict[str, Any]:
        return {p.name: p for p in entry_points(group=self._group)} if self._group else {}

    def get(self, name: str) -> Any:
        """The entry `name`; a plugin is imported only when it is looked up by name.

        Raises:
            UserError: no such entry; names the nearest one.
        """
        self._load()
        if name not in self._entries:
            plugins = self._plugins()
            if name not in plugins:
                raise unknown(self.kind, name, [*self._entries, *plugins], f"orwcfm list {self.plural}")
            try:
                self._entries[name] = plugins[name].load()
            except Exception as error:
                raise UserError(f"{self.kind} plugin '{name}' ({plugins[name].value}): {error}") from error
        return self._entries[name]

    @property
    def plural(self) -> str:
        return self.kind if self.kind == "data" else self.kind + "s"

    def names(self) -> list[str]:
        self._load()
        return [*self._entries, *(p for p in self._plugins() if p not in self._entries)]

    def summary(self, name: str) -> str:
        """First line of the entry's docstring, for `orwcfm list`."""
        if name not in self._entries:
            return f"plugin ({self._plugins()[name].value})"
        return (self._entries[name].__doc__ or "").strip().split("\n")[0]
