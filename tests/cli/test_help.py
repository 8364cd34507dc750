"""What `--help` says, in which order, and how little it imports to say it."""

import re
import subprocess
import sys

import pytest

from orwcfm_fast.cli import load_app
from orwcfm_fast.cli.help import COMMAND_SECTIONS, SECTIONS

COMMANDS = ["pretrain", "finetune", "sweep", "sample", "evaluate", "predict", "doctor", "list", "bench"]
HELP_NEEDS = {"orwcfm_fast", "typer", "click", "rich", "shellingham", "tomli_w", "attr"}
HELP_NEEDS |= {
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "annotated_doc",
    "typing_inspection",
    "typing_extensions",
}
LOADED = """
import sys
before = set(sys.modules)
from orwcfm_fast.cli import load_app
try:
    load_app()(["--help"])
except SystemExit:
    print(*(set(sys.modules) - before), sep="\\n", file=sys.stderr)
"""


@pytest.fixture
def help_of(monkeypatch, capsys):
    """help_of(*words, columns=80): the text of `orwcfm *words --help` in a terminal of that width."""

    def text(*words: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            load_app()([*words, "--help"])
        return capsys.readouterr().out

    return text


def titles(help_text: str) -> list[str]:
    return re.findall(r"^(\w.*):$", help_text, re.MULTILINE)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_whole_in_plain_words(help_of, command, columns):
    shown = help_of(command, columns=columns)
    assert "--help" in shown and max(map(len, shown.splitlines())) <= columns
    for technical in ("…", "<bool>", "<int>", "<str>", "list[", "None", "(0)", "default: ]", "[["):
        assert technical not in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_sections_come_in_the_order_in_which_a_user_decides(help_of, command):
    found = titles(help_of(command))
    assert found == sorted(found, key=SECTIONS.index) and found[-1] == "Machine"
    if command not in ("list", "bench"):
        assert "Most used" in found[:2]


@pytest.mark.parametrize(
    "command", ["pretrain", "finetune", "sweep", "sample", "evaluate", "predict", "doctor"]
)
def test_five_options_come_first_and_every_option_once(help_of, command):
    shown = help_of(command)
    first = shown.split("Most used:")[1].split("\n\n")[0]
    assert len(re.findall(r"^  -", first, re.MULTILINE)) == 5
    options = re.findall(r"^  (-\S+)", shown, re.MULTILINE)
    assert len(options) == len(set(options))


def test_the_commands_are_grouped_as_train_look_plan_machine(help_of):
    shown = help_of()
    assert titles(shown) == ["Options", *COMMAND_SECTIONS]
    places = [shown.index(f"\n  {command} ") for command in COMMANDS]
    assert places == sorted(places)


def test_a_default_is_told_as_a_user_would_type_it_or_in_words(help_of):
    shown = help_of("sweep", columns=200).replace("\n" + 31 * " ", " ")
    for text in (
        "[default: 0, 0.1, 0.3, 1]",
        "[default: the whole batch]",
        "[default: on]",
        "[default: 1536]",
    ):
        assert text in shown


def test_help_imports_no_torch_and_few_modules():
    """A count, not a time: each of these takes longer to import than all that `--help` needs."""
    found = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    modules = found.stderr.split()
    others = {name.split(".")[0] for name in modules} - sys.stdlib_module_names
    assert {name for name in others if not name.startswith("_")} <= HELP_NEEDS and len(modules) < 450
    assert "finetune" in found.stdout
