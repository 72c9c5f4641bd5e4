"""That a folder is a student of one step, or few, is said in it: `onestill.json`, written at export, beside stock files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from onestill.core.errors import SettingError, named
from onestill.core.files import MARK_FILE
from onestill.core.reading import OwnFile, read_object
from onestill.core.writing import write_text
from onestill.students.bake import ignores_time
from onestill.students.settings import FEW_STEPS
from onestill.teachers.base import Teacher


class Head(OwnFile):
    """The numbers of one step of several, eq. (29)."""

    a: float
    b: float
    c: float
    net_time: float
    n: float
    m: float


class Mark(OwnFile):
    """What the folder of a student says of it: its format, as "pixel", what is baked in, and a, b, c, tau of eq. (19).

    The guidance scale is None if the student takes none. Of a student of several steps `heads` are the numbers of each,
    eq. (29), `head` those of the first.
    """

    kind: Literal["one-step student"] = "one-step student"
    format: Annotated[str, Field(max_length=100)]
    sample_shape: Annotated[tuple[Annotated[int, Field(ge=1, lt=2**31)], ...], Field(min_length=1, max_length=8)]
    head: Annotated[dict[Annotated[str, Field(pattern="^(a|b|c|net_time)$")], float], Field(min_length=4)]
    num_inference_steps: Annotated[int, Field(ge=1, le=FEW_STEPS)] = 1
    heads: Annotated[tuple[Head, ...], Field(max_length=FEW_STEPS)] = ()
    target_time: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance_scale: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _has_a_head_for_each_step(self) -> Self:
        if len(self.heads) != (self.num_inference_steps if self.num_inference_steps > 1 else 0):
            raise ValueError(f"{self.num_inference_steps} steps and {len(self.heads)} heads")
        return self

    def write(self, folder: Path) -> None:
        """Write the mark into a folder."""
        of_one = {"num_inference_steps", "heads"} if self.num_inference_steps == 1 else set()
        write_text(folder / MARK_FILE, json.dumps(self.model_dump(mode="json", exclude=of_one), indent=1))


def num_steps_of(folder: Path) -> int:
    """Return the number of steps that the student in a folder was exported for."""
    mark = read_mark(folder)
    return 1 if mark is None else mark.num_inference_steps


def read_mark(folder: Path | None) -> Mark | None:
    """Return what a folder says of the student in it; None if it says nothing, ValueError if it says something else."""
    if folder is None or not (path := folder / MARK_FILE).is_file():
        return None
    mark = read_object(path, Mark)
    if "kind" not in mark.model_fields_set:
        raise ValueError(f"{path} does not say what it should: it has no kind")
    return mark


def is_student(folder: Path | None, network: object = None) -> bool:
    """Return whether a folder holds a one-step student: it says so, or, of others, its network ignores the time."""
    return read_mark(folder) is not None or ignores_time(network)


def refuse_student(teacher: Teacher) -> None:
    """Raise SettingError if a teacher is an exported student, which knows one step and no other."""
    if is_student(teacher.folder, teacher.network):
        why = "is a one-step student: its network has no use for the time that it is given"
        todo = f"name the teacher of many steps that it was distilled from; {named('student')} draws with what is there"
        raise SettingError("teacher", teacher.spec.source, why, todo)
