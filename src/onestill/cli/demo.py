"""The command `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onestill.cli.output import note, out, quiet, say


def demo(
    teacher: Annotated[str, typer.Argument(help="The embedded teacher: glyphs (text) or digits (classes).")] = "glyphs",
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the demo.")] = Path("demo"),
    max_train_steps: Annotated[
        int | None, typer.Option("--max_train_steps", help="Steps, if not the demo's own.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the training.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Distil an embedded teacher in a few minutes on a CPU, and show what was gained and lost."""
    from onestill.evaluation.report import print_report
    from onestill.runs import demo as room

    quiet()
    report, picture = room.run_demo(
        output_dir,
        teacher=teacher,
        seed=seed,
        device=device,
        max_train_steps=max_train_steps,
        overwrite=overwrite,
        say=note,
    )
    print_report(report, out)
    say(f"picture:  {picture}")
    say(f"pipeline: {output_dir / 'pipeline'}  (loads with plain diffusers)")
