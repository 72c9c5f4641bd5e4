"""Guidance and thresholding around a teacher change what it predicts and nothing that it says of itself."""

from __future__ import annotations

import functools

import pytest
import torch
from runs_helpers import FAST

import onestill
from onestill.core.errors import SettingError
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import EmbeddedGuidance, Guided, Thresholded, Wrapped, guided
from onestill.teachers.load import load_teacher
from onestill.teachers.teacher_spec import Threshold

OWN = {"denoised", "denoiser", "one_step", "evaluations", "evaluations_at", "guidance_interval", "to", "teacher"}
"""What a wrapper does itself."""
CHANGES = {"with_t_max", "with_negative_prompt", "with_image_condition"}


@functools.cache
def embedded(name: str) -> Teacher:
    return load_teacher(name)


def contract() -> list[str]:
    names = {*Teacher.__annotations__, *dir(Teacher)}
    return sorted(name for name in names - OWN - CHANGES if not name.startswith("_"))


@pytest.mark.parametrize("name", contract())
@pytest.mark.parametrize("source", ["digits", "glyphs"])
def test_a_wrapper_says_what_the_teacher_inside_says(source: str, name: str) -> None:
    inside = embedded(source)
    for outside in (Guided(inside, 3.0), Thresholded(Guided(inside, 3.0), Threshold("static"))):
        theirs, ours = getattr(inside, name), getattr(outside, name)
        if callable(theirs) and hasattr(theirs, "__self__"):
            assert ours.__func__ is theirs.__func__ and ours.__self__ is inside
        else:
            assert ours is theirs or ours == theirs


def test_every_kind_forwards_the_contract() -> None:
    assert {"can_guide", "example_rows", "folder", "fingerprint", "denoised_by", "network", "encode"} <= set(contract())
    for kind in (Guided, EmbeddedGuidance, Thresholded):
        for cls in kind.__mro__[: kind.__mro__.index(Wrapped)]:
            assert not set(vars(cls)) & set(contract())


def test_a_guided_teacher_is_still_one() -> None:
    inside = embedded("glyphs")
    outside = guided(inside, 3.0)
    assert outside.can_guide and outside.folder == inside.folder and outside.fingerprint() == inside.fingerprint()
    assert outside.example_rows(1).keys() == inside.example_rows(1).keys() != set()
    assert outside.pipeline is inside.pipeline, "what only some teachers have is there too"
    assert outside.unguided is inside


def test_guiding_twice_is_guiding_at_the_last_scale() -> None:
    inside = embedded("glyphs")
    x, cond = torch.randn(2, *inside.spec.sample_shape), inside.example_rows(2)
    once = guided(inside, 2.0).denoised(x, 0.5, cond)
    for twice in (guided(guided(inside, 3.0), 2.0), Guided(Guided(inside, 3.0), 2.0)):
        assert twice.evaluations == 2 and torch.equal(twice.denoised(x, 0.5, cond), once)
    assert torch.equal(guided(guided(inside, 3.0)).denoised(x, 0.5, cond), inside.denoised(x, 0.5, cond))


def test_with_returns_another_teacher() -> None:
    inside = embedded("glyphs")
    null = {name: value.clone() for name, value in inside.null_cond.items()}
    for teacher in (inside, guided(inside, 3.0)):
        later, other = teacher.with_t_max(0.5), teacher.with_negative_prompt("red")
        assert (later.spec.t_max, teacher.spec.t_max) == (0.5, inside.spec.t_max) and inside.spec.t_max != 0.5
        assert type(later) is type(other) is type(teacher) and later.network is other.network is inside.network
        assert any(not torch.equal(other.null_cond[name], value) for name, value in null.items())
        assert all(torch.equal(inside.null_cond[name], value) for name, value in null.items())
        assert teacher.with_negative_prompt(None) is teacher or isinstance(teacher, Wrapped)


def test_what_a_teacher_lacks_is_refused_by_the_settings_name() -> None:
    digits = embedded("digits")
    with pytest.raises(SettingError, match="negative_prompt='red': this teacher takes no text"):
        digits.with_negative_prompt("red")
    with pytest.raises(ValueError, match="takes no picture of an earlier model"):
        digits.with_image_condition(250)
    with pytest.raises(ValueError, match="takes no text"):
        digits.encode(["red"])
    with pytest.raises(SettingError, match="acts through guidance only; give a guidance_scale other than 1"):
        embedded("glyphs").with_negative_prompt("red", acts=False)


def test_a_student_of_a_guided_teacher_is_one_of_the_teacher() -> None:
    inside = embedded("digits")
    drawn = []
    for teacher in (inside, guided(inside, 3.0)):
        torch.manual_seed(0)
        student = Student(teacher)
        x = torch.randn(2, *inside.spec.sample_shape, generator=torch.Generator().manual_seed(1))
        drawn.append(student(x, None, 0.0, inside.example_rows(2)))
    assert torch.equal(*drawn)


def test_a_run_of_a_guided_teacher_is_that_of_the_teacher(tmp_path) -> None:  # type: ignore[no-untyped-def]
    own = {**FAST, "max_train_steps": 2, "checkpointing_steps": 2, "lr_warmup_steps": 0, "guidance_scale": 2.0}
    images = []
    for i, teacher in enumerate((embedded("digits"), guided(embedded("digits"), 5.0))):
        onestill.distill(teacher, tmp_path / str(i), show_progress=False, **own)
        images.append(onestill.sample(tmp_path / str(i), num_images=2, device="cpu"))
    assert torch.equal(*images)
