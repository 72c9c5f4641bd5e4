"""Students of several steps, written as folders whose own plain call draws them: eqs. (28) to (30)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
)
from diffusers.models.embeddings import TimestepEmbedding
from export_helpers import trained
from torch import Tensor, nn

from onestill.core.errors import SettingError
from onestill.core.tensors import Cond, noise
from onestill.diffusion.process import VE, CosineVP, DiscreteVP, FlowMatching, LogSigmaVP, Process
from onestill.diffusion.trajectory import Trajectory, uniform_times
from onestill.export.export import export_student
from onestill.export.module import load_module
from onestill.export.pixel import call_pipeline
from onestill.runs.load import load_student
from onestill.sampling.generate import student_generator
from onestill.students import bake
from onestill.students.mark import read_mark
from onestill.students.one_step import few_steps_of
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.module import module_teacher
from onestill.teachers.pipelines import walks
from onestill.teachers.teacher_spec import TeacherSpec, Threshold

Labels = Callable[[Teacher, int], Cond]
STEPS = [1, 2, 3, 4, 5, 7, 8]


def drawn(student: Student, cond: Cond, num_steps: int, num: int = 4) -> Tensor:
    return student_generator(student, num_steps=num_steps)(noise(range(num), student.spec.sample_shape), cond)


def has_time(teacher: Teacher) -> bool:
    return any(isinstance(module, TimestepEmbedding) for module in teacher.network.modules())


# Folders


@pytest.mark.parametrize("num", [2, 4, 8])
def test_the_folder_of_a_pixel_student_draws_its_steps(
    unet_case: Any, labels_for: Labels, tmp_path: Path, num: int
) -> None:
    student = trained(unet_case.build())
    assert export_student(student, tmp_path / "out", num_inference_steps=num) <= 1e-4
    cond = labels_for(student.teacher, 4)
    labels = cond["class_labels"].tolist() if cond else None
    stock = call_pipeline(DiffusionPipeline.from_pretrained(tmp_path / "out"), range(4), labels, num)
    expected = drawn(student, cond, num)
    assert (stock - expected.clamp(-1, 1)).abs().max() <= 2e-5 * max(1, float(expected.abs().max()))
    assert (expected - drawn(student, cond, 1)).abs().max() > 1e-3
    sampler = load_student(tmp_path / "out").sampler
    assert (sampler.num_steps, sampler.evaluations) == (num, num)
    assert (sampler(noise(range(4), sampler.sample_shape), cond) - stock).abs().max() <= 2e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {num}-step student" in card and f"num_inference_steps={num}).images  # {num} network evaluations" in card


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("name", ["module-class", "module-flow-velocity"])
def test_a_module_student_is_loaded_with_its_steps(
    name: str, cases: dict[str, Any], labels_for: Labels, tmp_path: Path, num: int
) -> None:
    student = trained(cases[name].build())
    assert export_student(student, tmp_path / "out", num_inference_steps=num) <= 1e-4
    cond = labels_for(student.teacher, 4)
    found = load_module(tmp_path / "out", cases[name].build().network)(noise(range(4), student.spec.sample_shape), cond)
    torch.testing.assert_close(found, drawn(student, cond, num), atol=2e-5, rtol=2e-5)
    mark = read_mark(tmp_path / "out")
    assert mark is not None and mark.num_inference_steps == len(mark.heads) == num
    (tmp_path / "out" / "onestill.json").write_text(json.dumps({**mark.model_dump(mode="json"), "heads": []}))
    with pytest.raises(ValueError, match=f"{num} steps and 0 heads"):
        load_module(tmp_path / "out", cases[name].build().network)


def test_the_scale_is_baked_into_every_step(cases: dict[str, Any], labels_for: Labels) -> None:
    teacher = cases["class-null-last"].build()
    student, cond = trained(teacher, guidance_range=(1.0, 4.0)), labels_for(teacher, 3)
    step = few_steps_of(student, 3, guidance_scale=3.5)
    found, told = step(noise(range(3), teacher.spec.sample_shape), cond), student.with_scale(cond, 3.5, 3)
    torch.testing.assert_close(found, drawn(student, told, 3, 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["module-cosine-v", "module-ve-sigma"])
def test_biases_hold_one_target_time(name: str, cases: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match="num_inference_steps=4: its network's time embedding cannot be reached.*one step"
    ):
        export_student(trained(cases[name].build()), tmp_path / "out", num_inference_steps=4)
    assert list(tmp_path.iterdir()) == []


def test_one_step_says_nothing_of_more(cases: dict[str, Any], tmp_path: Path) -> None:
    export_student(trained(cases["ddim-v"].build()), tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "onestill.json").read_text())) == {
        "kind", "format", "sample_shape", "head", "target_time", "guidance_scale",
    }  # fmt: skip


# Baking, eq. (30)


def test_the_dual_basis_is_dual() -> None:
    h = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bake.dual_basis(h) @ h.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(bake.dual_basis(h[:1]), h[:1] / h[0].norm() ** 2)
    with pytest.raises(SettingError, match="num_inference_steps=3: .*does not tell so many levels apart"):
        bake.dual_basis(h[:1].expand(3, -1) + 1e-9 * h[:3])


class SlowNetwork(nn.Module):
    """A network that is told 0 to 1 and looks at it through slow sinusoids, so that such times hardly differ to it."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.time_embedding = TimestepEmbedding(8, hidden)
        self.last = nn.Linear(hidden, 64)

    def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
        angles = net_time.to(x)[:, None] * torch.tensor([0.3, 0.1, 0.03, 0.01])
        emb = self.time_embedding(torch.cat([angles.cos(), angles.sin()], 1))
        return 0.5 * x + self.last(emb.tanh()).reshape(-1, 1, 8, 8)


