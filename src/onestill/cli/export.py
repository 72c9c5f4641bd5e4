"""The command `export`."""

from __future__ import annotations

from typing import Any

from onestill.cli.fields import from_config
from onestill.cli.output import note, quiet, say
from onestill.core.settings import make
from onestill.export.config import GRAPHS, ExportConfig


@from_config(ExportConfig, positional="student")
def export(settings: dict[str, Any]) -> None:
    """Write the student of a run or of a checkpoint-N folder as a stock diffusers folder, or in other formats."""
    config = make(ExportConfig, settings)
    from onestill.runs.export import write_student

    quiet()
    num = config.num_inference_steps
    called = f"; call it with num_inference_steps={num}, as its card shows: another number draws something else"
    for name, error in write_student(config, note).items():
        call = "" if num == 1 or name in GRAPHS else called
        say((str(config.places[name]), "bold"), f": self-check against the student {error:.1e}{call}")
