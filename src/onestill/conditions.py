"""Where conditions come from: labels, drawn or listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onestill.teachers.base import TeacherSpec
from onestill.tensors import Cond


@dataclass(frozen=True)
class Conditions:
    """The conditions a teacher can be asked for, drawn uniformly.

    Attributes:
        labels: Labels to draw from; empty for an unconditional teacher.
        guidance_range: Range of the guidance scale given to the student with each image; None if it is fixed.
    """

    labels: tuple[int, ...] = ()
    guidance_range: tuple[float, float] | None = None

    def draw(self, num: int, generator: torch.Generator) -> Cond:
        """Return `num` random conditions; every draw is from `generator`."""
        cond: Cond = {}
        if self.labels:
            rows = torch.randint(len(self.labels), (num,), generator=generator)
            cond["class_labels"] = torch.tensor(self.labels)[rows]
        if self.guidance_range is not None:
            low, high = self.guidance_range
            cond["guidance_scale"] = low + (high - low) * torch.rand(num, generator=generator)
        return cond

    def grid(self, num: int) -> Cond:
        """Return `num` fixed conditions that go round the labels; the guidance scale is the range's middle."""
        cond: Cond = {}
        if self.labels:
            cond["class_labels"] = torch.tensor([self.labels[i % len(self.labels)] for i in range(num)])
        if self.guidance_range is not None:
            cond["guidance_scale"] = torch.full((num,), sum(self.guidance_range) / 2)
        return cond


def check_labels(labels: Sequence[int], spec: TeacherSpec) -> tuple[int, ...]:
    """Return the labels as given, or all the teacher's if none are given.

    Raises:
        ValueError: If the teacher is unconditional, or a label is not one of its classes.
    """
    if not labels:
        return tuple(spec.labels)
    if spec.num_classes is None:
        raise ValueError(f"--class_labels {list(labels)} was given, but the teacher is unconditional")
    if spec.null_class in labels:
        raise ValueError(
            f"--class_labels {spec.null_class} is the null class, which means 'no class' and draws nothing"
        )
    unknown = sorted(set(labels) - set(spec.labels))
    if unknown:
        raise ValueError(f"--class_labels {unknown}: the teacher's classes are {spec.labels[0]} to {spec.labels[-1]}")
    return tuple(labels)
