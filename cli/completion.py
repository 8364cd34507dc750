"""What the shell offers as the value of an option."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orwcfm_fast.registry import Registry

Complete = Callable[[str], list[tuple[str, str]]]


REGISTRIES = {
    "rewards": ("orwcfm_fast.rewards", "REWARDS"),
    "methods": ("orwcfm_fast.method.objectives", "METHODS"),
    "models": ("orwcfm_fast.networks.models", "MODELS"),
    "data": ("orwcfm_fast.data.datasets", "DATA"),
    "solvers": ("orwcfm_fast.method.samplers", "SOLVERS"),
    "recipes": ("orwcfm_fast.runs.recipe", "RECIPES"),
}
"""What `orwcfm list` knows: the module and name of each registry."""


def registry(kind: str) -> "Registry":
    """The registry of a kind; imports its module, and torch with it, only now."""
    module, name = REGISTRIES[kind]
    return getattr(import_module(module), name)


def choices(values: Iterable[str]) -> Complete:
    """Complete one of a few fixed values."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        return [(value, "") for value in values if value.startswith(incomplete)]

    return complete


def names_of(kind: str) -> Complete:
    """Complete a name of a registry, with its summary as the explanation."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        found = registry(kind)
        return [(name, found.summary(name)) for name in found.names() if name.startswith(incomplete)]

    return complete
