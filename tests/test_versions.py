"""The range of versions that pyproject.toml declares, and what of torch the package may not lean on."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from orwcfm_fast.errors import WorkError

ROOT = Path(__file__).parents[1]
PRIVATE = re.compile(r"\btorch(?:\.[a-z]\w*)*\._(?!_)\w+")
WITH_A_GUARD = "orwcfm_fast/torch_private.py"
BESIDE = {"orwcfm_fast/networks/inference.py": ["torch._foreach_copy_"]}
"""There is no public name for one launch that copies many tensors; torch's optimisers have used this one since 2.1."""


def private_names(source: Path) -> list[str]:
    return PRIVATE.findall(source.read_text())


def test_torchs_private_names_are_used_behind_one_guard():
    sources = [p for f in ("orwcfm_fast", "kernels", "cli", "benchmarks") for p in (ROOT / f).rglob("*.py")]
    found = {str(p.relative_to(ROOT)): private_names(p) for p in sources}
    assert found.pop(WITH_A_GUARD)
    assert {file: names for file, names in found.items() if names} == BESIDE


def test_a_torch_without_those_names_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._subclasses.fake_tensor", None)
    monkeypatch.delitem(sys.modules, "orwcfm_fast.torch_private", raising=False)
    with pytest.raises(WorkError, match=r"memory plan of a pipeline needs names that torch .* has moved"):
        import orwcfm_fast.torch_private  # noqa: F401


def test_the_lowest_versions_tested_are_those_that_the_package_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["test"], *extras["dev"]]
    lowest = {re.sub("[>~]=", "==", re.split("[,;]", text)[0]).strip() for text in declared}
    lines = (ROOT / "constraints" / "lowest.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} == lowest
