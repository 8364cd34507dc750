"""Every command that the README and the manual show is one that works."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md", "docs/quick-start.md", "docs/your-own.md", "docs/rewards.md", "docs/long-runs.md", "docs/choosing.md",
    "docs/report.md", "docs/forecast.md", "docs/paper.md", "docs/figures.md",
)  # fmt: skip
ELSEWHERE = {  # pages whose commands other tests run
    "docs/large-models.md": "tests/networks/test_diffusers_runs.py",
    "docs/many-gpus.md": "tests/distributed/test_ranks_torchrun.py",
}
BLOCK = re.compile(r"(<!-- not run by the tests: .*? -->\n)?^```sh\n(.*?)^```", re.M | re.S)
RUN = (
    "--rollout", "32", "--batch", "16", "--steps-per-round", "2", "--eval-n", "32", "--probe", "8", "--nfe", "4",
)  # fmt: skip
FIRST = "orwcfm finetune --alpha 1 --tau 0.5"
CHEAP = {
    "finetune": RUN,
    "sweep": RUN,
    "pretrain": ("--batch", "16", "--steps", "40"),
    "sample": ("--nfe", "4"),
    "evaluate": ("-n", "160", "--nfe", "4"),
    "doctor": ("--batch", "4", "--rollout", "8", "--chunk", "8", "--nfe", "4"),
    "predict": ("-n", "200", "--scored", "200", "--nfe", "4"),
}


@dataclass(frozen=True)
class Command:
    page: str
    line: str
    is_run: bool

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def commands(*pages: str) -> list[Command]:
    found = []
    for page in pages:
        for skipped, block in BLOCK.findall(read(page)):
            lines = block.replace("\\\n", " ").splitlines()
            found += [
                Command(page, line, not skipped) for line in lines if line.split()[0] in ("orwcfm", "make")
            ]
    return found


def test_every_page_with_commands_is_listed():
    shown = {
        str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md") if commands(str(p.relative_to(ROOT)))
    }
    assert shown <= {*PAGES, *ELSEWHERE}
    assert len(commands(*PAGES)) >= 20
    assert all("docs/" in (ROOT / test).read_text() for test in ELSEWHERE.values())


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [c.words[1] for c in commands(*PAGES) if c.words[0] == "make"]
    targets += re.findall(r"`make ([\w-]+)`", "".join(map(read, PAGES)))
    assert "demo" in targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_options_exist_of_commands_that_are_not_run_too():
    from typer.main import get_command

    from orwcfm_fast.cli import load_app
    from orwcfm_fast.cli.app import all_commands

    known = all_commands(get_command(load_app()))
    for command in commands(*PAGES, *ELSEWHERE):
        if command.words[0] == "orwcfm":
            name = command.words[1] if command.words[1] in known else " ".join(command.words[1:3])
            names = {name for p in known[name].params for name in p.opts + p.secondary_opts}
            flags = {word for word in command.words if re.match(r"-+[a-z]", word)}
            assert flags <= names, f"{command.page}: {command.line}"


@pytest.fixture
def finished_run(run_cli, stand_ins):
    """The working directory, with those files and the run of the README's first command."""
    shutil.copytree(stand_ins, ".", dirs_exist_ok=True)
    example = re.search(r"```python\n(# my_reward.py\n.*?)```", read("README.md"), re.S).group(1)
    Path("my_reward.py").write_text(example)
    if not Path("runs").exists():
        made = run_cli(*FIRST.split()[1:], *RUN)
        assert made.code == 0, made.err
        shutil.copytree("runs", stand_ins / "runs")


def new_on(page: str) -> list[Command]:
    """The commands to run that no page before shows."""
    before = {c.line for c in commands(*PAGES[: PAGES.index(page)])} | {FIRST}
    return [c for c in commands(page) if c.is_run and c.words[0] == "orwcfm" and c.line not in before]


PAGES_TO_RUN = [
    pytest.param(page, marks=() if page == "README.md" else pytest.mark.slow)
    for page in PAGES
    if new_on(page)
]


@pytest.mark.parametrize("page", PAGES_TO_RUN)
def test_commands_in_the_order_of_the_page(page, run_cli, finished_run):
    """Each as written, made cheap by flags behind it, where the README's first command has been run."""
    for command in new_on(page):
        arguments = command.words[1:]
        cheap = () if {"--resume", "--exact"} & {*arguments} else CHEAP.get(arguments[0], ())
        result = run_cli(*arguments, *cheap)
        # this untrained stand-in may be out of reach of what the page wants
        out_of_reach = "--want-reward" in arguments and "reach" in result.err
        assert result.code == 0 or out_of_reach, f"{page}: {command.line}: {result.err}"


def test_the_table_names_every_command():
    from orwcfm_fast.cli import load_app

    app = load_app()
    names = {c.name or c.callback.__name__.rstrip("_") for c in app.registered_commands}
    names |= {group.name for group in app.registered_groups}
    assert names == set(re.findall(r"^\| `orwcfm (\w+)", read("README.md"), re.M))


def test_the_reward_example_is_the_same_on_both_pages():
    first, second = (
        re.search(r"# my_reward.py\n(.*?)```", read(p), re.S).group(1) for p in (PAGES[0], PAGES[2])
    )
    assert first == second


def test_python_example_is_valid_and_its_keys_known():
    from orwcfm_fast.paper import settings_from

    example = re.search(r"```python\nimport torch\n(.*?)```", read("docs/your-own.md"), re.S).group(1)
    compile(example, "your-own.md", "exec")
    config = eval(re.search(r"config = (\{.*?\n\})", example, re.S).group(1))
    assert settings_from(config).alpha == 1.0
