"""What is known of a teacher before it is distilled, and what a run on it would cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestill.core.arguments import checked
from onestill.core.devices import resolve_device, seconds_of
from onestill.core.errors import SettingError, named
from onestill.core.memory import enough_memory
from onestill.core.tensors import num_parameters, row_bytes, to_device
from onestill.data.cascade import FirstStage
from onestill.data.conditions import check_labels, middle_guidance
from onestill.data.prompts import PromptFile
from onestill.objectives.anchors import Anchors
from onestill.objectives.registry import OBJECTIVES, rows_of
from onestill.runs.build import configure, doubts_about, make_student, num_draws, open_teacher
from onestill.runs.plan import make_plan
from onestill.runs.space import space_of
from onestill.students.injection import TimeEmbeddingInjection
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.training.config import DistillConfig

MOST_MEMORY = 32e12
"""Bytes that the largest machine has."""
A_PICTURE = "a picture to enlarge"
"""What a teacher enlarges where nobody has named the student that draws it."""


@dataclass(frozen=True)
class Inspection:
    """What `onestill inspect` says."""

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
    guidance_interval: tuple[float, float] | None
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
    checkpoint_bytes: int
    num_checkpoints: int
    export_bytes: int
    pool_bytes: int
    plan: str
    snapshot_bytes: int
    warning: str


@checked(DistillConfig)
def inspect_teacher(
    teacher: str | Path | Teacher, *, config_file: str | Path | None = None, **settings: Any
) -> Inspection:
    """Return what is known of a teacher, with the cost of a run under `settings`, measured on a few images.

    Args:
        teacher: A pipeline folder, a hub id, an embedded teacher's name, or a teacher object.
        config_file: YAML file of settings, or the name of a shipped one; `settings` win over it.
        **settings: Fields of `onestill.DistillConfig`; nothing is written to an `output_dir`.

    Raises:
        SettingError: If a setting is unusable, as of `distill`.
    """
    config = configure(teacher, {"output_dir": Path("run"), **settings}, config_file)
    return inspect_run(config, teacher if isinstance(teacher, Teacher) else None)


def inspect_run(config: DistillConfig, teacher: Teacher | None = None) -> Inspection:
    """Return what is known of the teacher of a run, given where it is an object, and what the run would cost."""
    plan, speed = "", None
    if config.budget is not None:
        found, teacher = make_plan(config, teacher)
        config, plan, speed = found.config, found.words, found.speed
    config, teacher, first_stage, prompt_file = open_teacher(config, teacher, needs_first_stage=False)
    check_labels(config.class_labels, teacher.spec)
    device = resolve_device(config.device)
    spec = teacher.to(device).spec
    warning = doubts_about(teacher, config)
    student = make_student(teacher, config).to(device)
    with enough_memory("a step of a few images", less_memory(config, student)):
        cost = estimate(student, config, device, first_stage)
    if speed is not None:  # which was measured on whole steps
        per_anchor = Anchors.cost(config, config.train_batch_size).teacher_per_item * speed.call
        cost = replace(cost, step_seconds=speed.step, item_seconds=per_anchor)
    if cost.memory > MOST_MEMORY:
        why = f"a step takes {cost.memory / 1e12:,.0f} TB, which no machine has"
        raise SettingError("train_batch_size", config.train_batch_size, why, "lower it")
    space = space_of(student, config)
    alpha, sigma = spec.process.level(spec.t_max)
    limits = teacher.prompt_limits if spec.text else ()
    way = "classifier-free" if teacher.can_guide else "none"
    way = "embedded" if teacher.guidance_input is not None else way  # an input of its network
    reached = isinstance(student.injection, TimeEmbeddingInjection)
    of_spec = ("family", "prediction_type", "conditioning", "num_classes", "null_class", "sample_shape", "t_max")
    of_config = ("guidance_scale", "guidance_interval", "train_batch_size", "max_train_steps")
    return Inspection(
        **{name: getattr(spec, name) for name in (*of_spec, "t_max_reason")},
        **{name: getattr(config, name) for name in of_config},
        teacher=spec.source,
        folder="" if teacher.folder is None else str(teacher.folder),
        process=spec.process.name,
        arguments=dict(teacher.arguments),
        num_parameters=_num_weights(teacher),
        alpha_at_t_max=alpha,
        sigma_at_t_max=sigma,
        thresholding=spec.threshold.mode,
        guidance=way,
        negative_prompts=spec.text and teacher.can_guide,
        prompt_limits={name: limit.room for limit in limits for name in limit.encoders},
        num_prompts=_num_prompts(teacher, config, prompt_file),
        prompt_bytes=_prompt_bytes(teacher, first_stage),
        target_time_enters="at the network's time embedding" if reached else "as a bias of every layer (fallback)",
        estimated_memory_gb=cost.memory / 1e9,
        estimated_seconds_per_step=cost.step_seconds,
        estimated_seconds_per_anchor=cost.item_seconds,
        num_anchors=cost.pool,
        estimate_device=str(device),
        enlarges=_enlarges(teacher, first_stage),
        checkpoint_bytes=space.checkpoint,
        num_checkpoints=space.num_checkpoints,
        export_bytes=space.export,
        pool_bytes=space.pools,
        plan=plan,
        snapshot_bytes=space.snapshots,
        warning=warning,
    )


def _num_prompts(teacher: Teacher, config: DistillConfig, prompts: PromptFile | None) -> int:
    """Return how many prompts a run has to encode at most: those that it shows, and those that it draws from."""
    if not teacher.spec.text:
        return 0
    shown = len(config.validation_prompt)
    wanted = (config.num_prompts or num_draws(config)) + (shown or config.num_validation_images)
    return wanted if prompts is None else min(len(prompts) + shown, wanted)


def _prompt_bytes(teacher: Teacher, first_stage: FirstStage | None) -> int:
    """Return the size of an encoded prompt, that of the first stage's own encoders included."""
    if not teacher.spec.text:
        return 0
    own = 0
    if first_stage is not None and not first_stage.shares_rows(teacher):
        own = row_bytes(first_stage.teacher.example_cond)
    return row_bytes(teacher.prompt_rows(teacher.example_cond)) + own


