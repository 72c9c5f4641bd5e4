"""The command `inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from onestill.cli.fields import AsJson, ConfigFile, from_config
from onestill.cli.output import out, quiet
from onestill.core.errors import as_flags
from onestill.training.config import DistillConfig, make_config
from onestill.training.recipes import in_time

if TYPE_CHECKING:
    from onestill.runs.inspect import Inspection


@from_config(DistillConfig, positional="teacher", unneeded="output_dir")
def inspect(settings: dict[str, Any], config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Say what a teacher is, and what distilling it would cost with these settings."""
    from onestill.runs.inspect import inspect_run

    quiet()
    found = inspect_run(make_config({"output_dir": Path("run"), **settings}, config))
    if as_json:
        print(as_flags(json.dumps(asdict(found), ensure_ascii=False)))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _rows(found).items():
        if value:
            table.add_row(f"[bold]{name}[/bold]", escape(as_flags(value)))
    out.print(table)


def _rows(found: Inspection) -> dict[str, str]:
    """Return what is shown, by its title; nothing is said where there is nothing to say."""
    classes = ""
    if found.num_classes is not None:
        null = "none" if found.null_class is None else found.null_class
        classes = f" ({found.num_classes} classes, null class {null})"
    level = f"t_max = {found.t_max:.4g}, alpha = {found.alpha_at_t_max:.3g}, sigma = {found.sigma_at_t_max:.3g}"
    return {
        "teacher": found.teacher,
        "folder": found.folder if found.folder and Path(found.folder) != Path(found.teacher) else "",
        "family": found.family,
        "process": found.process,
        "prediction": found.prediction_type,
        "conditioning": found.conditioning + classes + _enlarges(found),
        "sample shape": " x ".join(map(str, found.sample_shape)),
        "call": ", ".join(f"{name} = {value}" for name, value in found.arguments.items()),
        "parameters": f"{found.num_parameters:,}",
        "start level": f"{level}: {found.t_max_reason}",
        "thresholding": f"{found.thresholding} (of the teacher's own scheduler)",
        "guidance": _guidance(found),
        "prompts": _prompts(found) if found.prompt_bytes else "",
        "target time enters": found.target_time_enters,
        "plan": found.plan,
        "estimate": _estimate(found),
        "disk": _disk(found),
        "warning": found.warning,
    }


def _enlarges(found: Inspection) -> str:
    """Return what a teacher enlarges, in words."""
    from onestill.runs.inspect import A_PICTURE

    hint = " (name the student that draws it with --base_student)" if found.enlarges == A_PICTURE else ""
    return f" and {found.enlarges}{hint}" if found.enlarges else ""


def _estimate(found: Inspection) -> str:
    """Return what a run takes, in words."""
    seconds = found.estimated_seconds_per_step
    place = f"on {found.estimate_device}, batch {found.train_batch_size}"
    step = f"{found.estimated_memory_gb:.2f} GB and {seconds:.3g} s per step {place}"
    run = f"{found.max_train_steps:,} steps take {in_time(seconds * found.max_train_steps)}"
    if found.num_anchors:
        run += f", {found.num_anchors:,} anchors {in_time(found.estimated_seconds_per_anchor * found.num_anchors)} more"
    return f"{step}; {run}"


def _disk(found: Inspection) -> str:
    """Return what a run writes, in words."""
    from onestill.data.prompt_cache import in_words

    kept = f"{found.num_checkpoints} checkpoint{'s' if found.num_checkpoints > 1 else ''} at once"
    pools = f", anchors {in_words(found.pool_bytes)}, in memory too" if found.pool_bytes else ""
    averages = f", averages {in_words(found.snapshot_bytes)}" if found.snapshot_bytes else ""
    return f"{kept}, {in_words(found.checkpoint_bytes)} each, export {in_words(found.export_bytes)}{averages}{pools}"


def _guidance(found: Inspection) -> str:
    """Return how a teacher is guided, in words."""
    interval = found.guidance_interval
    where = "" if interval is None else f" at {interval[0]:g} < t <= {interval[1]:g} alone"
    if found.guidance == "embedded":
        return f"an input of the network, {found.guidance_scale:g}{where}; another one with --guidance_scale"
    if found.guidance == "classifier-free":
        return f"u + w (c - u){where}: --guidance_scale{', --negative_prompt' if found.negative_prompts else ''}"
    return f"none: there is no null {'class that is known (--null_class)' if found.num_classes else 'condition'}"


def _prompts(found: Inspection) -> str:
    """Return how long prompts may be, how many a run encodes, and what they take on disk, in words."""
    from onestill.data.prompt_cache import in_words

    limits = ", ".join(f"{most} ({name})" for name, most in found.prompt_limits.items())
    longest = f"tokens at most: {limits}; " if limits else ""
    size = in_words(found.num_prompts * found.prompt_bytes)
    return f"{longest}{found.num_prompts:,} or fewer to encode, {size} of cache ({found.prompt_bytes:,} bytes each)"
