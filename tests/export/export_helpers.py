"""What tests of formats share."""

from __future__ import annotations

from typing import Any

import torch

from onestill.students.student import Student
from onestill.teachers.base import Teacher


@torch.no_grad()
def trained(teacher: Teacher, *, seed: int = 1, **options: Any) -> Student:
    """Return a student whose every weight has moved, those that start at zero too."""
    student, generator = Student(teacher, **options), torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student
