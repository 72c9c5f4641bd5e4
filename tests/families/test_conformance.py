"""What every family of stock pipelines must pass, on tiny random weights."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipelines import ARGUMENTS, BUILDERS, build
from torch import Tensor

from onestill.core.tensors import noise
from onestill.export.export import export_student
from onestill.export.lora_file import why_no_file
from onestill.runs.load import load_student
from onestill.sampling.generate import student_generator
from onestill.students.injection import TimeEmbeddingInjection
from onestill.students.lora import Lora
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines.build import self_check
from onestill.teachers.pipelines.calls import PipelineCalls
from onestill.teachers.pipelines.capture import record
from onestill.teachers.pipelines.folder import load_stock
from onestill.teachers.pipelines.teacher import PipelineTeacher

# Self-attention and normalisation of tiny random networks amplify float32 rounding by up to 100 over four steps.
PARITY = 1e-4
# Families whose time embedding cannot be reached take the documented fallback.
FALLBACK: set[str] = set()
# Those whose network is told times from 0 to 1 as they are: their embeddings of several hardly differ.
FLAT = {"lumina2"}


@functools.cache
def folder_of(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="onestill-family-")) / name
    build(name).save_pretrained(folder)
    return folder


@functools.cache
def teacher_of(name: str) -> PipelineTeacher:
    teacher = load_teacher(folder_of(name), arguments=ARGUMENTS.get(name))
    assert isinstance(teacher, PipelineTeacher)
    return teacher


@pytest.fixture(params=sorted(BUILDERS))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def teacher(name: str) -> PipelineTeacher:
    """Each family's teacher, built once for all tests: never change it."""
    return teacher_of(name)


def noise_of(teacher: Teacher, num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, *teacher.spec.sample_shape, generator=torch.Generator().manual_seed(seed))


def conditions_of(teacher: PipelineTeacher, num: int = 2) -> dict[str, Tensor]:
    return teacher.encode(teacher.calls.examples(num))


def perturbed(teacher: Teacher, **settings: Any) -> Student:
    """Return a student some way into a training, with a target time that matters."""
    torch.manual_seed(5)
    student = Student(teacher, **settings)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return student


def test_four_guided_steps_are_the_pipelines_own(teacher: PipelineTeacher) -> None:
    stock = teacher.pipeline_spec.schedule(teacher.pipeline).stock
    assert self_check(teacher, stock, num_steps=4) <= PARITY


def test_four_steps_away_from_a_negative_prompt_are_the_pipelines_own(teacher: PipelineTeacher) -> None:
    if not teacher.spec.text or not teacher.can_guide:
        pytest.skip("takes no negative prompt")
    ours, stock = copy.copy(teacher), teacher.pipeline_spec.schedule(teacher.pipeline).stock
    ours = ours.with_negative_prompt("a drawing")
    assert any((ours.null_cond[name] != value).any() for name, value in teacher.null_cond.items() if value.numel())
    assert self_check(ours, stock, num_steps=4, negative_prompt="a drawing") <= PARITY


def test_a_seed_is_the_pipelines_own_noise(teacher: PipelineTeacher) -> None:
    family = teacher.pipeline_spec
    run = lambda: teacher.calls(teacher.calls.examples(2), {"num_inference_steps": 2}, seeds=(3, 4))  # noqa: E731
    call = record(run, teacher.network)[0]  # type: ignore[arg-type]  # a pipeline's network is a module
    first = teacher.calls.sorted(call).x_t[-2:]
    ours = noise((3, 4), teacher.spec.sample_shape)
    torch.testing.assert_close(family.unpack(first, teacher.signature.constant), ours, atol=1e-5, rtol=0)


def test_single_and_batched_calls_agree(teacher: PipelineTeacher) -> None:
    x, cond = noise_of(teacher, 2), conditions_of(teacher)
    both = teacher.denoised(x, 0.5, cond)
    single = torch.cat(
        [teacher.denoised(x[i : i + 1], 0.5, {k: v[i : i + 1] for k, v in cond.items()}) for i in range(2)]
    )
    torch.testing.assert_close(both, single, atol=1e-4, rtol=1e-4)


