"""What lies on disk, opened again: a run or an exported folder becomes something that generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from onestill.data.cascade import FirstStage, with_first_stage
from onestill.diffusion.trajectory import STEPS
from onestill.export.export import MODULE_FILE
from onestill.runs.checks import check_device, check_guidance, resolve_device
from onestill.runs.folder import CONFIG_FILE, PIPELINE_FOLDER, is_run
from onestill.runs.restore import (
    base_of_pipeline,
    base_of_run,
    check_student_request,
    read_run_config,
    restore_student,
    run_of_pipeline,
)
from onestill.sampling.exported import open_pipeline
from onestill.sampling.samplers import Source, student_source, teacher_source
from onestill.students.student import Student, refuse_student
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import guided
from onestill.teachers.load import load_teacher
from onestill.training.config import DistillConfig


def load_source(
    student: str | Path | None = None,
    *,
    teacher: str | Path | Teacher | None = None,
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
            guidance_scale=guidance_scale,
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
    check_folder(path)
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
        parent = run_of_pipeline(path)
        known = None if parent is None else read_run_config(parent)
        base = base_of_pipeline(path, path, parent, base_student, device)
        return replace(open_pipeline(path, device, parent, known, base), reopen=reopen)
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
        base = base_of_pipeline(path, run / PIPELINE_FOLDER, run, base_student, device)
        return replace(open_pipeline(run / PIPELINE_FOLDER, device, run, config, base), reopen=reopen)
    student = restore_student(path, config, device, local_files_only=local_files_only)
    check_student_request(student, config, target_time, guidance_scale)
    base = base_of_run(run, config, student.teacher, device, given=base_student)
    return _student_at(student, path, config, target_time, guidance_scale, device, base)


def check_folder(student: str | Path) -> None:
    """Raise ValueError if there is no such folder."""
    if not Path(student).is_dir():
        raise ValueError(
            f"--student {student}: no such folder; give a run (--output_dir of distill) or an exported pipeline"
        )


def _student_at(
    student: Student,
    path: Path,
    config: DistillConfig,
    t: float,
    guidance_scale: float | None,
    device: torch.device,
    base: FirstStage | None,
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


def open_teacher(
    teacher: str | Path | Teacher,
    *,
    device: torch.device,
    num_steps: int = 50,
    guidance_scale: float | None = None,
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
    if isinstance(teacher, Teacher):
        if arguments:
            raise ValueError(
                f"--{next(iter(arguments))} was given with a teacher object; name it where the object is made: "
                "load_teacher(..., arguments={...})"
            )
    else:
        teacher = load_teacher(
            teacher,
            local_files_only=local_files_only,
            null_class=null_class,
            device=str(device),
            arguments=arguments,
        )
    refuse_student(teacher)
    teacher, base = with_first_stage(teacher, base_student, noise_level, device=device)
    scale = teacher.usual_guidance if guidance_scale is None else guidance_scale
    teacher = teacher.with_negative_prompt(negative_prompt, acts=scale != 1)
    return _teacher_at(teacher, scale, num_steps, solver, device, base)


def _teacher_at(
    teacher: Teacher,
    guidance_scale: float,
    num_steps: int,
    solver: str,
    device: torch.device,
    base: FirstStage | None,
) -> Source:
    """Return the multi-step sampler of a teacher in memory; at another guidance scale it stays the same one."""
    fitted = guided(teacher, guidance_scale)

    def reopen(scale: float | None, t: float | None) -> Source:
        if t is not None:
            raise ValueError(_no_target_time(t))
        return _teacher_at(teacher, guidance_scale if scale is None else scale, num_steps, solver, device, base)

    source = teacher_source(teacher, fitted, num_steps=num_steps, solver=solver, device=device, base_student=base)
    return replace(source, reopen=reopen)


def _no_target_time(t: float) -> str:
    return f"--target_time {t:g} is the student's; a teacher goes to the finished image"