@pytest.mark.parametrize("num", [4, 8])
def test_times_that_hardly_differ_are_told_apart_all_the_same(tmp_path: Path, num: int) -> None:
    torch.manual_seed(1)
    network = SlowNetwork()
    student = trained(module_teacher(network, CosineVP(), "sample", (1, 8, 8)))
    levels = student.levels(num)
    h, _ = bake.embedded(student.teacher, student.network, levels)["time_embedding.linear_2"]
    assert not bake._lie_apart(h)
    assert export_student(student, tmp_path / "out", num_inference_steps=num) <= 1e-5
    found = load_module(tmp_path / "out", SlowNetwork())(noise(range(4), (1, 8, 8)), {})
    torch.testing.assert_close(found, drawn(student, {}, num), atol=1e-5, rtol=1e-5)


def test_too_few_units_hold_no_more_levels(tmp_path: Path) -> None:
    student = trained(module_teacher(SlowNetwork(3), CosineVP(), "sample", (1, 8, 8)))
    with pytest.raises(
        SettingError, match="num_inference_steps=4: .*does not tell so many levels apart; export it for fewer"
    ):
        export_student(student, tmp_path / "out", num_inference_steps=4)
    assert list(tmp_path.iterdir()) == []


# Schedulers: x_{k+1} of a network that answers with noise, against eq. (5)

PROCESSES: dict[str, tuple[Process, str, float]] = {
    "epsilon": (DiscreteVP(DDIMScheduler().alphas_cumprod), "epsilon", 0.93),
    "v": (DiscreteVP(DDIMScheduler().alphas_cumprod), "v_prediction", 1.0),
    "v, zero SNR": (DiscreteVP(DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod), "v_prediction", 1.0),
    "sample, zero SNR": (DiscreteVP(DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod), "sample", 1.0),
    "cosine": (CosineVP(), "v_prediction", 1.0),
    "log sigma": (LogSigmaVP(0.002, 80.0), "v_prediction", 1.0),
    "edm": (VE(0.002, 80.0), "edm", 1.0),
    "flow": (FlowMatching(), "velocity", 1.0),
    "flow, shift 3": (FlowMatching(3.0), "velocity", 1.0),
    "flow, shift 0.5": (FlowMatching(0.5), "velocity", 1.0),
    "flow, shift 12": (FlowMatching(12.0), "velocity", 1.0),
}


def schedulers(spec: TeacherSpec, levels: list[float]) -> list[tuple[Any, dict[str, Any]]]:
    """Return the schedulers of a student's levels, and what their `set_timesteps` is given."""
    num = len(levels)
    if spec.prediction_type == "velocity":
        uniform, own = walks.flow_walks(spec, levels)
        passed = {"sigmas": [1 - k / num for k in range(num)]}
        return [
            (uniform, passed),
            (own, {"num_inference_steps": num}),
            (walks.unipc_walk(spec, levels), {"num_inference_steps": num}),
        ]
    walk = walks.edm_walk(spec, levels) if spec.prediction_type == "edm" else walks.ddim_walk(spec, levels)
    found = [walk]
    if spec.prediction_type == "epsilon":
        found.append(walks.dpm_walk(spec, levels, Threshold()))
    return [(scheduler, {"num_inference_steps": num}) for scheduler in found]


