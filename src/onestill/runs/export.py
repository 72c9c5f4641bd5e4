"""`export`: the student of a run, written as a stock diffusers folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from onestill.core.arguments import checked
from onestill.core.devices import resolve_device
from onestill.core.errors import SettingError, named
from onestill.core.files import check_writable
from onestill.core.memory import enough_memory
from onestill.core.settings import make
from onestill.data.cascade import with_first_stage
from onestill.export.config import ExportConfig
from onestill.export.export import check_format, check_installed, export_student, is_exported
from onestill.runs import hub
from onestill.runs.distill import distilled_facts, in_words, print_message
from onestill.runs.folder import RunFolder
from onestill.runs.load import check_folder, restore_student, run_teacher
from onestill.sampling.samplers.network import check_trained
from onestill.students.settings import check_steps


@checked(ExportConfig)
def export(student: str | Path, output: str | Path, **settings: Any) -> float:
    """Write the student of a run, or of one of its checkpoint-N folders, as a stock diffusers folder, or in other formats.

    Args:
        student: A run's folder or a checkpoint-N folder.
        output: Folder to write.
        **settings: Fields of `ExportConfig`, the others; an unknown name is refused.

    Returns:
        The largest difference between the reloaded folder's images and the student's, of all formats.

    Raises:
        ValueError: If there is no such run, the student was not trained for this, `output` exists, or the hub refuses.
        UploadError: If an upload fails; what was written is kept.
    """
    config = make(ExportConfig, {**settings, "student": student, "output": output})
    return max(write_student(config, print_message).values())


@enough_memory("the export", f"free some, or give {named('device')} cpu")
def write_student(config: ExportConfig, say: Callable[[str], None]) -> dict[str, float]:
    """Write the student that a configuration names, and upload it if that says so; raise as `export` does.

    `say` is told where it will be uploaded to. Returns the difference of each format.
    """
    path, device = config.student, resolve_device(config.device)
    run = _run_of(config)
    config = hub.addressed(config, config.output)
    steps = config.num_inference_steps
    check_steps(steps, config.target_time or 0.0, is_map=run.is_map)
    teacher = run_teacher(run, device)
    if run.config.base_student is not None:
        # The teacher checks itself with its pictures where they are still there; what is written does not need them.
        with contextlib.suppress(ValueError):
            teacher, _ = with_first_stage(teacher, run.config.base_student, run.config.noise_level, device=device)
    student = restore_student(run, teacher, path, config.ema_width).to(device)
    for name in config.format:
        check_format(student, name, steps)
    t, scale = config.target_time, config.guidance_scale
    check_trained(student, t or 0.0, scale, run.distilled, run.config.t_min)
    training = f"{run.config.max_train_steps:,} steps planned, exported from {path.name}, seed {run.config.seed}"
    if config.ema_width is not None:
        training += f"; {in_words(config.ema_width)}"
    facts = replace(distilled_facts(run.config, student.teacher, scale), training=training)
    is_usual = path == run.path and (t, scale, config.ema_width) == (None, None, None)
    t = run.config.t_min if t is None else max(t, run.config.t_min)
    how: dict[str, Any] = {"t": t, "guidance_scale": scale, "num_inference_steps": steps, "facts": facts}
    how |= {"overwrite": config.overwrite, "pictures": config.push_to_hub}
    hub.create(config)
    if config.push_to_hub:
        say(f"the student will be uploaded to {hub.destination(config)}")
    found = {
        name: export_student(student, place, format=name, options=config.options.of(name), **how)
        for name, place in config.places.items()
    }
    if config.push_to_hub:
        hub.upload(config, config.output, hub.report_of(run.path) if is_usual else None)
    return found


def _run_of(config: ExportConfig) -> RunFolder:
    """Return the run whose student is exported; SettingError if it is none, its place is taken, or a package is missing."""
    check_folder(config.student)
    run = RunFolder.of(config.student)
    if run is None:
        raise SettingError("student", config.student, "is no run and no checkpoint-N folder of one")
    for place in config.places.values():
        _check_free(place, config.overwrite)
    for name in config.format:
        check_installed(name, config.options)
    return run


def _check_free(place: Path, overwrite: bool) -> None:
    if place.exists() and not overwrite:
        todo = f"name another folder, or give {named('overwrite')} to replace it"
        raise SettingError("output", place, "exists", todo)
    if place.exists() and not is_exported(place):
        why = f"is no exported student, so {named('overwrite')} does not replace it"
        raise SettingError("output", place, why)
    check_writable(place.absolute().parent, "output")
