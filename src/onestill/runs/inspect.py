"""What is known of a teacher before it is distilled, and what a run on it would cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from onestill.core.devices import seconds_of
from onestill.core.tensors import num_parameters, row_bytes, to_device
from onestill.data.cascade import FirstStage
from onestill.data.conditions import check_labels, middle_guidance
from onestill.data.prompt_pool import most_prompts
from onestill.diffusion.trajectory import CALLS_PER_STEP
from onestill.objectives.registry import rows_of
from onestill.runs.build import fit_teacher, make_student, open_prompts, with_embedded_prompts, with_usual_guidance
from onestill.runs.checks import resolve_device
from onestill.students.injection import TimeEmbeddingInjection
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.training.config import DistillConfig


@dataclass(frozen=True)
class Inspection:
    """What `onestill inspect` says; `as_dict` is its --json."""

    teacher: str
    folder: str
    family: str
    process: str
    prediction_type: str
    conditioning: str
    num_classes: int | None
    null_class: int | None
    sample_shape: tuple[int, ...]
    arguments: dict[str, Any]
    num_parameters: int
    t_max: float
    t_max_reason: str
    alpha_at_t_max: float
    sigma_at_t_max: float
    thresholding: str
    guidance: str
    guidance_scale: float
    negative_prompts: bool
    prompt_limits: dict[str, int]
    num_prompts: int
    prompt_bytes: int
    target_time_enters: str
    train_batch_size: int
    estimated_memory_gb: float
    estimated_seconds_per_step: float
    max_train_steps: int
    estimated_seconds_per_anchor: float
    num_anchors: int
    estimate_device: str
    enlarges: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def inspect_teacher(teacher: Teacher, config: DistillConfig, base: FirstStage | None = None) -> Inspection:
    """Return what is known of `teacher`, with the cost of a run under `config`, measured on a few images.

    Args:
        teacher: The teacher.
        config: Settings of the run; nothing is written to its output_dir.
        base: The student that would draw the pictures that the teacher enlarges, if it is known.
    """
    config = with_usual_guidance(config, teacher)
    device = resolve_device(config.device)
    spec = teacher.to(device).spec
    student = make_student(teacher, config).to(device)
    cost = estimate(teacher, student, config, device, base)
    reached = isinstance(student.injection, TimeEmbeddingInjection)
    return Inspection(
        teacher=spec.source,
        folder="" if teacher.folder is None else str(teacher.folder),
        family=spec.family,
        process=spec.process.name,
        prediction_type=spec.prediction_type,
        conditioning=spec.conditioning,
        num_classes=spec.num_classes,
        null_class=spec.null_class,
        sample_shape=spec.sample_shape,
        arguments=dict(teacher.arguments),
        num_parameters=num_parameters(teacher.network) if isinstance(teacher.network, torch.nn.Module) else 0,
        t_max=spec.t_max,
        t_max_reason=spec.t_max_reason,
        alpha_at_t_max=spec.process.level(spec.t_max)[0],
        sigma_at_t_max=spec.process.level(spec.t_max)[1],
        thresholding=spec.threshold.mode,
        guidance=_guidance(teacher),
        guidance_scale=config.guidance_scale,
        negative_prompts=spec.text and teacher.can_guide,
        prompt_limits=_prompt_limits(teacher),
        num_prompts=_num_prompts(teacher, config),
        prompt_bytes=_prompt_bytes(teacher, base),
        target_time_enters="at the network's time embedding" if reached else "as a bias of every layer (fallback)",
        train_batch_size=config.train_batch_size,
        estimated_memory_gb=cost.memory / 1e9,
        estimated_seconds_per_step=cost.step_seconds,
        max_train_steps=config.max_train_steps,
        estimated_seconds_per_anchor=cost.anchor_seconds,
        num_anchors=sum(
            kind.cost(config, config.train_batch_size).pool for kind in rows_of(config, config.train_batch_size)
        ),
        estimate_device=str(device),
        enlarges=_enlarges(teacher, base),
    )


def _guidance(teacher: Teacher) -> str:
    """Return how a teacher is guided: "classifier-free", "embedded" (an input of its network) or "none"."""
    if teacher.guidance_input is not None:
        return "embedded"
    return "classifier-free" if teacher.can_guide else "none"


def _prompt_limits(teacher: Teacher) -> dict[str, int]:
    """Return the tokens of a prompt that each text encoder takes, where that is known."""
    if not teacher.spec.text:
        return {}
    return {name: limit.room for limit in teacher.prompt_limits for name in limit.encoders}


def _num_prompts(teacher: Teacher, config: DistillConfig) -> int:
    """Return how many prompts a run has to encode at most: those that it shows, and those that it draws from."""
    if not teacher.spec.text:
        return 0
    config = with_embedded_prompts(config)
    named, prompts = len(config.validation_prompt), open_prompts(config)
    wanted = most_prompts(config) + (named or config.num_validation_images)
    return wanted if prompts is None else min(len(prompts) + named, wanted)


def _prompt_bytes(teacher: Teacher, base: FirstStage | None) -> int:
    """Return the size of an encoded prompt, that of a base student's own encoders beside it included."""
    if not teacher.spec.text:
        return 0
    own = 0 if base is None or base.shares_rows(teacher) else row_bytes(base.teacher.example_cond)
    return row_bytes(teacher.prompt_rows(teacher.example_cond)) + own