def test_encoded_conditions_take_the_place_of_a_calls_own(teacher: PipelineTeacher) -> None:
    family = teacher.pipeline_spec
    given = {"num_inference_steps": 2, **family.guidance_argument(1.0)}
    run = lambda: teacher.calls(teacher.calls.examples(2), given, seeds=(3, 4))  # noqa: E731
    (usual,) = record(run, teacher.network)  # type: ignore[arg-type]  # a pipeline's network is a module
    cond = {name: value.flip(0) for name, value in teacher.signature.conditions(teacher.calls.sorted(usual)).items()}
    with teacher.calls.encoded(teacher.signature, cond):
        (seen,) = record(run, teacher.network)  # type: ignore[arg-type]
    assert seen.arguments.keys() == usual.arguments.keys()
    torch.testing.assert_close(
        seen.x_t[:, : teacher.spec.sample_shape[0]], usual.x_t[:, : teacher.spec.sample_shape[0]]
    )
    for name, value in teacher.signature.conditions(teacher.calls.sorted(seen)).items():
        torch.testing.assert_close(value, cond[name], atol=0, rtol=0)


def test_the_condition_matters(teacher: PipelineTeacher) -> None:
    if not teacher.can_guide:
        pytest.skip("this family has no null condition")
    x, cond = noise_of(teacher, 2), conditions_of(teacher)
    assert (teacher.denoised(x, 0.5, cond) - teacher.denoised(x, 0.5, teacher.null_rows(cond))).abs().max() > 1e-6


def test_the_student_starts_as_the_teacher(teacher: PipelineTeacher, name: str) -> None:
    student = Student(teacher)
    assert isinstance(student.injection, TimeEmbeddingInjection) == (name not in FALLBACK)
    x = teacher.spec.trajectory.start(noise_of(teacher, 2))
    expected = teacher.denoised(x, teacher.spec.t_max, conditions_of(teacher))
    for t in (0.0, 0.4, teacher.spec.t_max):
        torch.testing.assert_close(student(x, None, t, conditions_of(teacher)), expected, atol=0, rtol=0)


def test_gradients_reach_the_student_only(teacher: PipelineTeacher) -> None:
    # Whole runs are in test_conformance_runs.py.
    student, cond = Student(teacher), conditions_of(teacher)
    x_a = teacher.spec.trajectory.start(noise_of(teacher, 2))
    target = teacher.denoised(x_a, 0.5, cond)
    (student(x_a, None, 0.3, cond) - target).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(not p.requires_grad and p.grad is None for p in teacher.network.parameters())


def test_the_export_is_the_student(teacher: PipelineTeacher, tmp_path: Path) -> None:
    # export_student reloads the folder with stock diffusers and compares the plain call's pictures.
    assert export_student(perturbed(teacher), tmp_path / "out", t=0.0) <= 1e-4


def test_an_exported_target_time_is_baked_in(teacher: PipelineTeacher, tmp_path: Path) -> None:
    student = perturbed(teacher)
    assert export_student(student, tmp_path / "out", t=0.5) <= 1e-4
    x, cond = teacher.spec.trajectory.start(noise_of(teacher, 2)), conditions_of(teacher)
    assert (student(x, None, 0.5, cond) - student(x, None, 0.0, cond)).abs().max() > 1e-5


@pytest.mark.parametrize("num", [2, 4])
def test_the_export_of_several_steps_is_the_student(teacher: PipelineTeacher, tmp_path: Path, num: int) -> None:
    student = perturbed(teacher)
    assert export_student(student, tmp_path / "out", num_inference_steps=num) <= 1e-4
    assert f"num_inference_steps={num}" in (tmp_path / "out" / "README.md").read_text()
    if teacher.image_condition is None:
        sampler = load_student(tmp_path / "out").sampler
        assert (sampler.num_steps, sampler.evaluations) == (num, num)


# LoRA students


