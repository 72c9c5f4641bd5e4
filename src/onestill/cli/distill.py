"""The command `distill`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from onestill.cli.fields import from_config
from onestill.cli.output import note, quiet, say
from onestill.config import make_config


@from_config
def distill(
    settings: dict[str, Any],
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of these settings; flags win.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Check everything, train nothing.")] = False,
) -> None:
    """Distil a teacher into a one-step student and export it to OUTPUT_DIR/pipeline."""
    from onestill import distillation as room
    from onestill.checks import make_output_dir
    from onestill.prompt_cache import PromptCacheError
    from onestill.trainer import NonFiniteLossError

    quiet()
    prepared = room.prepare(make_config(settings, config))
    spec, made = prepared.base.spec, prepared.config
    for message in prepared.messages:
        note(message)
    classes = f", {spec.num_classes} classes" if spec.num_classes else ""
    shape = "x".join(map(str, spec.sample_shape))
    note(
        f"teacher {made.teacher}: {spec.family}, {spec.prediction_type}, {shape}{classes}, "
        f"start level t = {spec.t_max:.4g} ({spec.t_max_reason})"
    )
    if dry_run:
        note(f"dry run: everything fits, nothing was written to {made.output_dir}")
        return
    make_output_dir(made.output_dir)
    try:
        result = room.run(prepared)
    except (NonFiniteLossError, PromptCacheError) as error:
        with contextlib.suppress(OSError):  # which holds something already, or another process has been here
            made.output_dir.rmdir()
        note(("stopped:", "red"), f" {error}")
        raise typer.Exit(1) from None
    except ValueError as error:
        raise RuntimeError("distillation failed") from error
    if result.stopped_by is not None:
        again = f"onestill distill ... --output_dir {made.output_dir} --resume_from_checkpoint latest"
        note(f"stopped at step {result.step}; state saved in {result.checkpoint}. Go on with: {again}")
        raise typer.Exit(128 + result.stopped_by)
    if result.num_trained == 0:
        say(f"{result.pipeline} was finished before; nothing was left to train")
        return
    if result.export_error is None:  # another process of this run has exported, and says so
        return
    say((str(result.pipeline), "bold"), ": loads with plain diffusers, one network evaluation per image")
    say(f"  self-check against the student: {result.export_error:.1e}")
    say(f"  pictures: {made.output_dir / 'samples'}")
    say(f"  next: onestill evaluate --student {made.output_dir}")
