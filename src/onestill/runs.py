"""What lies on disk, opened again: a run or an exported folder becomes something that generates."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestill.checkpoint import Checkpoint, read_checkpoint, read_latest
from onestill.config import DistillConfig, make_config
from onestill.distillation import (
    CONFIG_FILE,
    PIPELINE_FOLDER,
    PYTHON_OBJECT,
    TEACHER_FILE,
    is_run,
    make_student,
)
from onestill.export import MODULE_FILE, load_pipeline
from onestill.sampler import Generate, student_generator, teacher_generator
from onestill.student import Student
from onestill.teachers.base import NetworkTeacher, Teacher
from onestill.teachers.guidance import Guided, Thresholded
from onestill.teachers.load import load_teacher
from onestill.tensors import Cond
from onestill.trainer import load_student


@dataclass(frozen=True)
class Source:
    """Something that generates images.

    Attributes:
        name: What it is, in words.
        generate: From noise and conditions to images.
        sample_shape: Shape of one sample.
        labels: Labels it can be asked for; empty if unconditional.
        folder: The exported pipeline it is, if it is one.
        run: The run it comes from, if it does.
        config: That run's configuration.
        num_steps: Steps per image.
        calls: Network evaluations per image.
    """

    name: str
    generate: Generate
    sample_shape: tuple[int, ...]
    labels: tuple[int, ...]
    folder: Path | None = None
    run: Path | None = None
    config: DistillConfig | None = None
    num_steps: int = 1
    calls: int = 1

    def conditions(self, num: int, chosen: tuple[int, ...] = (), *, seed: int = 0) -> Cond:
        """Return `num` conditions: going round `chosen`, or else seed i has label i modulo the number of all labels.

        Args:
            num: How many.
            chosen: Labels to go round.
            seed: The first seed, seed, seed + 1, ...

        Raises:
            ValueError: If labels are chosen of a source without, or one is unknown.
        """
        if chosen and not self.labels:
            raise ValueError(f"--class_labels {list(chosen)} was given, but {self.name} is unconditional")
        if unknown := sorted(set(chosen) - set(self.labels)):
            raise ValueError(f"--class_labels {unknown}: {self.name} knows {self.labels[0]} to {max(self.labels)}")
        labels = chosen or self.labels
        first = 0 if chosen else seed
        rows = [labels[i % len(labels)] for i in range(first, first + num)] if labels else []
        return {"class_labels": torch.tensor(rows)} if labels else {}


def open_student(
    path: str | Path,
    *,
    device: torch.device,
    target_time: float = 0.0,
    guidance_scale: float | None = None,
    local_files_only: bool = False,
) -> Source:
    """Return the one-step student in a run's folder, a checkpoint-N folder or an exported pipeline.

    A run's exported pipeline is used where it can be; another target time, or the guidance scale of a student that
    takes one, needs the run's checkpoint and teacher.

    Raises:
        ValueError: If there is no student, or the exported folder cannot do what is asked.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"--student {path}: no such folder; give a run (--output_dir of distill) or an exported pipeline"
        )
    special = target_time != 0 or guidance_scale is not None
    if (path / "model_index.json").is_file():
        if special:
            raise ValueError(
                f"--student {path} is an exported pipeline, whose target time and guidance are baked in; "
                "give the run's folder for --target_time or --guidance_scale"
            )
        return _open_pipeline(path, device)
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
        return _open_pipeline(run / PIPELINE_FOLDER, device, run, config)
    student = restore_student(path, config, device, local_files_only=local_files_only)
    check_student_request(student, config, target_time, guidance_scale)
    spec = student.spec
    generate = _clipped(student_generator(student, t=max(target_time, config.t_min), device=device))
    if student.guidance_range is not None:
        w = sum(student.guidance_range) / 2 if guidance_scale is None else guidance_scale
        generate = _with_guidance(generate, w)
    labels = config.class_labels or tuple(spec.labels)
    return Source(f"the student in {path}", generate, spec.sample_shape, labels, run=run, config=config)


