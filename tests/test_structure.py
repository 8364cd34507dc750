"""Imports point one way: between the folders there is no circle, and the method knows nothing of what runs it."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = ("kernels", "cli", "benchmarks")  # stand at the top, install inside the package


def room_of(dotted: str) -> str:
    """The folder of a module of the package, or its own name where it lies at the root."""
    return dotted.removeprefix("orwcfm_fast").strip(".").partition(".")[0]


def modules() -> dict[str, Path]:
    found = {}
    for place in ("orwcfm_fast", *OUTSIDE):
        for path in (ROOT / place).rglob("*.py"):
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[dotted if place == "orwcfm_fast" else f"orwcfm_fast.{dotted}"] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, wherever in it, types alone left out."""
    tree = ast.parse(path.read_text("utf-8"))
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("orwcfm_fast"):
            for name in node.names if id(node) not in types_only else ():
                full = f"{node.module}.{name.name}"
                found.add(full if full in known else node.module)
    return found


@pytest.fixture(scope="module")
def rooms() -> dict[str, set[str]]:
    """What each room imports of the others; the package's own `__init__` loads lazily and is left out."""
    known, found = modules(), {}
    for dotted, path in known.items():
        if room := room_of(dotted):
            others = {room_of(other) for other in imports_of(path, known)}
            found.setdefault(room, set()).update(others - {room, ""})
    return found


def test_there_is_no_circle_between_folders(rooms):
    try:
        order = [*TopologicalSorter(rooms).static_order()]
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")
    assert order.index("kernels") < order.index("method") < order.index("runs") < order.index("cli")


def test_the_method_imports_nothing_of_what_runs_it(rooms):
    assert not rooms["method"] & {
        "runs",
        "reporting",
        "cli",
        "control",
        "checkpoints",
        "planning",
        "evaluation",
    }
    assert rooms["kernels"] == set()


def test_a_circle_would_be_seen(rooms):
    with pytest.raises(CycleError):
        TopologicalSorter(rooms | {"kernels": {"cli"}}).prepare()


def test_every_folder_with_code_is_installed():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    folders = {
        dotted if path.name == "__init__.py" else dotted.rpartition(".")[0]
        for dotted, path in modules().items()
    }
    assert sorted(listed) == sorted(folders)
