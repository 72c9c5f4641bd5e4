"""Samplers that call a network: prompts are encoded before it, latents decoded behind it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from onestill.core.arguments import checked
from onestill.core.errors import SettingError, named
from onestill.core.tensors import Cond
from onestill.data.cascade import FirstStage, seeded_rows
from onestill.diffusion.names import SolverName
from onestill.diffusion.trajectory import CALLS_PER_STEP, times_called, uniform_times
from onestill.sampling.generate import Rows, student_generator, teacher_generator
from onestill.sampling.samplers.base import Sampler
from onestill.students.model_card import Distilled
from onestill.students.settings import check_steps
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import guided
from onestill.teachers.prompt_limits import PromptLimit

NOTHING_SAID = Distilled()


class NetworkSampler(Sampler):
    """A sampler around the conditions and the decoder of a teacher; a `first_stage` draws what is enlarged, if it is."""

    clamps: bool

    def __init__(self, teacher: Teacher, first_stage: FirstStage | None) -> None:
        self.teacher, self.first_stage = teacher, first_stage
        self.sample_shape, self.labels = teacher.spec.sample_shape, tuple(teacher.spec.labels)
        self.takes_text, self.arguments = teacher.spec.text, teacher.arguments
        self.has_decoder = self.gives_latents = self.can_decode = teacher.has_decoder
        if first_stage is not None and teacher.image_condition is not None:
            teacher.share_encoders(first_stage.teacher)
            self.noise_level = teacher.image_condition.level

    @abstractmethod
    def denoised(self, eps: Tensor, cond: Cond) -> Tensor:
        """Return what the network makes of noise under encoded conditions, [B, *sample_shape]."""

    def __call__(self, eps: Tensor, rows: Rows) -> Tensor:
        return self.decode(self.latents(eps, rows))

    def latents(self, eps: Tensor, rows: Rows) -> Tensor:
        if self.first_stage is not None:
            return self.denoised(eps, seeded_rows(self.teacher, self.first_stage, rows["seed"], rows["prompt"]))
        return self.denoised(eps, self.teacher.encode(rows["prompt"]) if "prompt" in rows else rows)

    @checked()
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        images = self.teacher.decode(latents)
        # As an exported pipeline leaves them.
        return images.clamp(-1, 1) if self.clamps else images

    @checked()
    def encode(self, prompts: Sequence[str]) -> Cond:
        return self.teacher.encode(prompts)

    @property
    def prompt_limits(self) -> tuple[PromptLimit, ...]:
        return self.teacher.prompt_limits if self.takes_text else ()


@final
class StudentSampler(NetworkSampler):
    """The one step of a student, y(eps, t) at the target time t and, if it takes one, a guidance scale; or its K steps.

    Args:
        student: The student.
        name: What it is, in words.
        target_time: t; 0 is the finished image. Below `t_min` the step goes to that.
        guidance_scale: w; the middle of the student's range if None.
        distilled: What was distilled into it: the labels that it knows, and its w where that is fixed.
        t_min: The cleanest target time that it was trained at.
        device: Where it is.
        first_stage: The student that draws the pictures that it enlarges, if it does.
        num_inference_steps: K, eq. (28).
        is_map: Whether it is trained between any two times, which more than one step needs.
        prepare: Called before each step: puts its weights into the student, where several samplers share one.

    Raises:
        SettingError: If it was not trained for this time, scale or number of steps.
    """

    clamps = True

    def __init__(
        self,
        student: Student,
        *,
        name: str = "the student",
        target_time: float = 0.0,
        guidance_scale: float | None = None,
        distilled: Distilled = NOTHING_SAID,
        t_min: float = 0.0,
        device: torch.device | str = "cpu",
        first_stage: FirstStage | None = None,
        num_inference_steps: int = 1,
        is_map: bool = True,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(student.teacher, first_stage)
        check_trained(student, target_time, guidance_scale, distilled, t_min)
        check_steps(num_inference_steps, target_time, is_map=is_map)
        self.student, self.name, self.distilled, self.device = student, name, distilled, device
        self.target_time, self.guidance_scale, self.t_min = target_time, guidance_scale, t_min
        self.prepare = prepare
        self.labels = distilled.class_labels or self.labels
        self.num_steps, self.is_map = num_inference_steps, is_map
        self.evaluations = num_inference_steps + (first_stage is not None)
        end = max(target_time, t_min)
        self._step = student_generator(student, t=end, num_steps=num_inference_steps, device=device)

    def denoised(self, eps: Tensor, cond: Cond) -> Tensor:
        self.prepare()
        if self.student.guidance_range is None:
            return self._step(eps, cond)
        w = sum(self.student.guidance_range) / 2 if self.guidance_scale is None else self.guidance_scale
        return self._step(eps, {**cond, "guidance_scale": torch.full((len(eps),), w)})

    @checked()
    def at(
        self,
        *,
        guidance_scale: float | None = None,
        target_time: float | None = None,
        num_inference_steps: int | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> StudentSampler:
        return StudentSampler(
            self.student,
            name=self.name,
            target_time=self.target_time if target_time is None else target_time,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            distilled=self.distilled,
            t_min=self.t_min,
            device=self.device,
            first_stage=self.first_stage,
            num_inference_steps=self.num_steps if num_inference_steps is None else num_inference_steps,
            is_map=self.is_map,
            prepare=self.prepare if prepare is None else prepare,
        )


def check_trained(
    student: Student, target_time: float, guidance_scale: float | None, distilled: Distilled, t_min: float
) -> None:
    """Raise SettingError if a student was not trained for a target time (0 stands for `t_min`, too) or for w."""
    if guidance_scale is not None:
        if student.guidance_range is None:
            why = f"this student was distilled with w{'' if (w := distilled.guidance_scale) is None else f' = {w:g}'} fixed"
            todo = f"distil with {named('guidance_scale_min')} and {named('guidance_scale_max')} for one that takes it"
            raise SettingError("guidance_scale", guidance_scale, why, todo)
        low, high = student.guidance_range
        if not low <= guidance_scale <= high:
            why = f"is outside {low:g} to {high:g}, which the student was trained on"
            raise SettingError("guidance_scale", guidance_scale, why)
    t_max = student.spec.t_max
    if not 0 <= target_time <= t_max:
        why = f"must be between 0 (the finished image) and the start level, {t_max:.4g}"
        raise SettingError("target_time", target_time, why)
    if 0 < target_time < t_min:
        why = f"is below the run's {named('t_min')} {t_min:g}, the cleanest trained"
        raise SettingError("target_time", target_time, why)


@final
class TeacherSampler(NetworkSampler):
    """The multi-step sampler of a teacher on a uniform grid of times.

    Args:
        teacher: The teacher, guided and thresholded as wanted.
        num_steps: Steps.
        solver: One of `onestill.diffusion.trajectory.SOLVERS`.
        device: Where it is.
        first_stage: The student that draws the pictures that it enlarges, if it does.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        num_steps: int = 50,
        solver: SolverName = "ddim",
        device: torch.device | str = "cpu",
        first_stage: FirstStage | None = None,
    ) -> None:
        super().__init__(teacher, first_stage)
        self.num_steps, self.solver, self.device, self.clamps = num_steps, solver, device, teacher.clamps
        self.name = f"the teacher {teacher.spec.source}"
        self.evaluations = self._evaluations() + (first_stage is not None)
        self._solve = teacher_generator(teacher, num_steps=num_steps, solver=solver, device=device)

    def denoised(self, eps: Tensor, cond: Cond) -> Tensor:
        return self._solve(eps, cond)

    def _evaluations(self) -> int:
        """Return the network evaluations of all steps."""
        teacher, spec = self.teacher, self.teacher.spec
        if teacher.guidance_interval is None:
            return self.num_steps * teacher.evaluations * CALLS_PER_STEP[self.solver]
        called = times_called(spec.trajectory, self.solver, uniform_times(spec.t_max, self.num_steps))
        return sum(map(teacher.evaluations_at, called))

    @checked()
    def at(
        self,
        *,
        guidance_scale: float | None = None,
        target_time: float | None = None,
        num_inference_steps: int | None = None,
    ) -> TeacherSampler:
        if target_time is not None:
            raise SettingError("target_time", target_time, "is a student's", "a teacher goes to the finished image")
        if guidance_scale is num_inference_steps is None:
            return self
        interval = self.teacher.guidance_interval
        return TeacherSampler(
            self.teacher if guidance_scale is None else guided(self.teacher, guidance_scale, interval=interval),
            num_steps=self.num_steps if num_inference_steps is None else num_inference_steps,
            solver=self.solver,
            device=self.device,
            first_stage=self.first_stage,
        )
