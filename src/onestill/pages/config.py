"""The settings of a page that runs stand on side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from onestill.core.errors import SettingError
from onestill.core.settings import Settings, setting

COMPARED, OUTPUT = "Runs", "Output"
MOST_RUNS = 12


class CompareConfig(Settings):
    """Which runs stand beside each other, and where that is written."""

    runs: tuple[Path, ...] = setting(..., COMPARED, "Folder of a run that distill has made; repeat for more.")
    output: Path | None = setting(
        None,
        OUTPUT,
        "Folder of report.html, the table and the plots; the command takes comparison if it is not given, and prints no table for other programs.",
    )
    overwrite: bool = setting(False, OUTPUT, "Replace what is there.")

    @model_validator(mode="after")
    def _is_a_few(self) -> Self:
        if not 2 <= len(self.runs) <= MOST_RUNS:
            why = f"are {len(self.runs)}, and from 2 to {MOST_RUNS} can be seen side by side"
            raise SettingError("runs", [str(run) for run in self.runs], why)
        return self
