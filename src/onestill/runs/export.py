"""`export`: the student of a run, written as a stock diffusers folder."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from onestill.core.devices import resolve_device
from onestill.core.errors import SettingError, named
from onestill.core.files import check_writable
from onestill.data.cascade import with_first_stage
from onestill.export.export import export_student, is_exported
from onestill.runs.distill import distilled_facts
from onestill.runs.folder import RunFolder
from onestill.runs.load import restore_student, run_teacher
from onestill.sampling.samplers.network import check_trained


def export(
    student: str | Path,
    output: str | Path,
    *,
    guidance_scale: float | None = None,
    target_time: float | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> float:
    """Write the student of a run, or of one of its checkpoint-N folders, as a stock diffusers folder.

    Args:
        student: A run's folder or a checkpoint-N folder.
        output: Folder to write.
        guidance_scale: w to bake in, for students that take it; the middle of their range if None.
        target_time: Target time to bake in; the run's t_min if None.
        device: auto, cpu, cuda, cuda:N or mps.
        overwrite: Replace `output`.

    Returns:
        The largest difference between the reloaded folder's images and the student's.

    Raises:
        ValueError: If there is no such run, the student cannot do what is asked, or `output` exists.
    """
    resolve_device(device)
    path, output, place = Path(student), Path(output), resolve_device(device)
    run = RunFolder.of(path) if path.is_dir() else None
    if run is None:
        raise SettingError("student", path, "is no run and no checkpoint-N folder of one")
    if output.exists() and not overwrite:
        raise SettingError(
            "output", output, "exists", f"name another folder, or give {named('overwrite')} to replace it"
        )
    if output.exists() and not is_exported(output):
        why = f"is no exported student, so {named('overwrite')} does not replace it"
        raise SettingError("output", output, why)
    check_writable(output.absolute().parent, "output")
    config, teacher = run.config, run_teacher(run, place)
    if config.base_student is not None:
        # Its pictures are those of the self-check; what is written does not depend on them, so it may be gone.
        with contextlib.suppress(ValueError):
            teacher, _ = with_first_stage(teacher, config.base_student, config.noise_level, device=place)
    restored = restore_student(run, teacher, path).to(place)
    check_trained(restored, target_time or 0.0, guidance_scale, run.distilled, config.t_min)
    facts = replace(
        distilled_facts(config, teacher, guidance_scale),
        training=f"{config.max_train_steps:,} steps planned, exported from {path.name}, seed {config.seed}",
    )
    t = config.t_min if target_time is None else max(target_time, config.t_min)
    return export_student(restored, output, t=t, guidance_scale=guidance_scale, facts=facts, overwrite=overwrite)
