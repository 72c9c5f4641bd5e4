"""Every family of pipelines on tiny random weights: how far ours is from the pipeline's own call, and exports from the student.

python benchmarks/families.py
The pipelines are those of tests/families; nothing is downloaded.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import diffusers
import torch
import transformers

from onestill.core.errors import SettingError
from onestill.export.export import export_student
from onestill.students.student import Student
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines.build import self_check
from onestill.teachers.pipelines.teacher import PipelineTeacher

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "families"))


def perturbed(teacher: PipelineTeacher, seed: int = 5) -> Student:
    """Return a student some way into a training, with a target time that matters."""
    torch.manual_seed(seed)
    student = Student(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return student


def error_of(student: Student, folder: Path, name: str) -> str:
    """Return how far an export in a format is from the student, or that it is refused before any work."""
    try:
        return f"{export_student(student, folder, format=name):.1e}"
    except SettingError:
        return "refused"


def main() -> None:
    from pipelines import ARGUMENTS, BUILDERS, build

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    head = "| pipeline | family | 4 guided steps against its own call | export against the student | `--format torch` |"
    print(f"{head}\n|---|---|---|---|---|")
    for name in sorted(BUILDERS):
        with tempfile.TemporaryDirectory() as folder:
            build(name).save_pretrained(Path(folder) / "teacher")
            teacher = load_teacher(Path(folder) / "teacher", arguments=ARGUMENTS.get(name))
            assert isinstance(teacher, PipelineTeacher)
            parity = self_check(teacher, teacher.pipeline_spec.schedule(teacher.pipeline).stock, num_steps=4)
            student = perturbed(teacher)
            exported, program = (error_of(student, Path(folder) / each, each) for each in ("diffusers", "torch"))
        print(f"| {name} | {teacher.pipeline_spec.name} | {parity:.1e} | {exported} | {program} |", flush=True)


if __name__ == "__main__":
    main()
