"""What lies on disk, opened again: a run or an exported folder becomes something that generates."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from onestill.chain import BaseStudent, choose_base, open_base
from onestill.checkpoint import Checkpoint, read_checkpoint, read_latest
from onestill.checks import (
    CONFIG_FILE,
    PIPELINE_FOLDER,
    TEACHER_FILE,
    check_device,
    check_guidance,
    is_run,
    resolve_device,
)
from onestill.config import DistillConfig, make_config
from onestill.distillation import PYTHON_OBJECT, configured_teacher, make_student
from onestill.export import MODULE_FILE
from onestill.prompt_plan import use_negative_prompt
from onestill.sources import Source, enlarges, open_pipeline, student_source, teacher_source
from onestill.student import Student
from onestill.teachers.base import NetworkTeacher, Teacher
from onestill.teachers.guidance import Guided, Thresholded
from onestill.teachers.load import load_teacher
from onestill.teachers.pipeline import PipelineTeacher
from onestill.trainer import load_student
from onestill.trajectory import STEPS


def load_source(
    student: str | Path | None = None,
    *,
    teacher: str | Path | NetworkTeacher | None = None,
    guidance_scale: float | None = None,
    target_time: float = 0.0,
    num_inference_steps: int | None = None,
    solver: str | None = None,
    null_class: int | None = None,
    negative_prompt: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    base_student: str | Path | None = None,
    noise_level: int | None = None,
    device: str = "auto",
    local_files_only: bool = False,
) -> Source:
    """Return what generates images, opened once for many: a student in one step, or a teacher in many.

    Args:
        student: A run's folder, a checkpoint-N folder, or an exported pipeline. Either this or `teacher`.
        teacher: A teacher, for its multi-step baseline.
        guidance_scale: w; for a student only if it was distilled to take it.
        target_time: The student's target time; 0 is the finished image.
        num_inference_steps: Steps of the teacher (50 if None); a student has one.
        solver: Step of the teacher: ddim (if None), heun or midpoint.
        null_class: The teacher's label for "no class".
        negative_prompt: Takes the place of "no prompt" in a teacher's guidance.
        arguments: Arguments of every call of a teacher's pipeline, such as height, as in `load_teacher`.
        base_student: For super-resolution: the student that draws what is enlarged, one step before; that of the
            student's run if None.
        noise_level: Noise mixed into those pictures, for a teacher; a student has that of its run.
        device: auto, cpu, cuda, cuda:N or mps.
        local_files_only: Never use the network.

    Raises:
        ValueError: If it does not exist or cannot do what is asked.
    """
    if (student is None) == (teacher is None):
        raise ValueError("give --student (one step) or --teacher (many steps), not both and not neither")
    if solver is not None and solver not in STEPS:
        raise ValueError(f"--solver {solver}: choose one of {', '.join(STEPS)}")
    check_guidance(guidance_scale)
    check_device(device)
    place = resolve_device(device)
    if teacher is not None:
        if target_time != 0:
            raise ValueError(_no_target_time(target_time))
        return open_teacher(
            teacher,
            device=place,
            num_steps=50 if num_inference_steps is None else num_inference_steps,
            guidance_scale=1.0 if guidance_scale is None else guidance_scale,
            solver=solver or "ddim",
            local_files_only=local_files_only,
            null_class=null_class,
            negative_prompt=negative_prompt,
            arguments=arguments,
            base_student=base_student,
            noise_level=noise_level,
        )
    assert student is not None
    if negative_prompt is not None:
        raise ValueError(
            f"--negative_prompt {negative_prompt!r} is the teacher's: a student has the one of its run distilled in"
        )
    if num_inference_steps not in (None, 1):
        raise ValueError(
            f"--num_inference_steps {num_inference_steps}: a student has one step; give --teacher for more"
        )
    for flag, given in (
        ("solver", solver),
        ("null_class", null_class),
        ("noise_level", noise_level),
        *(arguments or {}).items(),
    ):
        if given is not None:
            raise ValueError(f"--{flag} {given} is for a teacher; a student has it distilled in")
    return open_student(
        student,
        device=place,
        target_time=target_time,
        guidance_scale=guidance_scale,
        local_files_only=local_files_only,
        base_student=base_student,
    )


def open_student(
    path: str | Path,
    *,
    device: torch.device,
    target_time: float = 0.0,
    guidance_scale: float | None = None,
    local_files_only: bool = False,
    base_student: str | Path | None = None,
) -> Source:
    """Return the one-step student in a run's folder, a checkpoint-N folder or an exported pipeline.

    A run's exported pipeline is used where it can be; another target time, or the guidance scale of a student that
    takes one, needs the run's checkpoint and teacher.

    Args:
        path: The folder.
        device: Where it goes.
        target_time: The student's target time.
        guidance_scale: w, for a student that takes it.
        local_files_only: Never use the network.
        base_student: For a student that enlarges pictures: who draws them; that of its run if None.

    Raises:
        ValueError: If there is no student, or the exported folder cannot do what is asked.
    """

    def reopen(scale: float | None, t: float | None) -> Source:
        return open_student(
            path,
            device=device,
            target_time=target_time if t is None else t,
            guidance_scale=guidance_scale if scale is None else scale,
            local_files_only=local_files_only,
            base_student=base_student,
        )

    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"--student {path}: no such folder; give a run (--output_dir of distill) or an exported pipeline"
        )
    special = [
        flag
        for flag, given in (("--target_time", target_time != 0), ("--guidance_scale", guidance_scale is not None))
        if given
    ]
    if (path / "model_index.json").is_file():
        if special:
            raise ValueError(
                f"--student {path} is an exported pipeline, whose target time and guidance are baked in; "
                f"give the run's folder for {' and '.join(special)}"
            )
        # A run's own pipeline/ knows its run, as far as pictures to enlarge go.
        parent = path.parent if path.name == PIPELINE_FOLDER and is_run(path.parent) else None
        base = _base_of(path, path, parent, base_student, device)
        return replace(open_pipeline(path, device, base_student=base), reopen=reopen)
    for folder in (path, path / PIPELINE_FOLDER, path.parent / PIPELINE_FOLDER):
        if (folder / MODULE_FILE).is_file():
            raise ValueError(
                f"--student {path} is a network of your own: load it in Python with onestill.load_module({str(folder)!r}, network)"
            )
    if not is_run(path) and not is_run(path.parent):
        raise ValueError(
            f"--student {path} is neither a run (no {CONFIG_FILE}) nor an exported pipeline (no model_index.json)"
        )
    run = path if is_run(path) else path.parent
    config = read_run_config(run)
    if not special and run == path and (run / PIPELINE_FOLDER / "model_index.json").is_file():
        base = _base_of(path, run / PIPELINE_FOLDER, run, base_student, device)
        return replace(open_pipeline(run / PIPELINE_FOLDER, device, run, config, base), reopen=reopen)
    student = restore_student(path, config, device, local_files_only=local_files_only)
    check_student_request(student, config, target_time, guidance_scale)
    base = base_of_run(run, config, student.teacher, device, given=base_student)
    return _student_at(student, path, config, target_time, guidance_scale, device, base)


def _student_at(
    student: Student,
    path: Path,
    config: DistillConfig,
    t: float,
    guidance_scale: float | None,
    device: torch.device,
    base: BaseStudent | None,
) -> Source:
    """Return the one step of a student in memory; at another target time or guidance scale it stays the same one."""
    check_student_request(student, config, t, guidance_scale)
    source = student_source(
        student,
        f"the student in {path}",
        path if is_run(path) else path.parent,
        config,
        t=max(t, config.t_min),
        guidance_scale=guidance_scale,
        device=device,
        base_student=base,
    )

    def reopen(scale: float | None, time: float | None) -> Source:
        scale = guidance_scale if scale is None else scale
        return _student_at(student, path, config, t if time is None else time, scale, device, base)

    return replace(source, reopen=reopen)


def base_of_run(
    run: Path, config: DistillConfig, teacher: NetworkTeacher, device: torch.device, *, given: str | Path | None = None
) -> BaseStudent | None:
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
    base = choose_base(teacher, found, config.noise_level, device=device)
    if base is not None:
        _compare(base, run, given)
    return base


def _base_of(
    path: Path, pipeline: Path, run: Path | None, given: str | Path | None, device: torch.device
) -> BaseStudent | None:
    """Return the student that draws the pictures that an exported pipeline enlarges; None if it enlarges none."""
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
    base = open_base(found)
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


def _compare(base: BaseStudent, run: Path, given: str | Path | None) -> None:
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


def open_teacher(
    teacher: str | Path | NetworkTeacher,
    *,
    device: torch.device,
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    solver: str = "ddim",
    local_files_only: bool = False,
    null_class: int | None = None,
    negative_prompt: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    base_student: str | Path | None = None,
    noise_level: int | None = None,
) -> Source:
    """Return a teacher's multi-step sampler, thresholded as its own scheduler does.

    Where it enlarges pictures, `base_student` draws them and noise of `noise_level` is mixed into them.
    """
    if num_steps < 1:
        raise ValueError(f"--num_inference_steps must be at least 1, got {num_steps}")
    if isinstance(teacher, NetworkTeacher):
        if arguments:
            raise ValueError(
                f"--{next(iter(arguments))} was given with a teacher object; name it where the object is made: "
                "load_teacher(..., arguments={...})"
            )
        teacher = copy.copy(teacher)  # its null condition may be replaced here, and the caller's stays
    else:
        teacher = load_teacher(
            teacher,
            local_files_only=local_files_only,
            null_class=null_class,
            device=str(device),
            arguments=arguments,
        )
    base = choose_base(teacher, base_student, noise_level, device=device)
    use_negative_prompt(teacher, negative_prompt, acts=guidance_scale != 1)
    return _teacher_at(teacher, guidance_scale, num_steps, solver, device, base)


def _teacher_at(
    teacher: NetworkTeacher,
    guidance_scale: float,
    num_steps: int,
    solver: str,
    device: torch.device,
    base: BaseStudent | None,
) -> Source:
    """Return the multi-step sampler of a teacher in memory; at another guidance scale it stays the same one."""
    fitted: Teacher = Guided(teacher, guidance_scale)
    if teacher.spec.threshold.mode != "none":
        fitted = Thresholded(fitted, teacher.spec.threshold)

    def reopen(scale: float | None, t: float | None) -> Source:
        if t is not None:
            raise ValueError(_no_target_time(t))
        return _teacher_at(teacher, guidance_scale if scale is None else scale, num_steps, solver, device, base)

    source = teacher_source(teacher, fitted, num_steps=num_steps, solver=solver, device=device, base_student=base)
    return replace(source, reopen=reopen)


def _no_target_time(t: float) -> str:
    return f"--target_time {t:g} is the student's; a teacher goes to the finished image"


def run_teacher(
    run: Path, config: DistillConfig, device: torch.device, *, local_files_only: bool = False
) -> NetworkTeacher:
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
    use_negative_prompt(base, config.negative_prompt)
    if isinstance(base, PipelineTeacher) and config.noise_level is not None:
        base.set_picture(config.noise_level)
    return base


def read_run_config(run: Path) -> DistillConfig:
    """Return the resolved configuration of a run."""
    return make_config({}, run / CONFIG_FILE)


def restore_student(
    path: Path, config: DistillConfig, device: torch.device, *, local_files_only: bool = False
) -> Student:
    """Return the student of a run (its newest whole checkpoint) or of one checkpoint-N folder, averaged weights."""
    checkpoint = _newest(path) if is_run(path) else read_checkpoint(path)
    run = path if is_run(path) else path.parent
    base = run_teacher(run, config, device, local_files_only=local_files_only)
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
