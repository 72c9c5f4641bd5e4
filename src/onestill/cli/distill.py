"""The command `distill`."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestill.cli.fields import ConfigFile, from_config
from onestill.cli.output import note, quiet, say
from onestill.core.errors import RunError, shown_as_flags
from onestill.core.memory import OutOfMemory
from onestill.training.config import DistillConfig, make_config

if TYPE_CHECKING:
    from onestill.runs.build import Run
    from onestill.runs.distill import RunResult

NOTHING_WRITTEN = "stopped before the first step; nothing was written"


@from_config(DistillConfig, positional="teacher")
def distill(
    settings: dict[str, Any],
    config: ConfigFile = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Check everything, train nothing.")] = False,
) -> None:
    """Distil a teacher into a one-step student and export it to OUTPUT_DIR/pipeline."""
    if config is not None and "output_dir" not in settings and (config.parent / "teacher.json").is_file():
        settings = {**settings, "output_dir": config.parent}  # the settings of a run, which may have been moved
    try:
        run = _prepare(make_config(settings, config))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(NOTHING_WRITTEN) from None
    folder = run.config.output_dir
    if dry_run:
        note(f"dry run: every setting is usable, nothing was written to {folder}; what it takes: onestill inspect")
        return
    from onestill.runs import hub

    hub.create(run.config)
    result = _run(run)
    if result.stopped_by is not None:
        where = f"at step {result.step}" if result.step else "before the first step"
        note(f"stopped {where}; state saved in {result.checkpoint}. Go on with: {go_on(folder)}")
        raise typer.Exit(128 + result.stopped_by)
    if result.export_error is None:
        if result.num_trained == 0:
            say(f"{result.pipeline} was finished before; nothing was left to train")
            _say_upload(result)
        return  # otherwise another process of this run has exported, and says so
    say((str(result.pipeline), "bold"), ": loads with plain diffusers, one network evaluation per image")
    say(f"  self-check against the student: {result.export_error:.1e}")
    say(f"  pictures: {folder / 'samples'}")
    for message in result.closing():
        say(f"  {message}")
    say(f"  next: {shlex.join(['onestill', 'evaluate', '--student', str(folder)])}")
    _say_upload(result)


def _say_upload(result: RunResult) -> None:
    """Say where the student was uploaded to; end with 1 if it was to be and was not."""
    if result.hub_url:
        say("  uploaded to ", (result.hub_url, "bold"))
    if result.upload_error:
        note(("stopped:", "red"), f" {result.upload_error}")
        raise typer.Exit(1)


def _prepare(config: DistillConfig) -> Run:
    """Load and check everything, and say what was found."""
    from onestill.runs.plan import planned_run
    from onestill.runs.rehearsal import rehearse

    quiet()
    run = planned_run(config)
    spec = run.teacher.spec
    for message in (*run.messages, *rehearse(run)):
        note(message)
    classes = f", {spec.num_classes} classes" if spec.num_classes else ""
    shape = "x".join(map(str, spec.sample_shape))
    level = f"start level t = {spec.t_max:.4g} ({spec.t_max_reason})"
    note(f"teacher {run.config.teacher}: {spec.family}, {spec.prediction_type}, {shape}{classes}, {level}")
    return run


def _run(run: Run) -> RunResult:
    """Train and export; a run that cannot go on ends with one line."""
    from onestill.data.prompt_cache import PromptCacheError
    from onestill.export.export import ExportError
    from onestill.runs.distill import carry_out
    from onestill.runs.folder import PIPELINE_FOLDER, is_run, make_output_dir
    from onestill.training.checkpoint import list_checkpoints
    from onestill.training.trainer import NonFiniteLossError

    folder = run.config.output_dir
    make_output_dir(folder)
    try:
        return carry_out(run)
    except PromptCacheError as error:
        note(("error:", "red"), f" {shown_as_flags(error)}")
        raise typer.Exit(2) from None
    except (ValueError, RunError) as error:
        note(("stopped:", "red"), f" {shown_as_flags(error)}")
        if is_run(folder) and not isinstance(error, NonFiniteLossError):  # which names the last checkpoint itself
            if isinstance(error, ExportError):
                flags = ["--student", str(list_checkpoints(folder)[0]), "--output", str(folder / PIPELINE_FOLDER)]
                note(f"export it alone with: {shlex.join(['onestill', 'export', *flags])}")
            less = ""
            if isinstance(error, OutOfMemory) and not list_checkpoints(folder):  # so its settings may change
                size, times = run.config.train_batch_size, run.config.gradient_accumulation_steps
                less = f" --train_batch_size {max(2, size // 2)} --gradient_accumulation_steps {2 * times}"
            note(f"what was saved is kept. Go on with: {go_on(folder)}{less}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_left_by(run)) from None
    finally:
        with contextlib.suppress(OSError):  # which holds something, or another process has been here
            folder.rmdir()


def _left_by(run: Run) -> str:
    """Return what to say of a run that was stopped before or after its steps, which end with a checkpoint."""
    from onestill.runs.folder import is_run
    from onestill.training.checkpoint import list_checkpoints, step_of

    config, prompts = run.config, run.prompts
    if is_run(config.output_dir):
        steps = map(step_of, list_checkpoints(config.output_dir))
        where = "after the last step" if config.max_train_steps in steps else "before the first step"
        return f"stopped {where}; what was saved is kept. Go on with: {go_on(config.output_dir)}"
    if prompts is not None:
        prompts.cache.refresh()
        if num := len(prompts.cache):
            kept = f"{num:,} encoded prompts are kept in {prompts.cache.folder}"
            return f"stopped before the first step; {kept}, nothing else was written"
    return NOTHING_WRITTEN


def go_on(run: Path) -> str:
    """Return the command that goes on with a run, whose folder holds all its settings."""
    from onestill.runs.folder import CONFIG_FILE
    from onestill.training.config import num_processes

    num = num_processes()
    # Each process has its own random state, so it takes as many.
    start = ["onestill"] if num == 1 else ["torchrun", "--nproc_per_node", str(num), "-m", "onestill"]
    return shlex.join([*start, "distill", "--config", str(run / CONFIG_FILE), "--resume_from_checkpoint", "latest"])
