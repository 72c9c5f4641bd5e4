"""Guidance, classifier-free or as an input of the network, and thresholding as wrappers of any teacher."""

from __future__ import annotations

import operator
from typing import Any, Self

import torch
from torch import Tensor

from onestill.core.arguments import Scale, checked
from onestill.core.errors import NOT_GIVEN, SettingError, named
from onestill.core.tensors import Cond, as_times, broadcast
from onestill.teachers.base import Interval, Teacher
from onestill.teachers.teacher_spec import TeacherSpec, Threshold

RANGE, INTERVAL = (tuple(f"guidance_{what}_{end}" for end in ("min", "max")) for what in ("scale", "interval"))
ROUNDING = 1e-9
"""By how much a level may exceed one that it stands for: those of a grid are rounded."""


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


class Scaled(Wrapped):
    """A teacher at a guidance scale w, which acts at the levels t in (low, high] of an `interval`; everywhere if None.

    A "guidance_scale" in the conditions (one w for each image) takes the place of the fixed one. A teacher that is
    guided already is guided at this scale instead.
    """

    def __init__(
        self, teacher: Teacher, guidance_scale: float = 1.0, *, drawn: bool = False, interval: Interval | None = None
    ) -> None:
        super().__init__(teacher.unguided)
        self.guidance_scale, self.drawn, self.interval = guidance_scale, drawn, interval

    @property
    def guidance_interval(self) -> Interval | None:
        return self.interval

    def inside(self, t: float | Tensor, num: int) -> Tensor:
        """Return in which of `num` rows the scale acts, [num] bool on the CPU."""
        low, high = self.interval or (-1.0, 1.0)
        times = as_times(t, num) - ROUNDING
        return (times > low) & (times <= high)


class Guided(Scaled):
    """u + w (c - u), eq. (14): u is the prediction for the null class, c for the class, w the guidance scale.

    w = 1 is no guidance and costs one evaluation; anything else costs two, in one batch. A row outside the interval is
    c, eq. (32), and costs one. SettingError if guidance is asked of a teacher without a null class.
    """

    def __init__(
        self, teacher: Teacher, guidance_scale: float = 1.0, *, drawn: bool = False, interval: Interval | None = None
    ) -> None:
        if (drawn or guidance_scale != 1) and not teacher.can_guide:
            raise _cannot_guide(teacher.spec, guidance_scale, drawn=drawn)
        super().__init__(teacher, guidance_scale, drawn=drawn, interval=interval)

    @property
    def evaluations(self) -> int:
        return self.teacher.evaluations * (1 if self.guidance_scale == 1 and not self.drawn else 2)

    def evaluations_at(self, t: float) -> int:
        return self.evaluations if bool(self.inside(t, 1)) else self.teacher.evaluations

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        drawn, num, inside = cond.get("guidance_scale"), len(x_t), self.inside(t, len(x_t))
        cond = {name: value for name, value in cond.items() if name != "guidance_scale"}
        if (drawn is None and self.guidance_scale == 1) or not bool(inside.any()):
            return self.teacher.denoised(x_t, t, cond)
        rows = slice(None) if bool(inside.all()) else inside.nonzero()[:, 0]
        null = self.teacher.null_rows(cond)
        times = torch.cat([t, t[rows]]) if isinstance(t, Tensor) and t.ndim else t
        both = {name: torch.cat([value, null[name][rows]]) for name, value in cond.items()}
        found = self.teacher.denoised(torch.cat([x_t, x_t[rows]]), times, both)
        with_class, without = found[:num], found[num:]
        scale = self.guidance_scale if drawn is None else broadcast(drawn[rows], without)
        guided = without + scale * (with_class[rows] - without)
        return guided if isinstance(rows, slice) else with_class.index_copy(0, rows.to(guided.device), guided)


class EmbeddedGuidance(Scaled):
    """A teacher whose network takes the guidance scale as an input, told this one: one evaluation, no null condition.

    Outside the interval it is told 1. Its student keeps being told the pipeline's usual scale, so that an export's call
    needs no argument for it.
    """

    def denoised(self, x_t: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        name = self.teacher.guidance_input
        assert name is not None
        drawn = cond.get("guidance_scale")
        scales = torch.full((len(x_t),), self.guidance_scale) if drawn is None else drawn
        if self.interval is not None:
            scales = torch.where(self.inside(t, len(x_t)).to(scales.device), scales, 1.0)
        told = self.teacher.guidance_rows(scales).to(cond[name])
        return self.teacher.denoised(x_t, t, {**{n: v for n, v in cond.items() if n != "guidance_scale"}, name: told})


def _check_interval(interval: Interval, teacher: Teacher) -> None:
    """Raise SettingError if guidance acts nowhere in an interval of levels."""
    (low, high), spec = interval, teacher.spec
    if not low < high:
        raise SettingError(INTERVAL[0], low, f"must be below {named(INTERVAL[1])}, {high:g}")
    if low >= spec.t_max:
        raise SettingError(INTERVAL[0], low, f"must be below the teacher's start level t_max = {spec.t_max:.4g}")
    if high < spec.process.t_min:
        why = f"is below {spec.process.t_min:g}, the cleanest level that the teacher knows"
        raise SettingError(INTERVAL[1], high, why)


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
    teacher: Teacher,
    guidance_scale: Scale = 1.0,
    *,
    drawn: bool = False,
    threshold: Threshold | None = None,
    interval: tuple[float, float] | None = None,
) -> Teacher:
    """Return a teacher guided, then thresholded: as its own sampler does if `threshold` is None.

    Of a teacher that is guided already, the teacher inside is guided anew. Guidance acts at the levels t in (low, high]
    of the `interval`, eq. (32), and at all levels if that is None.
    """
    if interval is not None:
        _check_interval(interval, teacher)
    kind = Guided if teacher.guidance_input is None else EmbeddedGuidance
    found = kind(teacher, guidance_scale, drawn=drawn, interval=interval)
    threshold = teacher.spec.threshold if threshold is None else threshold
    return found if threshold.mode == "none" else Thresholded(found, threshold)
