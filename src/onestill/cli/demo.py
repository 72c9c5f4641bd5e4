"""The command `demo`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from onestill.cli.distill import go_on
from onestill.cli.output import note, out, quiet, say
from onestill.cli.values import PARSERS


def demo(
    teacher: Annotated[str, typer.Argument(help="The embedded teacher: glyphs (text) or digits (classes).")] = "glyphs",
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the demo.", parser=PARSERS[Path])] = Path(
        "demo"
    ),
    max_train_steps: Annotated[
        int | None,
        typer.Option(
            "--max_train_steps", help="Steps, if not the demo's own, fewer on a slow machine.", parser=PARSERS[int]
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option("--num_samples", help="Images in the comparison, if not the demo's own.", parser=PARSERS[int]),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the training.", parser=PARSERS[int])] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Distil an embedded teacher in a few minutes on a CPU, and show what was gained and lost."""
    from onestill.evaluation.tables import print_report
    from onestill.runs import demo as room
    from onestill.runs.run_page import PAGE_FILE

    quiet()
    try:
        report, picture = room.run_demo(
            output_dir,
            teacher=teacher,
            seed=seed,
            device=device,
            max_train_steps=max_train_steps,
            num_samples=num_samples,
            overwrite=overwrite,
            say=note,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_way_on(output_dir)) from None
    print_report(report, out)
    say(f"picture:  {picture}")
    say(f"report:   {output_dir / PAGE_FILE}  (opens in a browser)")
    say(
        f"page:     {shlex.join(['onestill', 'serve', str(output_dir)])}  (to play with; pip install 'onestill[serve]')"
    )
    say(f"pipeline: {output_dir / 'pipeline'}  (loads with plain diffusers)")


def _way_on(folder: Path) -> str:
    """Return what to say of a demo that was stopped: how to go on with what it has written."""
    from onestill.runs.folder import RunFolder, is_run

    if not is_run(folder):
        return "stopped before the first step; start the demo again with the same command"
    if not RunFolder(folder).pipeline.is_dir():
        return f"stopped; what was trained is kept. Go on with: {go_on(folder)}"
    return f"stopped after the training. Go on with: {shlex.join(['onestill', 'evaluate', str(folder)])}"
