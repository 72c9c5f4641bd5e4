"""`export`: the student of a run, written as a stock diffusers folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onestill.export.export import export_student, is_exported
from onestill.runs.checks import check_device, check_writable, resolve_device
from onestill.runs.distill import distilled_facts
from onestill.runs.folder import is_run
from onestill.runs.restore import check_student_request, read_run_config, restore_student


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
    check_device(device)
    path, output = Path(student), Path(output)
    run = path if is_run(path) else path.parent
    if not path.is_dir() or not is_run(run):
        raise ValueError(f"--student {path} is no run and no checkpoint-N folder of one")
    if output.exists() and not overwrite:
        raise ValueError(f"--output {output} exists; name another folder, or give --overwrite to replace it")
    if output.exists() and not is_exported(output):
        raise ValueError(f"--output {output} is no exported student, so --overwrite does not replace it")
    check_writable(output.absolute().parent, "output")
    config = read_run_config(run)
    restored = restore_student(path, config, resolve_device(device), with_pictures=True)
    check_student_request(restored, config, target_time or 0.0, guidance_scale)
    facts = replace(
        distilled_facts(config, restored.teacher, guidance_scale),
        training=f"{config.max_train_steps:,} steps planned, exported from {path.name}, seed {config.seed}",
    )
    t = config.t_min if target_time is None else max(target_time, config.t_min)
    return export_student(restored, output, t=t, guidance_scale=guidance_scale, facts=facts, overwrite=overwrite)