def _enlarges(teacher: Teacher, first_stage: FirstStage | None) -> str:
    """Return what picture a teacher enlarges, in words; "" if it enlarges none."""
    if teacher.image_condition is None:
        return ""
    if first_stage is None:
        return A_PICTURE
    size = "x".join(map(str, first_stage.examples.shape[2:]))
    return f"{size} pictures of {first_stage.name} to enlarge, noise level {teacher.image_condition.level}"


@dataclass(frozen=True)
class RunCost:
    """What a run takes: bytes, seconds of a step, items that pools hold, seconds of one (or of one they might hold)."""

    memory: float
    step_seconds: float
    pool: int
    item_seconds: float


def estimate(
    student: Student, config: DistillConfig, device: torch.device, first_stage: FirstStage | None = None
) -> RunCost:
    """Return what a run takes.

    Memory: the teacher's weights, which a LoRA student shares; what the student trains, with its gradients, two Adam
    moments and their averages; and the activations kept for the backward pass. Time: a forward with backward for every
    row, and what each objective says that its rows and its pool cost besides. Both are measured on a few images and
    scaled to the batch. A first stage adds its weights and its one step.
    """
    num = min(8, config.train_batch_size)
    if config.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    passes = _Passes(student, config, device, num)
    kept = passes.activations()
    activations = float(kept)
    calls = (passes.learn, passes.student_target, passes.teacher_call)
    learning, of_student, of_teacher = (_seconds(call, device) for call in calls)
    student.zero_grad()
    of_stage = 0.0
    if first_stage is not None:
        first_stage.teacher.to(device)
        drawn = torch.zeros(num, *first_stage.shape), first_stage.teacher.example_rows(num)
        of_stage = _seconds(lambda: first_stage.pictures(*drawn), device)
    scale, rows = config.train_batch_size / num, rows_of(config, config.train_batch_size)
    seconds, pool, possible, in_pool, networks = learning + of_stage, 0, 0, 0.0, 1
    for kind in OBJECTIVES:
        cost, share = kind.cost(config, config.train_batch_size), rows.get(kind, 0) / config.train_batch_size
        seconds += share * (cost.student * of_student + cost.teacher * of_teacher + cost.learned * learning)
        pool += cost.pool if share else 0
        networks += cost.networks if share else 0
        activations += share * cost.learned * kept
        possible += cost.pool
        in_pool += cost.pool * (cost.teacher_per_item * of_teacher + of_stage) / num
    teachers = [student.teacher, *([first_stage.teacher] if first_stage else [])]
    copies = 4 * networks + len(config.ema_tracks) + (config.ema_target_decay > 0)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    weights = copies * trained + sum(_num_weights(teacher) for teacher in teachers)
    step = seconds * scale * config.gradient_accumulation_steps
    return RunCost(4 * weights + activations * scale, step, pool, in_pool / max(possible, 1))


