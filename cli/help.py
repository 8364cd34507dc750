"""How `--help` looks: sections in the order in which a user decides, at any width of the terminal."""

from collections.abc import Iterable

from typer.core import TyperCommand

from orwcfm_fast.settings import PANELS

MOST_USED = "Most used"
SECTIONS = ("Arguments", MOST_USED, *PANELS)
NAME_WIDTH = 27  # a longer name has its text on the next line
COMMAND_SECTIONS = ("Train", "Look", "Plan", "Machine")


def write_sections(formatter, order: tuple[str, ...], rows: Iterable[tuple[str, str, str]]) -> None:
    """Rows of (section, name, help) as one titled list for each section, all with columns of the same width."""
    rows = [*rows]
    width = max(len(name) for _, name, _ in rows if len(name) <= NAME_WIDTH)
    for title in order:
        records = [(name.ljust(width), text) for section, name, text in rows if section == title]
        if records:
            with formatter.section(title):
                formatter.write_dl(records, col_max=width)


class SectionedCommand(TyperCommand):
    """A command whose options stand in sections; both forms of a switch are one entry, `--[no-]flag`."""

    def rows(self, ctx) -> list[tuple[str, str, str]]:
        """(section, name, help) of each option; the manual's page of commands is made of them too."""
        rows = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            argument = param.param_type_name == "argument"
            section = "Arguments" if argument else getattr(param, "rich_help_panel", None) or "Machine"
            name = record[0]
            if argument:
                name = param.metavar or record[0]
            elif param.secondary_opts:
                name = f"--[no-]{param.opts[0][2:]}"
            rows.append((section, name, record[1]))
        return rows

    def format_options(self, ctx, formatter) -> None:
        write_sections(formatter, SECTIONS, self.rows(ctx))