def _enlarges(teacher: Teacher, base: FirstStage | None) -> str:
    """Return what picture a teacher enlarges, in words; "" if it enlarges none."""
    if teacher.image_condition is None:
        return ""
    if base is None:
        return "a picture to enlarge (name the student that draws it with --base_student)"
    size = "x".join(map(str, base.examples.shape[2:]))
    return f"{size} pictures of {base.name} to enlarge, noise level {teacher.image_condition.level}"


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        memory: Bytes.
        step_seconds: Of one optimiser step.
        anchor_seconds: Of one anchor, which are all made before the first step.
    """

    memory: float
    step_seconds: float
    anchor_seconds: float


def estimate(
    teacher: Teacher,
    student: Student,
    config: DistillConfig,
    device: torch.device,
    base: FirstStage | None = None,
) -> Cost:
    """Return what a run takes.

    Memory: the teacher's weights, which a LoRA student shares; what the student trains, with its gradients, two Adam
    moments and their average; and the activations kept for the backward pass. Time: a forward with backward for every
    row, and for those that are no anchors the student's and the teacher's forwards of its target; an anchor is the
    teacher's forwards of all its steps. Both are measured on a few images and scaled to the batch. A base student adds
    its weights and its one step.
    """
    num = min(8, config.train_batch_size)
    if config.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    fitted = fit_teacher(teacher, config)
    check_labels(config.class_labels, teacher.spec)
    cond = to_device({**teacher.example_rows(num), **middle_guidance(config.guidance_range, num)}, device)
    x = teacher.spec.trajectory.start(torch.zeros(num, *teacher.spec.sample_shape, device=device))
    t_max = teacher.spec.t_max
    kept, owned = 0, {p.untyped_storage().data_ptr() for p in student.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        # A weight is kept as it is or as a view, transposed: counted with the weights.
        is_weight = tensor.untyped_storage().data_ptr() in owned
        kept += 0 if is_weight else tensor.numel() * tensor.element_size()
        return tensor

    def student_loss() -> Any:
        with autocast(config.mixed_precision, device):
            return student(x, None, t_max / 2, cond).square().mean()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student_loss().backward()
    student.zero_grad()

    drawn = None
    if base is not None:
        base.teacher.to(device)
        drawn = torch.zeros(num, *base.shape), base.teacher.example_rows(num)

    def pictures() -> None:
        if base is not None and drawn is not None:
            base.pictures(*drawn)

    def teacher_step() -> None:
        with torch.no_grad(), autocast(config.mixed_precision, device):
            for _ in range(CALLS_PER_STEP[config.solver]):
                fitted.denoised(x, t_max / 2, cond)

    def student_target() -> None:
        with torch.no_grad(), autocast(config.mixed_precision, device):
            student(x, None, t_max / 2, cond)

    def learn() -> None:
        student_loss().backward()

    learning, of_student, of_teacher, of_base = (
        _seconds(call, device) for call in (learn, student_target, teacher_step, pictures)
    )
    student.zero_grad()
    scale = config.train_batch_size / num
    copies = 4 + (config.ema_decay > 0) + (config.ema_target_decay > 0)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    weights = 4 * (copies * trained + _num_weights(teacher) + (_num_weights(base.teacher) if base else 0))
    rows = rows_of(config, config.train_batch_size)
    costs = {kind: kind.cost(config, config.train_batch_size) for kind in rows}
    seconds, in_teacher = learning + of_base, of_teacher / CALLS_PER_STEP[config.solver]
    for kind, cost in costs.items():
        share = rows[kind] / config.train_batch_size
        seconds += share * (cost.student * of_student + cost.teacher * in_teacher + cost.learned * learning)
    pool = max(costs.values(), key=lambda cost: cost.pool)
    an_item = (pool.teacher_per_item * in_teacher + of_base) / num
    return Cost(weights + kept * scale, seconds * scale * config.gradient_accumulation_steps, an_item)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return what a call takes once everything is warm."""
    call()
    return seconds_of(lambda: [call() for _ in range(3)], device) / 3


def autocast(mixed_precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which a run of this precision calls its networks."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    return torch.autocast(device.type, dtype=dtype, enabled=mixed_precision != "no")


def _num_weights(teacher: Teacher) -> int:
    return num_parameters(teacher.network) if isinstance(teacher.network, torch.nn.Module) else 0
