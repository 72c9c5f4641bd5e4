"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onestill.cli.options import DeviceOption, OverwriteOption, StudentOption
from onestill.cli.output import quiet, say


def export(
    student: StudentOption,
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")],
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance_scale", help="w to bake in, for students that take it.")
    ] = None,
    target_time: Annotated[
        float | None, typer.Option("--target_time", help="Target time to bake in [default: the run's t_min].")
    ] = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Write the student of a run or of a checkpoint-N folder as a stock diffusers folder."""
    from onestill.runs.export import export as export_run

    quiet()
    error = export_run(
        student,
        output,
        guidance_scale=guidance_scale,
        target_time=target_time,
        device=device,
        overwrite=overwrite,
    )
    say((str(output), "bold"), f": self-check against the student {error:.1e}")
