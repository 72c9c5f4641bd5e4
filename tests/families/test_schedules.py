"""Schedulers that are no plain `alphas_cumprod`, and networks that are told a scale: read as the stock pipeline runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from components import vae
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from pipelines import build
from test_conformance import perturbed
from torch import Tensor
from vp_pipelines import cond_unet, stable_diffusion

from onestill.core.errors import SettingError
from onestill.diffusion.process import DiscreteVP
from onestill.export.export import export_student
from onestill.students.student import Student
from onestill.teachers.guidance import guided
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines.build import self_check
from onestill.teachers.pipelines.calls import PipelineCalls
from onestill.teachers.pipelines.capture import record
from onestill.teachers.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from onestill.teachers.pipelines.folder import load_stock
from onestill.teachers.pipelines.teacher import CALL_FILE, PipelineTeacher

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
CONTINUOUS = {**V, "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 120.0, "use_karras_sigmas": True}
COSINE = torch.cos(torch.linspace(0, 1.4, 1000, dtype=torch.float64)) ** 2
CLEAN_FIRST = [0.0, *(1 - COSINE[1:] / COSINE[:-1]).tolist()]
CASES: dict[str, Any] = {
    "clean first index": lambda: DDIMScheduler(trained_betas=CLEAN_FIRST, clip_sample=False),
    "clean first, zero SNR": lambda: DDIMScheduler(trained_betas=[*CLEAN_FIRST[:-1], 1.0], clip_sample=False, **V),
    "flow, dpm": lambda: DPMSolverMultistepScheduler(**FLOW),
    "flow, unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "flow, euler": lambda: FlowMatchEulerDiscreteScheduler(shift=2.0),
    "continuous euler": lambda: EulerDiscreteScheduler(**BETAS, **CONTINUOUS),
    "edm v": lambda: EDMEulerScheduler(sigma_max=120.0, sigma_data=1.0, sigma_schedule="exponential", **V),
    "lcm": lambda: LCMScheduler(**BETAS),
}


def teacher_of(folder: Path, scheduler: Any = None, decoder: Any = None, **unet: Any) -> PipelineTeacher:
    torch.manual_seed(0)
    pipeline = stable_diffusion()
    pipeline.scheduler = scheduler or pipeline.scheduler
    if unet:
        pipeline.unet = cond_unet(**unet)
        torch.nn.init.normal_(pipeline.unet.time_embedding.cond_proj.weight)
    if decoder is not None:
        pipeline.vae = decoder
    pipeline.save_pretrained(folder)
    teacher = load_teacher(folder)
    assert isinstance(teacher, PipelineTeacher)
    return teacher


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_is_the_pipelines_own_and_exports(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "teacher", CASES[name]())
    stock = teacher.pipeline_spec.schedule(teacher.pipeline).stock
    assert self_check(teacher, stock, num_steps=4) <= 1e-4
    assert export_student(perturbed(teacher), tmp_path / "out") <= 1e-4
    one, few = pictures(tmp_path / "out", 1, 4)
    assert (few - one).abs().max() <= 1e-3
    assert export_student(perturbed(teacher), tmp_path / "four", num_inference_steps=4) <= 1e-4


SPREAD = {"interpolation_type": "log_linear", "timestep_spacing": "leading", "steps_offset": 1}


@pytest.mark.parametrize("scheduler", [PNDMScheduler(**BETAS), EulerDiscreteScheduler(**BETAS, **SPREAD)])
def test_odd_steps_do_not_hide_the_schedule(scheduler: Any, tmp_path: Path) -> None:
    process = teacher_of(tmp_path / "teacher", scheduler).spec.process
    assert isinstance(process, DiscreteVP)
    times = torch.tensor([process.time_of(i) for i in (0, 500, 999)], dtype=torch.float64)
    torch.testing.assert_close(process.alpha_sigma(times)[0] ** 2, scheduler.alphas_cumprod[[0, 500, 999]].double())
    torch.testing.assert_close(process.net_time(times), torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64))


def pictures(folder: Path, *num_steps: int) -> list[Tensor]:
    calls = PipelineCalls(STABLE_DIFFUSION, load_stock(StableDiffusionPipeline, folder))
    given = [{"num_inference_steps": num, "output_type": "pt"} for num in num_steps]
    return [calls(["a photo"], each, seeds=(0,)).images for each in given]


def test_an_export_says_one_step_and_its_scheduler_and_refuses_many(tmp_path: Path) -> None:
    export_student(Student(teacher_of(tmp_path / "teacher")), tmp_path / "out")
    assert json.loads((tmp_path / "out" / CALL_FILE).read_text()) == {
        "num_inference_steps": 1,
        "scheduler": "DDIMScheduler",
    }
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "One step, by this folder's own scheduler" in card and "(DEIS, SASolver" in card
    with pytest.raises(ValueError, match="num_inference_steps"):
        pictures(tmp_path / "out", 20)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True, sigma_max=80.0), "begins at sigma / alpha = 80 "),
        (DPMSolverMultistepScheduler(**{**FLOW, "prediction_type": "epsilon"}), "flow matching needs use_flow_sigmas"),
        (EDMEulerScheduler(**V), "is supported with sigma_data=1, not 0.5"),
        (DDIMScheduler(trained_betas=[0.1, 0.0, 0.1]), "index 0 holds .* and index 1 .* give beta_1 a value"),
    ],
)
def test_another_process_is_refused_by_name(scheduler: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        teacher_of(tmp_path / "teacher", scheduler)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("width", [32, 256])
def test_a_network_is_told_the_stock_calls_scale(width: int, tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "teacher", LCMScheduler(**BETAS), time_cond_proj_dim=width)
    assert (teacher.guidance_input, teacher.usual_guidance, teacher.can_guide) == ("timestep_cond", 7.5, False)
    x, cond = torch.randn(2, 4, 8, 8), teacher.encode(["a photo", "red"])
    for scale, given in ((7.5, {}), (8.0, {"guidance_scale": 8.0})):
        run = lambda given=given: teacher.pipeline("a photo", num_inference_steps=2, **given)  # noqa: E731
        (call,) = record(run, teacher.network)  # type: ignore[arg-type]  # a pipeline's network is a module
        stock = call.arguments["timestep_cond"]
        expected = teacher.denoised(x, 0.5, {**cond, "timestep_cond": stock.expand(2, -1)})
        torch.testing.assert_close(guided(teacher, scale).denoised(x, 0.5, cond), expected)
        drawn = guided(teacher, drawn=True).denoised(x, 0.5, {**cond, "guidance_scale": torch.full((2,), scale)})
        torch.testing.assert_close(drawn, expected)
    for num in (1, 4):
        assert export_student(perturbed(teacher), tmp_path / f"out-{num}", num_inference_steps=num) <= 1e-4


def test_a_latent_consistency_pipeline_is_refused_in_its_own_terms(tmp_path: Path) -> None:
    build("sd-epsilon").save_pretrained(tmp_path / "teacher")
    index = tmp_path / "teacher" / "model_index.json"
    found = {**json.loads(index.read_text()), "_class_name": "LatentConsistencyModelPipeline"}
    index.write_text(json.dumps(found))
    with pytest.raises((SettingError, ValueError), match="original_inference_steps.*StableDiffusionPipeline"):
        load_teacher(tmp_path / "teacher")


@pytest.mark.parametrize("config", [{"shift_factor": 0.5}, {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}])
def test_latents_are_decoded_as_the_pipeline_does(config: dict[str, Any], tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "teacher", decoder=vae(**config))
    assert export_student(Student(teacher), tmp_path / "out") <= 1e-4
