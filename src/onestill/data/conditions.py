"""Where conditions come from: labels, drawn or listed, and prompts that are encoded already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from onestill.core.errors import SettingError
from onestill.core.tensors import Cond
from onestill.data.prompts import Ints
from onestill.teachers.teacher_spec import TeacherSpec

VALIDATION_SEED = 1_000_000
"""Seed of the first picture that a run shows of itself."""


class Conditions(Protocol):
    """The conditions a run draws, and those it shows."""

    @property
    def captions(self) -> tuple[str, ...]:
        """What the conditions of `grid` are, in words; empty if that need not be said."""

    def choose(self, num: int, generator: torch.Generator) -> Cond:
        """Return `num` random choices in short, such as keys of prompts; every draw is from `generator`."""

    def rows(self, chosen: Cond) -> Cond:
        """Return the conditions that choices stand for, a row each: what the networks are given."""

    def grid(self, num: int) -> Cond:
        """Return `num` fixed conditions; the guidance scale is the middle of its range."""


@dataclass(frozen=True)
class LabelConditions:
    """The labels a teacher can be asked for, none of an unconditional one, drawn uniformly.

    The guidance scale is drawn from `guidance_range` for each image; None if it is fixed.
    """

    labels: tuple[int, ...] = ()
    guidance_range: tuple[float, float] | None = None
    captions: ClassVar[tuple[str, ...]] = ()
    """Nothing: the labels are seen."""

    def choose(self, num: int, generator: torch.Generator) -> Cond:
        """Return `num` random conditions; every draw is from `generator`."""
        cond: Cond = {}
        if self.labels:
            rows = torch.randint(len(self.labels), (num,), generator=generator)
            cond["class_labels"] = torch.tensor(self.labels)[rows]
        return cond | draw_guidance(self.guidance_range, num, generator)

    def rows(self, chosen: Cond) -> Cond:
        """Return the choices: labels stand for themselves."""
        return chosen

    def grid(self, num: int) -> Cond:
        """Return `num` fixed conditions that go round the labels; the guidance scale is the range's middle."""
        cond: Cond = {}
        if self.labels:
            cond["class_labels"] = torch.tensor([self.labels[i % len(self.labels)] for i in range(num)])
        return cond | middle_guidance(self.guidance_range, num)


@dataclass(frozen=True)
class PromptConditions:
    """Encoded prompts, drawn uniformly, some of them in favour of the empty prompt.

    Attributes:
        encoded: From keys of prompts to their conditions, such as `PromptCache.rows`.
        keys: Keys of the prompts to draw from, [N].
        shown: Keys of the prompts of `grid`.
        captions: Those prompts.
        empty_cond: The conditions of the empty prompt, one row.
        empty_fraction: Share of the draws with `empty_cond`.
        guidance_range: Range of the guidance scale given to the student with each image; None if it is fixed.
    """

    encoded: Callable[[Ints], Cond]
    keys: Ints
    shown: Ints
    captions: tuple[str, ...] = ()
    empty_cond: Cond = field(default_factory=dict)
    empty_fraction: float = 0.0
    guidance_range: tuple[float, float] | None = None

    def choose(self, num: int, generator: torch.Generator) -> Cond:
        """Return keys of `num` random prompts, and which rows are to be empty; every draw is from `generator`."""
        places = torch.randint(len(self.keys), (num,), generator=generator).numpy()
        chosen: Cond = {"prompt": torch.from_numpy(self.keys[places])}
        if self.empty_fraction > 0:
            chosen["empty"] = torch.rand(num, generator=generator) < self.empty_fraction
        return chosen | draw_guidance(self.guidance_range, num, generator)

    def rows(self, chosen: Cond) -> Cond:
        """Return the encoded prompts of the chosen keys."""
        cond = self.encoded(chosen["prompt"].numpy())
        if "empty" in chosen:
            for name, value in self.empty_cond.items():
                cond[name][chosen["empty"]] = value.to(cond[name])
        return cond | {name: value for name, value in chosen.items() if name == "guidance_scale"}

    def grid(self, num: int) -> Cond:
        """Return `num` fixed conditions that go round the shown prompts; the guidance scale is the range's middle."""
        cond = self.encoded(self.shown[[i % len(self.shown) for i in range(num)]])
        return cond | middle_guidance(self.guidance_range, num)


def draw_guidance(limits: tuple[float, float] | None, num: int, generator: torch.Generator) -> Cond:
    """Return a random guidance scale for each image, or {} if it is fixed."""
    if limits is None:
        return {}
    low, high = limits
    return {"guidance_scale": low + (high - low) * torch.rand(num, generator=generator)}


def middle_guidance(limits: tuple[float, float] | None, num: int) -> Cond:
    """Return the middle of the guidance range for each image, or {} if it is fixed."""
    return {} if limits is None else {"guidance_scale": torch.full((num,), sum(limits) / 2)}


def check_labels(labels: Sequence[int], spec: TeacherSpec) -> tuple[int, ...]:
    """Return the labels as given, all the teacher's if none are; SettingError if one is not one of its classes."""
    if not labels:
        return tuple(spec.labels)
    if spec.num_classes is None:
        takes = "takes prompts, not labels" if spec.text else "is unconditional"
        raise SettingError("class_labels", list(labels), f"the teacher {takes}", "leave it out")
    if spec.null_class in labels:
        why = "is the null class, which means 'no class' and draws nothing"
        raise SettingError("class_labels", spec.null_class, why)
    if unknown := sorted(set(labels) - set(spec.labels)):
        raise SettingError("class_labels", unknown, f"the teacher's classes are {spec.labels[0]} to {spec.labels[-1]}")
    return tuple(labels)
