"""What a format of exported students is: it writes one student, and tells how far the written folder is off."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from onestill.core.tensors import SELF_CHECK_TOLERANCE, Cond, noise
from onestill.data.conditions import LabelConditions
from onestill.export.settings import Options
from onestill.sampling.generate import student_generator
from onestill.students.model_card import Facts
from onestill.students.one_step import OneStep
from onestill.students.student import Student


class Format(ABC):
    """One way of writing a student as a folder; an instance writes one, at a target time and guidance scale, for K steps.

    `export_student` makes the student's `OneStep` and compares it with the student, has it written, lets go of it, and
    has the folder checked, before it gets its name; all of it without gradients and autocast. A format may keep between
    `write` and `check` what it needs, but no network: a run is at its end here, and its memory as full as it ever was.
    """

    library = "onestill"
    """What loads such a folder, by the name that the hub knows it by."""
    extra: ClassVar[str] = ""
    """The extra of this package that brings what writes and checks it."""
    modules: ClassVar[tuple[str, ...]] = ()
    """What of that extra is imported."""
    options: Options = Options()
    """What is asked of it besides; given before it writes."""
    prompt: str = Facts().prompt
    """One to show; likewise."""
    language: ClassVar[str] = "python"
    """What the code on its card is written in."""

    @property
    def tolerance(self) -> float:
        """The largest difference from the student that it may have."""
        return SELF_CHECK_TOLERANCE

    def __init__(
        self, student: Student, t: float = 0.0, guidance_scale: float | None = None, num_steps: int = 1
    ) -> None:
        self.student, self.t, self.guidance_scale, self.num_steps = student, t, guidance_scale, num_steps
        # The student's own: two devices differ by more than an export may (TF32 convolutions, for one).
        self.device = next(student.parameters()).device

    @classmethod
    def why_not(cls, student: Student, num_steps: int) -> str | None:
        """Return why a student cannot be written like this, or None if it can; known before any work."""
        return None

    @classmethod
    def check_options(cls, options: Options) -> None:
        """Raise SettingError if what it is told besides cannot be used; known before a student is loaded."""
        return None

    @abstractmethod
    def write(self, step: OneStep, folder: Path) -> None:
        """Write a student, its one step on the CPU, into an empty folder, all but its card and its mark.

        The one step may be changed: nobody uses it afterwards. Of a student of several steps it is `FewSteps`.
        """

    @abstractmethod
    def check(self, folder: Path) -> float:
        """Return the largest difference between what the folder draws, loaded afresh, and what is `expected`."""

    @abstractmethod
    def code(self, facts: Facts) -> str:
        """Return Python that draws with the folder, for its card."""

    def facts(self, folder: Path, facts: Facts) -> Facts:
        """Return what the card says, with what the written folder adds to it."""
        return facts

    def expected(self, eps: Tensor, cond: Cond) -> Tensor:
        """Return the student's own samples of some noise, on its device."""
        cond = self.student.with_scale(cond, self.guidance_scale, len(eps))
        return student_generator(self.student, t=self.t, num_steps=self.num_steps, device=self.device)(eps, cond)

    def example(self, num: int) -> tuple[Tensor, Cond]:
        """Return (the noise of the seeds 0, 1, ..., some conditions, all labels in turn)."""
        spec, cond = self.student.spec, self.student.teacher.example_rows(num)
        if spec.num_classes:
            cond = LabelConditions(tuple(spec.labels)).grid(num)
        return noise(range(num), spec.sample_shape), cond
