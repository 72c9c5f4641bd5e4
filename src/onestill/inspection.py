"""What is known of a teacher before it is distilled, and what a run on it would cost."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from onestill.conditions import check_labels, middle_guidance
from onestill.config import DistillConfig
from onestill.distillation import fit_teacher, resolve_device
from onestill.sampler import to_device
from onestill.student import Student, TimeEmbeddingInjection
from onestill.teachers.base import NetworkTeacher
from onestill.tensors import num_parameters
from onestill.trajectory import CALLS_PER_STEP


@dataclass(frozen=True)
class Inspection:
    """What `onestill inspect` says; `as_dict` is its --json."""

    teacher: str
    family: str
    process: str
    prediction_type: str
    conditioning: str
    num_classes: int | None
    null_class: int | None
    sample_shape: tuple[int, ...]
    num_parameters: int
    t_max: float
    t_max_reason: str
    alpha_at_t_max: float
    thresholding: str
    target_time_enters: str
    train_batch_size: int
    estimated_memory_gb: float
    estimated_seconds_per_step: float
    estimate_device: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def inspect_teacher(teacher: NetworkTeacher, config: DistillConfig) -> Inspection:
    """Return what is known of `teacher`, with the cost of a run under `config`, measured on a few images.

    Args:
        teacher: The teacher.
        config: Settings of the run; nothing is written to its output_dir.
    """
    device = resolve_device(config.device)
    spec = teacher.to(device).spec
    student = Student(teacher, guidance_range=config.guidance_range).to(device)
    memory, seconds = estimate(teacher, student, config, device)
    reached = isinstance(student.injection, TimeEmbeddingInjection)
    return Inspection(
        teacher=spec.source,
        family=spec.family,
        process=spec.process.name,
        prediction_type=spec.prediction_type,
        conditioning=spec.conditioning,
        num_classes=spec.num_classes,
        null_class=spec.null_class,
        sample_shape=spec.sample_shape,
        num_parameters=num_parameters(teacher.network) if isinstance(teacher.network, torch.nn.Module) else 0,
        t_max=spec.t_max,
        t_max_reason=spec.t_max_reason,
        alpha_at_t_max=spec.process.level(spec.t_max)[0],
        thresholding=spec.threshold.mode,
        target_time_enters="at the network's time embedding" if reached else "as a bias of every layer (fallback)",
        train_batch_size=config.train_batch_size,
        estimated_memory_gb=memory / 1e9,
        estimated_seconds_per_step=seconds,
        estimate_device=str(device),
    )


def estimate(
    teacher: NetworkTeacher, student: Student, config: DistillConfig, device: torch.device
) -> tuple[float, float]:
    """Return (bytes, seconds per optimiser step) of a run.

    Memory: the teacher's weights; the student's weights, gradients, two Adam moments and their average; and the
    activations kept for the backward pass, counted on a few images and scaled to the batch. Time: one student and
    the teacher's forwards and one forward with backward, on a few images, scaled likewise.
    """
    num = min(8, config.train_batch_size)
    fitted = fit_teacher(teacher, config)
    check_labels(config.class_labels, teacher.spec)
    cond = to_device({**teacher.example_rows(num), **middle_guidance(config.guidance_range, num)}, device)
    x = teacher.spec.trajectory.start(torch.zeros(num, *teacher.spec.sample_shape, device=device))
    t_max = teacher.spec.t_max
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student(x, t_max / 2, cond).square().mean().backward()
    student.zero_grad()

    def step() -> None:
        with torch.no_grad():
            student(x, t_max / 2, cond)
            for _ in range(CALLS_PER_STEP[config.solver]):
                fitted.denoised(x, t_max / 2, cond)
        student(x, t_max / 2, cond).square().mean().backward()

    step()
    _wait(device)
    started = time.perf_counter()
    for _ in range(3):
        step()
    _wait(device)
    seconds = (time.perf_counter() - started) / 3
    student.zero_grad()
    scale = config.train_batch_size / num
    copies = 4 + (config.ema_decay > 0) + (config.ema_target_decay > 0)
    weights = 4 * (copies * num_parameters(student) + _num_weights(teacher))
    activations = kept * scale * (0.5 if config.mixed_precision != "no" else 1.0)
    return weights + activations, seconds * scale * config.gradient_accumulation_steps


def _num_weights(teacher: NetworkTeacher) -> int:
    return num_parameters(teacher.network) if isinstance(teacher.network, torch.nn.Module) else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