def open_teacher(
    teacher: str | Path | Teacher,
    *,
    device: torch.device,
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    solver: str = "ddim",
    local_files_only: bool = False,
    null_class: int | None = None,
) -> Source:
    """Return a teacher's multi-step sampler, thresholded as its own scheduler does."""
    if num_steps < 1:
        raise ValueError(f"--num_inference_steps must be at least 1, got {num_steps}")
    if not isinstance(teacher, Teacher):
        teacher = load_teacher(teacher, local_files_only=local_files_only, null_class=null_class, device=str(device))
    fitted: Teacher = Guided(teacher, guidance_scale)
    if teacher.spec.threshold.mode != "none":
        fitted = Thresholded(fitted, teacher.spec.threshold)
    return teacher_source(fitted, num_steps=num_steps, solver=solver, device=device)


def teacher_source(teacher: Teacher, *, num_steps: int, device: torch.device, solver: str = "ddim") -> Source:
    """Return the multi-step sampler of a teacher that is guided and thresholded already."""
    generate = teacher_generator(teacher, num_steps=num_steps, solver=solver, device=device)
    calls = num_steps * teacher.calls * (1 if solver == "ddim" else 2)
    labels = tuple(teacher.spec.labels)
    return Source(
        f"the teacher {teacher.spec.source}",
        generate,
        teacher.spec.sample_shape,
        labels,
        num_steps=num_steps,
        calls=calls,
    )


def run_teacher(
    run: Path, config: DistillConfig, device: torch.device, *, local_files_only: bool = False
) -> NetworkTeacher:
    """Return the teacher of a run.

    Raises:
        ValueError: If it was a Python object, is gone, or is not the one that was distilled any more.
    """
    if config.teacher == PYTHON_OBJECT:
        raise ValueError(f"{run} was distilled from a Python object, which a folder cannot name; open it in Python")
    base = load_teacher(
        config.teacher,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        local_files_only=config.local_files_only or local_files_only,
        null_class=config.null_class,
        t_max=config.t_max,
        device=str(device),
    )
    facts = run / TEACHER_FILE
    if facts.is_file() and json.loads(facts.read_text(encoding="utf-8"))["fingerprint"] != base.fingerprint():
        raise ValueError(
            f"{run}: the teacher {config.teacher} is not the one it was distilled from: it has changed since"
        )
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


def _open_pipeline(
    folder: Path, device: torch.device, run: Path | None = None, config: DistillConfig | None = None
) -> Source:
    try:
        pipeline = load_pipeline(folder, device)
        network = pipeline.unet.config
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--student {folder} does not load: {str(error).splitlines()[0]}") from error
    size = network.sample_size
    shape = (network.in_channels, *((size, size) if isinstance(size, int) else size))
    null_class, chosen = (None, ()) if config is None else (config.null_class, config.class_labels)
    labels = chosen or tuple(i for i in range(network.num_class_embeds or 0) if i != null_class)
    return Source(f"the student in {folder}", _one_step(pipeline), shape, labels, folder=folder, run=run, config=config)


def _one_step(pipeline: Any) -> Generate:
    """Return an exported pipeline's one step, its own network and scheduler, on noise that is given."""
    scheduler, network = pipeline.scheduler, pipeline.unet
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]

    @torch.no_grad()
    def generate(eps: Tensor, cond: Cond) -> Tensor:
        x = eps.to(network.device) * scheduler.init_noise_sigma
        labels = cond["class_labels"].to(network.device) if "class_labels" in cond else None
        images: Tensor = scheduler.step(network(x, t, class_labels=labels).sample, t, x).prev_sample
        return images

    return generate


def _clipped(generate: Generate) -> Generate:
    """Return the same images as an exported pipeline's scheduler leaves them, within [-1, 1]."""
    return lambda eps, cond: generate(eps, cond).clamp(-1, 1)


def _with_guidance(generate: Generate, guidance_scale: float) -> Generate:
    return lambda eps, cond: generate(eps, {**cond, "guidance_scale": torch.full((len(eps),), guidance_scale)})


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