def lora_student(teacher: Teacher, size: float = 0.0) -> Student:
    """Return a student of low rank, some way into a training if `size` is not 0."""
    torch.manual_seed(5)
    student = Student(teacher, lora=Lora(2, alpha=3.0))
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return student


def test_a_lora_student_starts_as_the_teacher_on_the_same_weights(teacher: PipelineTeacher) -> None:
    student = lora_student(teacher)
    x, cond = teacher.spec.trajectory.start(noise_of(teacher, 2)), conditions_of(teacher)
    expected = teacher.denoised(x, teacher.spec.t_max, cond)
    for t in (0.0, 0.4, teacher.spec.t_max):
        torch.testing.assert_close(student(x, None, t, cond), expected, atol=0, rtol=0)
    own = {p.data_ptr() for p in teacher.network.parameters()}
    assert own == {p.data_ptr() for p in student.network.parameters() if not p.requires_grad}


def test_three_steps_train_the_adapters_and_the_embeddings_only(teacher: PipelineTeacher) -> None:
    before, student = teacher.fingerprint(), lora_student(teacher, 0.01)
    cond, x_a = conditions_of(teacher), teacher.spec.trajectory.start(noise_of(teacher, 2))
    alone = teacher.denoised(x_a, 0.5, cond)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} <= {"network", "target_embedding", "injection"}
    assert all("lora_" in name for name in trained if name.startswith("network"))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    for _ in range(3):
        student(x_a, None, 0.3, cond).square().mean().backward()
        # A layer whose output the network throws away for these inputs may stay without a gradient, others may not.
        assert sum(bool(p.grad is not None and p.grad.any()) for p in trained.values()) > 0.8 * len(trained)
        assert all(p.grad is None for p in student.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert (student(x_a, None, 0.3, cond) - teacher.denoised(x_a, teacher.spec.t_max, cond)).abs().max() > 0
    torch.testing.assert_close(teacher.denoised(x_a, 0.5, cond), alone, atol=0, rtol=0)
    assert teacher.fingerprint() == before


@pytest.mark.parametrize(("t", "num"), [(0.5, 1), (0.0, 4)])
def test_a_lora_student_is_exported_merged_and_as_a_file(
    teacher: PipelineTeacher, name: str, tmp_path: Path, t: float, num: int
) -> None:
    student, out = lora_student(teacher, 0.02), tmp_path / "out"
    # Reloaded and compared: the merged folder, and the teacher's own pipeline with the file.
    assert export_student(student, out, t=t, num_inference_steps=num) <= 1e-4
    if num > 1 and name in FLAT:
        assert not (out / "lora").exists() and "there is no LoRA file: the times of" in (out / "README.md").read_text()
        return
    written = (out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert written == (why_no_file(student) is None)
    assert ("load_lora_weights" in (out / "README.md").read_text()) == written
    if not written:
        assert not (out / "lora").exists()
        return
    images, eps, cond = plain_lora_call(teacher, out / "lora", num)
    expected = teacher.decode(student_generator(student, t=t, num_steps=num)(eps, cond)).clamp(-1, 1)
    assert float((images.clamp(-1, 1) - expected).abs().max()) <= 1e-4
    # And it is the file that does it.
    without = teacher.decode(teacher.denoised(eps, teacher.spec.t_max, cond)).clamp(-1, 1)
    assert float((images.clamp(-1, 1) - without).abs().max()) > 1e-3


@torch.no_grad()
def plain_lora_call(teacher: PipelineTeacher, lora: Path, num: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (images, noise, conditions) of the teacher's stock pipeline as the model card says to call it."""
    # Stock `from_pretrained`; some folders have optional parts left out, which diffusers wants to be told.
    pipeline = load_stock(type(teacher.pipeline), teacher.folder)
    pipeline.load_lora_weights(lora)
    kind = json.loads((lora / "scheduler_config.json").read_text())["_class_name"]
    pipeline.scheduler = getattr(diffusers, kind).from_pretrained(lora)
    return PipelineCalls(teacher.pipeline_spec.in_steps(num), pipeline).plain_call(teacher.signature, 2)
