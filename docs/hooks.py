"""What MkDocs does beyond the pages in docs/: pages of files that lie elsewhere, and links out of docs/.

README.md, CONTRIBUTING.md and kernels/README.md are read where they are, and links are written as they work there.
A link to any other file of the repository takes that file along into the site, which so needs no network.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "kernels.md": "kernels/README.md"}
LOADED = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*rel="stylesheet"[^>]*"(?:https?:)?//"""
)
LINK = re.compile(r"(?<!`)(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of other files."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    files.append(File.generated(config, "commands.md", content=command_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository → links of the site."""
    here = page.file.src_uri
    source = PurePosixPath(PAGES.get(here, f"docs/{here}"))

    def rewrite(match: re.Match) -> str:
        opening, target, anchor, closing = match.groups()
        path = PurePosixPath(os.path.normpath(source.parent / target))
        moved = {kept: shown for shown, kept in PAGES.items()}.get(str(path))
        if moved is None and path.is_relative_to("docs") and path.suffix != ".py":
            moved = str(path.relative_to("docs"))
        elif moved is None and (ROOT / path).is_file():
            moved = f"files/{path}"
            if files.get_file_from_path(moved) is None:
                files.append(File.generated(config, moved, abs_src_path=str(ROOT / path)))
        return match.group(0) if moved is None else f"{opening}{moved}{anchor or ''}{closing}"

    return LINK.sub(rewrite, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Fails where opening a page would load something from a server."""
    for page in Path(config.site_dir).rglob("*.html"):
        if found := LOADED.search(page.read_text("utf-8")):
            raise PluginError(f"{page.name} loads from a server: {found.group(0)}")


def command_page() -> str:
    """The reference of the command line, from the commands themselves: a section a command, a table a panel."""
    from typer import Context
    from typer.main import get_command

    from orwcfm_fast.cli import load_app
    from orwcfm_fast.cli.app import all_commands
    from orwcfm_fast.cli.help import COMMAND_SECTIONS, SECTIONS

    commands = all_commands(get_command(load_app()))
    lines = ["# Commands and settings", "", "As `orwcfm COMMAND --help` prints them.", ""]
    places = {
        section: k for k, section in enumerate(COMMAND_SECTIONS)
    }  # a command of a group has none: it is last
    for full, command in sorted(
        commands.items(), key=lambda c: places.get(c[1].rich_help_panel, len(places))
    ):
        lines += [f"## orwcfm {full}", "", command.help or "", ""]
        rows = command.rows(Context(command, info_name=full))
        for title in SECTIONS:
            found = [f"| `{name}` | {_cell(text)} |" for section, name, text in rows if section == title]
            if found:
                lines += [f"| {title} | |", "|---|---|", *found, ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"([|\[\]*_<])", r"\\\1", " ".join(text.split()))
