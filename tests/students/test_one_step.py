"""Eq. (19) as a module: it is the student, `torch.export` traces it, and a folder says that it holds one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from onestill.core.files import MARK_FILE
from onestill.core.tensors import Cond, noise
from onestill.export.export import ExportError, export_student, is_exported
from onestill.sampling.generate import student_generator
from onestill.students.mark import Mark, is_student, read_mark, refuse_student
from onestill.students.one_step import OneStep, one_step_of
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import guided
from onestill.teachers.load import load_teacher

Labels = Callable[[Teacher, int], Cond]


@torch.no_grad()
def trained(teacher: Teacher, size: float = 0.02, **options: Any) -> Student:
    """Return a student whose every weight has moved, those that start at zero too."""
    student, generator = Student(teacher, **options), torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return student


@torch.no_grad()
def error(step: Callable[..., Tensor], student: Student, cond: Cond, t: float = 0.0, w: float | None = None) -> float:
    """Return how far a step's samples are from the student's, relative to the largest of them."""
    num = max((len(value) for value in cond.values()), default=3)
    eps = noise(range(num), student.spec.sample_shape)
    expected = student_generator(student, t=t)(eps, student.with_scale(cond, w, num))
    return float((step(eps, cond) - expected).abs().max() / expected.abs().max().clamp(min=1))


# The student


@pytest.mark.parametrize("t", [0.0, 0.4])
def test_one_step_is_the_student(teacher: Teacher, labels_for: Labels, t: float) -> None:
    student, cond = trained(teacher), labels_for(teacher, 3)
    assert error(one_step_of(student, t), student, cond, t) <= 1e-6


def test_one_step_holds_the_guidance_scale(cases: dict[str, Any], labels_for: Labels) -> None:
    teacher = cases["class-null-last"].build()
    student, cond = trained(teacher, guidance_range=(1.0, 4.0)), labels_for(teacher, 3)
    assert error(one_step_of(student, 0.0, 3.5), student, cond, w=3.5) <= 1e-6
    assert error(one_step_of(student, 0.0, 3.5), student, cond, w=1.0) > 1e-4


def test_one_step_of_a_guided_teachers_student(cases: dict[str, Any], labels_for: Labels) -> None:
    teacher = guided(cases["class-null-last"].build(), 2.0)
    student, cond = trained(teacher), labels_for(teacher, 3)
    assert error(one_step_of(student), student, cond) <= 1e-6


def test_the_numbers_are_those_of_the_formula(cases: dict[str, Any]) -> None:
    # EDM: a = c_skip k, b = c_out, c = c_in k with k = sqrt(1 + sigma^2), eqs. (3), (4).
    step = one_step_of(Student(cases["edm-euler"].build()))
    k, sum_of_squares = (1 + 80.0**2) ** 0.5, 80.0**2 + 0.25
    expected = {"a": 0.25 / sum_of_squares * k, "b": 80 * 0.5 / sum_of_squares**0.5, "c": k / sum_of_squares**0.5}
    assert {name: step.head[name] for name in expected} == pytest.approx(expected, rel=1e-6)


# torch.export


@pytest.mark.parametrize("name", ["digits", "glyphs", "module-cosine-v"])
def test_torch_export_traces_it(name: str, cases: dict[str, Any]) -> None:
    teacher = cases[name].build() if name in cases else load_teacher(name)
    step = one_step_of(trained(teacher)).eval()
    eps, cond = noise(range(2), teacher.spec.sample_shape), teacher.example_rows(2)
    program = torch.export.export(step, (eps, cond))
    assert not any(hasattr(module, "extra") for module in step.modules()), "nothing of the student is in it"
    with torch.no_grad():
        torch.testing.assert_close(program.module()(eps, cond), step(eps, cond), rtol=0, atol=1e-6)


# Exports write it


def test_a_step_that_is_not_the_student_is_not_written(
    cases: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = OneStep.forward
    monkeypatch.setattr(OneStep, "forward", lambda step, eps, cond: 1.001 * honest(step, eps, cond))
    for name in ("ddim-v", "module-cosine-v"):
        with pytest.raises(ExportError, match="self-check failed: its one step's samples differ from the student's"):
            export_student(trained(cases[name].build(), 0.1), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_format_of_ones_own(cases: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onestill.export import export
    from onestill.export.base import Format
    from onestill.students.model_card import Facts

    class Plain(Format):
        """The weights by torch, for a test."""

        library = "torch"

        def write(self, step: OneStep, folder: Path) -> None:
            torch.save(step.network.state_dict(), folder / "weights.pt")
            (folder / "head.json").write_text(json.dumps(step.head))

        def check(self, folder: Path) -> float:
            step = one_step_of(Student(self.student.teacher))
            step.network.load_state_dict(torch.load(folder / "weights.pt"))
            eps, cond = self.example(2)
            return float((step(eps, cond) - self.expected(eps, cond)).abs().max())

        def code(self, facts: Facts) -> str:
            return "weights.pt and head.json"

    monkeypatch.setitem(export.FORMATS, "plain", Plain)
    assert export_student(trained(cases["ddim-v"].build()), tmp_path / "out", format="plain") <= 1e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"weights.pt", "head.json", "README.md", MARK_FILE}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: torch\n" in card and "```python\nweights.pt and head.json\n```" in card


# The mark


def test_a_folder_says_what_it_is(cases: dict[str, Any], tmp_path: Path) -> None:
    student = trained(cases["class-null-last"].build(), guidance_range=(1.0, 4.0))
    export_student(student, tmp_path / "out", t=0.25)
    mark = read_mark(tmp_path / "out")
    head = one_step_of(student).head
    assert mark == Mark(format="pixel", sample_shape=(1, 8, 8), head=head, target_time=0.25, guidance_scale=2.5)
    assert is_exported(tmp_path / "out") and is_student(tmp_path / "out")


def test_stock_loaders_pass_over_the_mark(cases: dict[str, Any], tmp_path: Path, capfd: Any) -> None:
    export_student(trained(cases["ddim-v"].build()), tmp_path / "out")
    logging.set_verbosity_info()
    try:
        DiffusionPipeline.from_pretrained(tmp_path / "out")
    finally:
        logging.set_verbosity_error()
    assert "onestill" not in capfd.readouterr().err.replace(str(tmp_path), "")


def test_a_student_is_no_teacher_with_or_without_its_mark(cases: dict[str, Any], tmp_path: Path) -> None:
    export_student(trained(cases["ddim-v-zero-snr"].build()), tmp_path / "out")
    with torch.no_grad():
        fine_tuned: Any = load_teacher(tmp_path / "out")
        fine_tuned.network.time_embedding.linear_2.weight.add_(1)  # by somebody: its folder says so still
    for written in (True, False):
        with pytest.raises(ValueError, match="teacher=.*is a one-step student.*student draws with what is there"):
            refuse_student(fine_tuned if written else load_teacher(tmp_path / "out"))
        (tmp_path / "out" / MARK_FILE).unlink(missing_ok=True)
    refuse_student(fine_tuned)  # neither sign is left
    assert not is_exported(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "one-step student"}', '{"kind": "another"}'])
def test_a_mark_that_somebody_broke(tmp_path: Path, text: str) -> None:
    (tmp_path / MARK_FILE).write_text(text)
    with pytest.raises(
        ValueError, match=r"onestill.json (does not say what it should|is no JSON|must hold a JSON object)"
    ):
        read_mark(tmp_path)
    assert not is_exported(tmp_path)


def test_no_mark_is_no_student(tmp_path: Path) -> None:
    assert read_mark(None) is None and read_mark(tmp_path) is None
    assert not is_student(tmp_path, nn.Linear(1, 1)) and not is_student(None)
