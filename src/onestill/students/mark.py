"""That a folder is a one-step student is said in it: `onestill.json`, written at export, beside stock files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onestill.core.errors import SettingError, named
from onestill.core.files import MARK_FILE
from onestill.core.writing import write_text
from onestill.students.bake import ignores_time
from onestill.teachers.base import Teacher

KIND = "one-step student"


@dataclass(frozen=True)
class Mark:
    """What the folder of a student says of it: its format, as "pixel", what is baked in, and a, b, c, tau of eq. (19).

    The guidance scale is None if the student takes none.
    """

    format: str
    sample_shape: tuple[int, ...]
    head: Mapping[str, float]
    target_time: float = 0.0
    guidance_scale: float | None = None

    def write(self, folder: Path) -> None:
        """Write the mark into a folder."""
        write_text(folder / MARK_FILE, json.dumps({"kind": KIND, **asdict(self)}, indent=1))


def read_mark(folder: Path | None) -> Mark | None:
    """Return what a folder says of the student in it; None if it says nothing, ValueError if it says something else."""
    if folder is None or not (path := folder / MARK_FILE).is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("kind") != KIND:
            raise ValueError(f"it is of no {KIND}")
        return Mark(**{**found, "sample_shape": tuple(found["sample_shape"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} does not say what a student's should: {error}") from error


def is_student(folder: Path | None, network: object = None) -> bool:
    """Return whether a folder holds a one-step student: it says so, or, of others, its network ignores the time."""
    return read_mark(folder) is not None or ignores_time(network)


def refuse_student(teacher: Teacher) -> None:
    """Raise SettingError if a teacher is an exported student, which knows one step and no other."""
    if is_student(teacher.folder, teacher.network):
        why = "is a one-step student: its network has no use for the time that it is given"
        todo = f"name the teacher of many steps that it was distilled from; {named('student')} draws with what is there"
        raise SettingError("teacher", teacher.spec.source, why, todo)