def less_memory(config: DistillConfig, student: Student) -> str:
    """Return which settings of a run take less memory, in words: those that it can use and does not use yet."""
    can_checkpoint = hasattr(student.network, "enable_gradient_checkpointing")
    others = {
        "gradient_checkpointing": can_checkpoint and not config.gradient_checkpointing,
        f"{named('corrector_fraction')} 0": config.corrector_fraction > 0,
        f"{named('lora_rank')} 64": config.lora_rank is None,
        f"{named('num_ema_snapshots')} 0": len(config.ema_tracks) > 1,
        f"{named('mixed_precision')} bf16": config.mixed_precision == "no",
    }
    found = [name if " " in name else named(name) for name, is_left in others.items() if is_left]
    batch = f"lower {named('train_batch_size')} and raise {named('gradient_accumulation_steps')} as much"
    return f"{batch}{', or give ' if found else ''}{' or '.join(found)}"


class _Passes:
    """The passes that a step is made of, each on a few images."""

    def __init__(self, student: Student, config: DistillConfig, device: torch.device, num: int) -> None:
        self.student, self.teacher, spec = student, student.teacher, student.spec
        self.cond = to_device({**self.teacher.example_rows(num), **middle_guidance(config.guidance_range, num)}, device)
        self.x = spec.trajectory.start(torch.zeros(num, *spec.sample_shape, device=device))
        self.t = spec.t_max / 2
        # Guidance on an interval costs what it does of the levels of a trajectory.
        self.times = (torch.arange(num) + 0.5).double() * spec.t_max / num
        self.precision, self.device = config.mixed_precision, device

    def autocast(self) -> torch.autocast:
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "no")

    def learn(self) -> None:
        with self.autocast():
            loss = self.student(self.x, None, self.t, self.cond).square().mean()
        loss.backward()

    @torch.no_grad()
    def student_target(self) -> None:
        with self.autocast():
            self.student(self.x, None, self.t, self.cond)

    @torch.no_grad()
    def teacher_call(self) -> None:
        with self.autocast():
            self.teacher.denoised(self.x, self.times, self.cond)

    def activations(self) -> int:
        """Return the bytes that a forward of the student keeps for its backward."""
        kept, owned = 0, {p.untyped_storage().data_ptr() for p in self.student.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            # A weight is kept as it is or as a view, transposed: counted with the weights.
            is_weight = tensor.untyped_storage().data_ptr() in owned
            kept += 0 if is_weight else tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.learn()
        self.student.zero_grad()
        return kept


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return what a call takes once everything is warm."""
    call()
    return seconds_of(lambda: [call() for _ in range(3)], device) / 3


def _num_weights(teacher: Teacher) -> int:
    return num_parameters(teacher.network) if isinstance(teacher.network, torch.nn.Module) else 0
