"""Samplers: one contract, whatever generates; what a new one has to say, and what the three kinds refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs_helpers import NULL_CLASS, finished_run, restored, teacher_folder
from torch import Tensor

import onestill
from onestill.core.errors import SettingError
from onestill.core.tensors import noise
from onestill.diffusion.process import CosineVP
from onestill.diffusion.trajectory import CALLS_PER_STEP
from onestill.runs.folder import RunFolder
from onestill.runs.load import load_student
from onestill.sampling.generate import Rows, generate_images, student_generator
from onestill.sampling.samplers.base import Sampler
from onestill.sampling.samplers.network import StudentSampler, TeacherSampler
from onestill.teachers.closed_form import GaussianTeacher
from onestill.teachers.guidance import guided
from onestill.teachers.load import load_teacher


class Tanh(Sampler):
    """A sampler with nothing but what it must have."""

    name, sample_shape = "tanh", (1, 8, 8)

    def __call__(self, eps: Tensor, rows: Rows) -> Tensor:
        return eps.tanh()


def test_one_method_makes_a_sampler(tmp_path: Path) -> None:
    walk = onestill.interpolate(Tanh(), 3, seed=1, to_seed=2)
    ends = noise([1, 2], (1, 8, 8)).tanh()
    assert torch.equal(walk.images[0, 0], ends[0]) and torch.equal(walk.images[0, -1], ends[1])
    assert walk.save(tmp_path / "x.png").is_file()
    assert Tanh().conditions(2) == {} and Tanh().warnings(()) == [] and Tanh().at() is not None
    for settings, words in (
        ({"prompts": ["a"]}, "prompts: tanh takes no text"),
        ({"class_labels": [1]}, "unconditional"),
    ):
        with pytest.raises(SettingError, match=words):
            onestill.fixed_noise(Tanh(), **settings)
    with pytest.raises(SettingError, match="fixed_noise: tanh is unconditional"):
        onestill.fixed_noise(Tanh())
    with pytest.raises(SettingError, match=r"target_times=\(1.0, 0.0\): tanh has it baked in"):
        onestill.student_trajectory(Tanh(), [1.0, 0.0])


@pytest.mark.parametrize("solver", CALLS_PER_STEP)
def test_a_teacher_in_many_steps_draws_its_law(solver: str) -> None:
    teacher = GaussianTeacher(torch.tensor([0.5, -0.3]), 0.6, CosineVP(), 1.0)
    sampler = TeacherSampler(teacher, num_steps=200, solver=solver)
    eps = noise(range(500), (2,))
    exact = 0.6 * eps + torch.tensor([0.5, -0.3])  # every trajectory of a Gaussian scales its noise
    assert (sampler(eps, {}) - exact).abs().max() < (0.05 if solver == "ddim" else 1e-3)
    assert sampler.evaluations == 200 * CALLS_PER_STEP[solver]


def test_another_scale_guides_anew() -> None:
    teacher = load_teacher(teacher_folder("class"), null_class=NULL_CLASS)
    sampler = TeacherSampler(guided(teacher, 3.0), num_steps=2)
    assert sampler.evaluations == 4 and sampler.at(guidance_scale=1.0).evaluations == 2
    rows = sampler.conditions(2)
    for w in (1.0, 2.0):
        expected = TeacherSampler(guided(teacher, w), num_steps=2).images(range(2), rows)
        assert torch.equal(sampler.at(guidance_scale=w).images(range(2), rows), expected)
    with pytest.raises(SettingError, match="target_time=0.5: is a student's"):
        sampler.at(target_time=0.5)
    # An object that is guided already is taken as it is, unless another scale is named.
    for w, given in ((3.0, None), (2.0, 2.0)):
        images = onestill.sample(
            teacher=guided(teacher, 3.0), num_images=2, num_inference_steps=2, guidance_scale=given
        )
        assert torch.equal(images, sampler.at(guidance_scale=w).images(range(2), rows))


def test_a_student_stays_loaded_and_what_is_exported_stays_baked() -> None:
    student = restored(finished_run("drawn"))
    sampler = StudentSampler(student)
    other = sampler.at(guidance_scale=1.5, target_time=0.5)
    assert other.student is student and (other.guidance_scale, other.target_time) == (1.5, 0.5)
    with pytest.raises(SettingError, match="guidance_scale=9: is outside 1 to 3"):
        sampler.at(guidance_scale=9)
    exported = load_student(finished_run("drawn") / "pipeline").sampler
    assert exported.at() is exported
    for setting in ("guidance_scale", "target_time"):
        with pytest.raises(SettingError, match=f"{setting}=0.5: the student in .* has it baked in"):
            exported.at(**{setting: 0.5})
    # A run's own pipeline goes to others by the run's weights.
    found = load_student(finished_run("drawn"))
    assert found.pipeline == finished_run("drawn") / "pipeline"
    assert isinstance(found.sampler.at(guidance_scale=1.5), StudentSampler)


def test_a_student_takes_the_steps_that_it_was_trained_for(monkeypatch: pytest.MonkeyPatch) -> None:
    path = finished_run("drawn")
    found = load_student(path)
    assert found.sampler.at(num_inference_steps=1) is found.sampler
    for give in (lambda: load_student(path, num_inference_steps=2), lambda: found.sampler.at(num_inference_steps=2)):
        with pytest.raises(SettingError, match="num_inference_steps=2: this student was trained for one step; distil"):
            give()
    with pytest.raises(SettingError, match="num_inference_steps=2: .* exported for 1, and no other number"):
        load_student(path / "pipeline", num_inference_steps=2)
    monkeypatch.setattr(RunFolder, "is_map", True)
    four = load_student(path, num_inference_steps=4).sampler
    rows = four.conditions(3)
    assert isinstance(four, StudentSampler) and (four.num_steps, four.evaluations) == (4, 4)
    cond = {**rows, "guidance_scale": torch.full((3,), 2.0)}
    walked = student_generator(four.student, t=RunFolder(path).config.t_min, num_steps=4)
    expected = generate_images(walked, range(3), four.sample_shape, cond).clamp(-1, 1)
    assert torch.equal(four.images(range(3), rows), expected)
    assert torch.equal(onestill.sample(path, num_images=3, num_inference_steps=4), expected)
    one = four.at(num_inference_steps=1)
    assert (one.num_steps, one.student) == (1, four.student)
    torch.testing.assert_close(one.images(range(3), rows), found.sampler.images(range(3), rows), atol=1e-5, rtol=0)
    assert torch.equal(found.sampler.at(num_inference_steps=4).images(range(3), rows), expected)
    for steps, words in ((9, "a student has 1 to 8 steps; give teacher"), (0, "a student has 1 to 8")):
        with pytest.raises(SettingError, match=f"num_inference_steps={steps}: {words}"):
            four.at(num_inference_steps=steps)
    with pytest.raises(SettingError, match="target_time=0.5: is of a single step; .* or give num_inference_steps 1"):
        four.at(target_time=0.5)
