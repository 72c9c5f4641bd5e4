"""The command `evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from onestill.cli.fields import AsJson, ConfigFile, from_config
from onestill.cli.output import note, out, quiet, say
from onestill.core.errors import SettingError
from onestill.core.settings import make
from onestill.evaluation.config import EvaluateConfig, Format

AsFormat = Annotated[
    Format | None,
    typer.Option(
        "--format", help="Print the table for other programs; csv and json have every digit.", show_choices=True
    ),
]


@from_config(EvaluateConfig, positional="student")
def evaluate(
    settings: dict[str, Any], config: ConfigFile = None, as_json: AsJson = False, form: AsFormat = None
) -> None:
    """Compare a student's one step with its teacher's many, in a table with its protocol."""
    made = make(EvaluateConfig, settings, config)
    if as_json and form not in (None, "json"):
        raise SettingError("format", form, "and JSON are two forms, and one is printed", "give one of them")

    from onestill.evaluation.tables import in_format, print_report
    from onestill.runs import evaluate as room

    quiet()
    folder = made.output or room.default_report_folder(made.student)
    settings |= {"student": made.student, "output": folder}
    report = room.evaluate(**settings, config_file=config, show_progress=True, say=note)
    if as_json or form is not None:
        print(in_format(report, form or "json"), end="")
        return
    print_report(report, out)
    say(f"page, report and picture: {folder}")