@pytest.mark.parametrize("num", STEPS[1:])
@pytest.mark.parametrize("name", PROCESSES)
def test_a_stock_scheduler_walks_the_levels(name: str, num: int) -> None:
    process, prediction, t_max = PROCESSES[name]
    spec = TeacherSpec("", "", process, prediction, (3,), t_max, "", sigma_data=0.5)
    levels, generator = uniform_times(t_max, num), torch.Generator().manual_seed(num)
    trajectory, eps = Trajectory(process, t_max), torch.randn(5, 3, generator=generator).double()
    answers = [torch.randn(5, 3, generator=generator).double() for _ in range(num)]
    for scheduler, given in schedulers(spec, levels[:-1]):
        scheduler = type(scheduler).from_config(json.loads(json.dumps(dict(scheduler.config))))  # as a folder has it
        scheduler.set_timesteps(**given)
        assert walks.walks(scheduler, spec, levels[:-1])
        assert len(set(scheduler.timesteps.tolist())) == num
        x = trajectory.start(eps)
        theirs = (eps * getattr(scheduler, "init_noise_sigma", 1.0)).float()
        for k, t in enumerate(scheduler.timesteps):
            a, s = (torch.tensor([level] * 5, dtype=torch.float64) for level in levels[k : k + 2])
            c_in, c_skip, c_out = (value[:, None] for value in preconditioning_of(spec, *process.alpha_sigma(a)))
            if hasattr(scheduler, "scale_model_input"):
                seen = scheduler.scale_model_input(theirs, t)
                torch.testing.assert_close(seen.double(), c_in * x, atol=2e-5, rtol=2e-5)
            y = c_skip * x + c_out * answers[k]
            x = y if k + 1 == num else trajectory.state(y, x, s, a)
            theirs = scheduler.step(answers[k].float(), t, theirs, return_dict=False)[0]
            size = max(1.0, float(x.abs().max()))
            assert (theirs - x).abs().max() <= 2e-5 * size, (type(scheduler).__name__, k)


def preconditioning_of(spec: TeacherSpec, alpha: Tensor, sigma: Tensor) -> Any:
    from onestill.diffusion.prediction import preconditioning

    return preconditioning(spec.prediction_type, alpha, sigma, spec.sigma_data)


def test_the_levels_of_a_schedule_are_exact_and_fall() -> None:
    for num in STEPS[1:]:
        spec = TeacherSpec("", "", DiscreteVP(DDIMScheduler().alphas_cumprod), "epsilon", (3,), 1.0, "")
        levels = uniform_times(1.0, num)[:-1]
        scheduler = walks.ddim_walk(spec, levels)
        scheduler.set_timesteps(num)
        squares = scheduler.alphas_cumprod[scheduler.timesteps].double()
        wanted = spec.process.alpha_sigma(torch.tensor(levels, dtype=torch.float64))[0] ** 2
        assert ((squares - wanted) / wanted).abs().max() < 2e-7
        assert (scheduler.alphas_cumprod.diff() < 0).all()
        native = spec.process.net_time(torch.tensor(levels, dtype=torch.float64))
        assert (scheduler.timesteps - native).abs().max() <= 1000 % num + 1


def test_thresholding_at_every_step_is_eq_15() -> None:
    spec = TeacherSpec("", "", DiscreteVP(DDIMScheduler().alphas_cumprod), "epsilon", (3, 4, 4), 0.9, "")
    levels, threshold = uniform_times(0.9, 2), Threshold("dynamic", 1.5, 0.9)
    scheduler = walks.dpm_walk(spec, levels[:-1], threshold)
    scheduler.set_timesteps(2)
    x, answer = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    (alpha, sigma), (alpha_s, sigma_s) = (spec.process.level(t) for t in levels[:2])
    y = threshold((x - sigma * answer) / alpha)
    expected = sigma_s / sigma * x + (alpha_s - alpha * sigma_s / sigma) * y
    torch.testing.assert_close(
        scheduler.step(answer, scheduler.timesteps[0], x).prev_sample, expected, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="clips its predictions to 2"):
        walks.dpm_walk(spec, levels[:-1], Threshold("static", 2.0))
