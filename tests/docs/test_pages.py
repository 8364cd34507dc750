"""What the pages say agrees with the package, with each other and with the result files."""

import importlib.util
import json
import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = (ROOT / "docs/figures.md").read_text("utf-8")
FORECAST = (ROOT / "docs/forecast.md").read_text("utf-8")
PAPER = (ROOT / "docs/paper.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
OF_OTHER_TOOLS = {
    "--help",
    "--max-restarts",
    "--nodes",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--requeue",
    "--gpus-per-task",
    "--strict",
    "--wheels",
}


def results(name: str) -> dict:
    """The result file of that name to which figures.md links."""
    (link,) = set(re.findall(rf"\.\./(benchmarks/results/{name}[^)]*\.json)", FIGURES))
    return json.loads((ROOT / link).read_text("utf-8"))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_import_paths_of_the_api_page_are_right_and_documented():
    paths = re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text("utf-8"), re.M)
    assert len(paths) >= 15
    for path in paths:
        module, _, name = path.rpartition(".")
        try:
            found = getattr(import_module(module), name)
        except AttributeError:
            found = import_module(path)
        doc = getattr(found, "__doc__", None) or found._init_fn.__doc__  # of a custom op
        assert doc, path


def test_every_public_name_is_on_the_api_page():
    import orwcfm_fast

    page = (ROOT / "docs/api.md").read_text("utf-8")
    for name in set(orwcfm_fast.__all__) - {"__version__"}:
        assert re.search(rf"^::: \S+\.{name}$", page, re.M), name


def test_flags_named_in_the_pages_exist():
    from typer.main import get_command

    from orwcfm_fast.cli import load_app
    from orwcfm_fast.cli.app import all_commands

    commands = all_commands(get_command(load_app())).values()
    known = {name for c in commands for p in c.params for name in p.opts + p.secondary_opts} | OF_OTHER_TOOLS
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
        named = {
            flag
            for code in re.findall(r"`([^`]+)`", prose)
            for flag in re.findall(r"--[a-z][a-z0-9-]*", code)
        }
        assert named <= known, f"{page.name}: {named - known}"


def test_figures_of_the_readme_are_those_of_the_manual():
    section = README.partition("## What it is good at")[2].partition("## Commands")[0]
    numbers = re.findall(r"\d+\.\d+|\b\d{2,}\b", re.sub(r"\]\(.*?\)|α = 0\.3", "", section))
    assert len(numbers) >= 10
    for number in numbers:
        assert number in FIGURES + FORECAST + PAPER, number


def test_the_tables_are_those_of_their_result_files():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    placed = []
    for page in tables.PAGES:
        text = page.read_text("utf-8")
        assert tables.written(text) == text, f"{page.name}: run python docs/tables.py"
        placed += [match[2] for match in tables.PLACE.finditer(text)]
        for name, date in re.findall(r"benchmarks/results/(\S+?)-(\d{4}-\d\d-\d\d)\.json", text):
            dates = [p.stem[-10:] for p in (ROOT / "benchmarks/results").glob(f"{name}-20??-??-??.json")]
            assert date == max(dates), f"{page.name} links to {name} of {date}"
    assert sorted(placed) == sorted(tables.TABLES), "every table has its place"


def test_memory_is_that_of_its_result_file():
    found = {row["way"]: row for row in results("memory-cpu")}
    peaks = ", ".join(f"{found[way]['peak_ratio']:.2f}×" for way in ("fp32", "bf16", "lora"))
    assert f"| {peaks} |" in FIGURES
    assert (
        f"| weights, gradients, optimiser and copies, with LoRA | {found['lora']['held_ratio']:.2f}× |"
        in FIGURES
    )


def test_killed_runs_are_those_of_the_result_file():
    found = results("kill-resume")
    assert f"{found['equal']} of {found['trials']} runs" in FIGURES and f"{found['kills']} kills" in FIGURES
