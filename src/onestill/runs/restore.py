"""A run read back from its folder: its configuration, its teacher, its student, and who draws what it enlarges."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path

import torch

from onestill.data.cascade import FirstStage, open_first_stage, with_first_stage
from onestill.runs.build import PYTHON_OBJECT, configured_teacher, make_student
from onestill.runs.folder import CONFIG_FILE, PIPELINE_FOLDER, TEACHER_FILE, is_run
from onestill.sampling.exported import enlarges
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.training.checkpoint import Checkpoint, read_checkpoint, read_latest
from onestill.training.config import DistillConfig, make_config
from onestill.training.trainer import load_student


def read_run_config(run: Path) -> DistillConfig:
    """Return the resolved configuration of a run."""
    return make_config({}, run / CONFIG_FILE)


def run_of_pipeline(folder: Path) -> Path | None:
    """Return the run that an exported folder lies in, as its `pipeline`; None if it lies elsewhere."""
    folder = folder.resolve()
    ours = all((folder.parent / name).is_file() for name in (CONFIG_FILE, TEACHER_FILE))
    return folder.parent if ours and folder.name == PIPELINE_FOLDER else None


def run_teacher(run: Path, config: DistillConfig, device: torch.device, *, local_files_only: bool = False) -> Teacher:
    """Return the teacher of a run.

    Raises:
        ValueError: If it was a Python object, is gone, or is not the one that was distilled any more.
    """
    if config.teacher == PYTHON_OBJECT:
        raise ValueError(f"{run} was distilled from a Python object, which a folder cannot name; open it in Python")
    base = configured_teacher(config, device=str(device), local_files_only=local_files_only)
    facts = run / TEACHER_FILE
    if facts.is_file() and json.loads(facts.read_text(encoding="utf-8"))["fingerprint"] != base.fingerprint():
        raise ValueError(
            f"{run}: the teacher {config.teacher} is not the one it was distilled from: it has changed since"
        )
    base = base.with_negative_prompt(config.negative_prompt)
    return base if config.noise_level is None else base.with_image_condition(config.noise_level)


def restore_student(
    path: Path,
    config: DistillConfig,
    device: torch.device,
    *,
    local_files_only: bool = False,
    with_pictures: bool = False,
) -> Student:
    """Return the student of a run (its newest whole checkpoint) or of one checkpoint-N folder, averaged weights.

    `with_pictures`: its teacher checks itself with pictures of the first stage, if that is still there.
    """
    checkpoint = _newest(path) if is_run(path) else read_checkpoint(path)
    run = path if is_run(path) else path.parent
    base = run_teacher(run, config, device, local_files_only=local_files_only)
    if with_pictures and config.base_student is not None:
        # What an export writes does not depend on them.
        with contextlib.suppress(ValueError):
            base, _ = with_first_stage(base, config.base_student, config.noise_level, device=device)
    student = make_student(base, config).to(device)
    load_student(student, checkpoint.tensors.get("ema", checkpoint.tensors["student"]))
    return student


def _newest(run: Path) -> Checkpoint:
    _, checkpoint, messages = read_latest(run)
    for message in messages:
        warnings.warn(message, stacklevel=4)
    return checkpoint


def check_student_request(student: Student, config: DistillConfig, t: float, guidance_scale: float | None) -> None:
    """Raise ValueError if a student was not trained for a target time or a guidance scale."""
    if guidance_scale is not None and student.guidance_range is None:
        raise ValueError(
            f"--guidance_scale {guidance_scale:g}: this student was distilled with w = {config.guidance_scale:g} fixed; "
            "distil with --guidance_scale_min and --guidance_scale_max for one that takes it"
        )
    if guidance_scale is not None and student.guidance_range is not None:
        low, high = student.guidance_range
        if not low <= guidance_scale <= high:
            raise ValueError(
                f"--guidance_scale {guidance_scale:g} is outside {low:g} to {high:g}, which the student was trained on"
            )
    t_max = student.spec.t_max
    if not 0 <= t <= t_max:
        raise ValueError(f"--target_time must be between 0 (the finished image) and t_max = {t_max:.4g}, got {t:g}")
    if 0 < t < config.t_min:
        raise ValueError(f"--target_time {t:g} is below the run's --t_min {config.t_min:g}, which was never trained")


def base_of_run(
    run: Path, config: DistillConfig, teacher: Teacher, device: torch.device, *, given: str | Path | None = None
) -> FirstStage | None:
    """Return the student that draws the pictures that a run's teacher enlarges; None if it enlarges none.

    Args:
        run: The run.
        config: Its configuration.
        teacher: Its teacher, which is told the noise level and some pictures.
        device: Where the student goes.
        given: Where it lies now, or another one, which is warned of; where the run says if None.

    Raises:
        ValueError: If it is gone, has changed since, or does not fit.
    """
    found = _where(run, config.base_student, given) if config.base_student is not None else given
    _, base = with_first_stage(teacher, found, config.noise_level, device=device)
    if base is not None:
        _compare(base, run, given)
    return base


def base_of_pipeline(
    path: Path, pipeline: Path, run: Path | None, given: str | Path | None, device: torch.device
) -> FirstStage | None:
    """Return the student that draws the pictures that an exported pipeline enlarges; None if it enlarges none.

    Args:
        path: What the user named: the pipeline or its run.
        pipeline: The pipeline.
        run: The run it comes from, if it does.
        given: Where the student lies now, or another one, which is warned of; where the run says if None.
        device: Where the student goes.

    Raises:
        ValueError: If one is needed and not known or the other way round, or it has changed since.
    """
    if not enlarges(pipeline):
        if given is not None:
            raise ValueError(
                f"--base_student {given} was given, but --student {path} enlarges no picture; leave it out"
            )
        return None
    found = given
    if run is not None and (recorded := read_run_config(run).base_student) is not None:
        found = _where(run, recorded, given)
    if found is None:
        raise ValueError(
            f"--student {path} enlarges the pictures of an earlier stage: name the student that draws them with --base_student"
        )
    base = open_first_stage(found)
    base.teacher.to(device)
    if run is not None:
        _compare(base, run, given)
    return base


def _where(run: Path, recorded: Path, given: str | Path | None) -> str | Path:
    """Return where the base student of a run lies: `given`, or what the run recorded if that is still there."""
    if given is None and not recorded.is_dir():
        raise ValueError(
            f"{run} enlarges the pictures of the student in {recorded}, which is not there any more: say where it is with "
            "--base_student"
        )
    return recorded if given is None else given


def _compare(base: FirstStage, run: Path, given: str | Path | None) -> None:
    """Refuse a base student that has changed since a run was trained on its pictures; warn of another one that is given."""
    facts = run / TEACHER_FILE
    recorded = json.loads(facts.read_text(encoding="utf-8")).get("base_student") if facts.is_file() else None
    if recorded in (None, base.fingerprint):
        return
    if given is None:
        raise ValueError(
            f"{run}: the student in {base.folder} is not the one whose pictures it was trained on: it has changed since. "
            "Give that one, or this one all the same, with --base_student"
        )
    warnings.warn(f"{run} was trained on the pictures of another student than --base_student {given}", stacklevel=4)
