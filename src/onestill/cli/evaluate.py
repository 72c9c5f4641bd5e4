"""The command `evaluate`."""

from __future__ import annotations

from typing import Any

from onestill.cli.fields import AsJson, ConfigFile, from_config
from onestill.cli.output import note, out, quiet, say
from onestill.core.settings import make
from onestill.evaluation.config import EvaluateConfig


@from_config(EvaluateConfig, positional="student")
def evaluate(settings: dict[str, Any], config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Compare a student's one step with its teacher's many, in a table with its protocol."""
    made = make(EvaluateConfig, settings, config)

    from onestill.evaluation.report import print_report
    from onestill.runs import evaluate as room

    quiet()
    folder = made.output or room.default_report_folder(made.student)
    settings |= {"student": made.student, "output": folder}
    report = room.evaluate(**settings, config_file=config, show_progress=True, say=note)
    if as_json:
        print(report.model_dump_json())
        return
    print_report(report, out)
    say(f"report and picture: {folder}")
