"""The command `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onestill.cli.evaluate import AsFormat
from onestill.cli.fields import ConfigFile, from_config
from onestill.cli.output import note, out, say
from onestill.core.errors import SettingError
from onestill.core.settings import make
from onestill.pages.config import CompareConfig

OUTPUT = Path("comparison")


@from_config(CompareConfig, positional="runs")
def compare(settings: dict[str, Any], config: ConfigFile = None, form: AsFormat = None) -> None:
    """Put runs side by side on a page: tables, curves, settings, pictures; nothing is measured again."""
    made = make(CompareConfig, settings, config)

    from rich.box import HORIZONTALS
    from rich.table import Table

    from onestill.evaluation.tables import in_format, print_report
    from onestill.runs import compare as room
    from onestill.runs.run_page import PAGE_FILE

    output = made.output or (OUTPUT if form is None else None)
    found = room.compare(made.runs, output=output, overwrite=made.overwrite)
    if form is not None and found.report is None:
        why = next(iter(found.page.warnings), "not all runs were evaluated")
        raise SettingError("format", form, f"needs a table of all runs; {why}", "evaluate them in the same way")
    if form is not None and found.report is not None:
        print(in_format(found.report, form), end="")
        return
    table = Table(*found.summary.columns, box=HORIZONTALS, border_style="dim", pad_edge=False)
    for row in found.summary.rows:
        table.add_row(*row)
    out.print(table, markup=False)
    if found.report is not None:
        print_report(found.report, out)
    for line in (*found.page.lead, *(f"warning: {line}" for line in found.page.warnings if found.report is None)):
        note(line)
    say(f"page: {(output or OUTPUT) / PAGE_FILE}")
