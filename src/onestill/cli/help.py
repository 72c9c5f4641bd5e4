"""The help of a command: every flag in full, at any width of the terminal."""

from __future__ import annotations

from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from onestill.cli.output import out, say

FLAG_WIDTH = 34  # the longest name of a flag, and no more, so that 80 columns are enough for both


class Command(TyperCommand):
    """A command whose help breaks lines where typer's own would cut the names of flags."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print usage, what the command does, and its flags, a panel for each `rich_help_panel`."""
        say()
        say((f" {self.get_usage(ctx)}", "bold"))
        say()
        out.print(Text(f" {' '.join((self.help or '').split())}"))
        say()
        panels = {"Options": _table()}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:  # a hidden flag
                continue
            title = getattr(parameter, "rich_help_panel", None) or "Options"
            table = panels.setdefault(title, _table())
            flags, _, kind = record[0].partition(" <")
            words = " ".join(record[1].split())
            table.add_row(Text.assemble((flags, "cyan"), (f" <{kind}" if kind else "", "yellow")), Text(words))
        for title, table in panels.items():
            if table.row_count:
                out.print(Panel(table, title=title, title_align="left", border_style="dim"))


def _table() -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(width=FLAG_WIDTH, overflow="fold")
    table.add_column(ratio=1)
    return table
