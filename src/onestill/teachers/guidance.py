"""Guidance, classifier-free or as an input of the network, and thresholding as wrappers of any teacher."""

from __future__ import annotations

import operator
from typing import Any, Self

import torch
from torch import Tensor

from onestill.core.arguments import Scale, checked
from onestill.core.errors import NOT_GIVEN, SettingError, named
from onestill.core.tensors import Cond, broadcast
from onestill.teachers.base import Teacher
from onestill.teachers.teacher_spec import TeacherSpec, Threshold

RANGE = ("guidance_scale_min", "guidance_scale_max")


class Wrapped(Teacher):
    """A teacher that predicts another x_0 and is in everything else the one inside it.

    Whatever a teacher says of itself, its network, its prompts and its students, the inner one says. Only what
    follows from `denoised` is its own, and `with_...` puts the same wrapper around what the inner one returns.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def to(self, device: torch.device | str) -> Self:
        self.teacher.to(device)
        return self

    def with_t_max(self, t_max: float) -> Self:
        return self._changed(teacher=self.teacher.with_t_max(t_max))

    def with_negative_prompt(self, prompt: str | None, *, acts: bool = True) -> Self:
        return self._changed(teacher=self.teacher.with_negative_prompt(prompt, acts=acts))

    def with_image_condition(self, level: int, pictures: Tensor | None = None) -> Self:
        return self._changed(teacher=self.teacher.with_image_condition(level, pictures))

    def __getattr__(self, name: str) -> Any:
        # What is no part of the contract, such as `pipeline`. A copy that is being made has no teacher yet.
        if name == "teacher" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.teacher, name)


def _forward_contract() -> None:
    """Let `Wrapped` answer by its inner teacher where `Teacher` has a default that would be found first."""
    own = {"denoised", "denoiser", "one_step", *vars(Wrapped)}
    for name in {*Teacher.__annotations__, *dir(Teacher)} - own:
        if not name.startswith("_"):
            setattr(Wrapped, name, property(operator.attrgetter(f"teacher.{name}")))


_forward_contract()


class Guided(Wrapped):
    """u + w (c - u), eq. (14): u is the prediction for the null class, c for the class, w the guidance scale.

    w = 1 is no guidance and costs one evaluation; anything else costs two, in one batch. A "guidance_scale"
    in the conditions (one w for each image) takes the place of the fixed one. A teacher that is guided already is
    guided at this scale instead. SettingError if guidance is asked of a teacher without a null class.
    """

    def __init__(self, teacher: Teacher, guidance_scale: float = 1.0, *, drawn: bool = False) -> None:
        if (drawn or guidance_scale != 1) and not teacher.can_guide:
            raise _cannot_guide(teacher.spec, guidance_scale, drawn=drawn)
        super().__init__(teacher.unguided)
        self.guidance_scale, self.drawn = guidance_scale, drawn

    @property
    def evaluations(self) -> int:
        return self.teacher.evaluations * (1 if self.guidance_scale == 1 and not self.drawn else 2)

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        drawn = cond.get("guidance_scale")
        cond = {name: value for name, value in cond.items() if name != "guidance_scale"}
        if drawn is None and self.guidance_scale == 1:
            return self.teacher.denoised(x_t, t, cond)
        null = self.teacher.null_rows(cond)
        times = t.repeat(2) if isinstance(t, Tensor) and t.ndim else t
        rows = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
        with_class, without = self.teacher.denoised(torch.cat([x_t, x_t]), times, rows).chunk(2)
        scale = self.guidance_scale if drawn is None else broadcast(drawn, without)
        return without + scale * (with_class - without)


class EmbeddedGuidance(Wrapped):
    """A teacher whose network takes the guidance scale as an input, told this one: one evaluation, no null condition.

    Its student keeps being told the pipeline's usual scale, so that an export's call needs no argument for it. A
    "guidance_scale" in the conditions (one for each image) takes the place of the fixed one.
    """

    def __init__(self, teacher: Teacher, guidance_scale: float, *, drawn: bool = False) -> None:
        super().__init__(teacher.unguided)
        self.guidance_scale, self.drawn = guidance_scale, drawn

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        name = self.teacher.guidance_input
        assert name is not None
        drawn = cond.get("guidance_scale")
        scales = torch.full((len(x_t),), self.guidance_scale) if drawn is None else drawn
        told = self.teacher.guidance_rows(scales).to(cond[name])
        return self.teacher.denoised(x_t, t, {**{n: v for n, v in cond.items() if n != "guidance_scale"}, name: told})


def _cannot_guide(spec: TeacherSpec, guidance_scale: float, *, drawn: bool) -> SettingError:
    """Return the error of a teacher without a null condition that is to be guided, at one scale or at drawn ones."""
    needs, todo = ("need", "leave them out") if drawn else ("needs", "leave it at 1")
    if spec.text:
        why = f"{needs} a null condition, and a {spec.family} pipeline has none: guidance is in its weights already"
    else:
        lacks = "no classes" if spec.num_classes is None else "none that is known"
        why = f"{needs} a teacher with a null class, and this one has {lacks}"
        todo = f"name it with {named('null_class')} if one of the labels means 'no class', {todo} otherwise"
    return (
        SettingError(RANGE, NOT_GIVEN, why, todo)
        if drawn
        else SettingError("guidance_scale", guidance_scale, why, todo)
    )


class Thresholded(Wrapped):
    """The teacher's prediction, guided already if it is to be, after its sampler's thresholding, eq. (15)."""

    def __init__(self, teacher: Teacher, threshold: Threshold) -> None:
        super().__init__(teacher)
        self.threshold = threshold

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        return self.threshold(self.teacher.denoised(x_t, t, cond))


@checked()
def guided(
    teacher: Teacher, guidance_scale: Scale = 1.0, *, drawn: bool = False, threshold: Threshold | None = None
) -> Teacher:
    """Return a teacher guided, then thresholded: as its own sampler does if `threshold` is None.

    Of a teacher that is guided already, the teacher inside is guided anew.
    """
    kind = Guided if teacher.guidance_input is None else EmbeddedGuidance
    found = kind(teacher, guidance_scale, drawn=drawn)
    threshold = teacher.spec.threshold if threshold is None else threshold
    return found if threshold.mode == "none" else Thresholded(found, threshold)
