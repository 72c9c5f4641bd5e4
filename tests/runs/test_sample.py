"""`sample`: one seed is one image, whoever draws it; and what is refused."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from runs_helpers import (
    NULL_CLASS,
    finished_run,
    teacher_folder,
)
from torch import Tensor

import onestill
from onestill.export.pixel import call_pipeline
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines.folder import load_stock


def test_sample_is_one_seed_per_image() -> None:
    run = finished_run()
    images = onestill.sample(run, num_images=5, seed=3, batch_size=2)
    assert images.shape == (5, 1, 8, 8) and images.dtype == torch.float32 and images.abs().max() <= 1
    one = onestill.sample(run, num_images=1, seed=5)
    # The same number sums in another order in a batch of another size.
    assert (one[0] - images[2]).abs().max() <= 1e-5
    assert (images[0] - images[1]).abs().max() > 1e-2


def test_one_seed_is_one_image_with_classes_too() -> None:
    run = finished_run("class")
    images = onestill.sample(run, num_images=6)
    assert (onestill.sample(run, num_images=1, seed=5)[0] - images[5]).abs().max() <= 1e-5


@pytest.mark.parametrize("scale", [float("nan"), -3.0, float("inf")])
def test_guidance_that_is_no_scale_is_refused_before_any_work(scale: float) -> None:
    with pytest.raises(ValueError, match="guidance_scale=.*: must be"):
        onestill.sample(teacher=teacher_folder("class"), null_class=NULL_CLASS, guidance_scale=scale)


@pytest.mark.parametrize("given", [{"solver": "heun"}, {"null_class": 1}, {"guidance_interval_max": 0.8}])
def test_what_only_a_teacher_can_do_is_refused_of_a_student(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))}=.* is for a teacher"):
        onestill.sample(finished_run("class"), **given)


def test_sample_goes_round_the_labels() -> None:
    run = finished_run("class")
    every = onestill.sample(run, num_images=4)
    assert (onestill.sample(run, num_images=4, class_labels=[0, 1, 2]) - every).abs().max() <= 1e-6
    assert (onestill.sample(run, num_images=4, class_labels=[2]) - every).abs().max() > 1e-3


def test_sample_is_what_plain_diffusers_gives() -> None:
    pipeline = load_stock(DiffusionPipeline, finished_run("class") / "pipeline")
    # Seed 7 of three classes has class 1.
    expected = call_pipeline(pipeline, range(7, 11), [1, 2, 0, 1])
    assert (onestill.sample(finished_run("class"), num_images=4, seed=7) - expected).abs().max() <= 1e-5


def test_sample_of_the_teacher_nears_its_limit_with_more_steps() -> None:
    def rows(num: int, **settings: Any) -> Tensor:
        return onestill.sample(teacher=teacher_folder(), num_images=2, num_inference_steps=num, **settings)

    limit = rows(32)
    error = [(rows(num) - limit).square().mean() for num in (1, 4, 16)]
    assert error[0] > error[1] > error[2]
    for solver in ("midpoint", "dpmsolver++"):
        assert (rows(8, solver=solver) - limit).square().mean() < error[1]


def test_sample_of_a_teacher_guided_on_an_interval() -> None:
    def rows(**settings: Any) -> Tensor:
        given = {"num_images": 3, "num_inference_steps": 4, "null_class": NULL_CLASS, **settings}
        return onestill.sample(teacher=teacher_folder("class"), **given)

    plain, everywhere = rows(guidance_scale=1), rows(guidance_scale=4)
    assert torch.equal(rows(guidance_scale=4, guidance_interval_min=0, guidance_interval_max=1), everywhere)
    found = rows(guidance_scale=4, guidance_interval_max=0.5)
    assert (found - plain).abs().max() > 1e-4 and (found - everywhere).abs().max() > 1e-4
    swept = rows(guidance_scales=(1.0, 4.0), guidance_interval_max=0.5)
    torch.testing.assert_close(swept, torch.cat([plain, found]), rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match="guidance_interval_max=0.5: w = 1 is no guidance at any level; give a guidance_scale"
    ):
        rows(guidance_interval_max=0.5)


def test_sample_takes_a_loaded_teacher() -> None:
    teacher = load_teacher(teacher_folder("class"), null_class=NULL_CLASS)
    images = onestill.sample(teacher=teacher, num_images=3, num_inference_steps=2, guidance_scale=3, class_labels=[1])
    plain = onestill.sample(teacher=teacher, num_images=3, num_inference_steps=2, class_labels=[1])
    assert images.shape == plain.shape and (images - plain).abs().max() > 1e-3
    named = onestill.sample(
        teacher=teacher_folder("class"), null_class=NULL_CLASS, num_images=3, num_inference_steps=2, guidance_scale=3,
        class_labels=[1],
    )  # fmt: skip
    assert torch.equal(named, images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "student and teacher: give one of them"),
        ({"student": "a", "teacher": "b"}, "student and teacher: give one of them"),
        ({"student": "a", "num_images": 0}, "num_images=0: must be at least 1"),
        ({"student": "a", "batch_size": -1}, "batch_size=-1: must be at least 1"),
        ({"student": "a", "device": "gpu"}, "device='gpu'"),
        ({"student": "a", "solver": "euler"}, "solver='euler': must be 'ddim', 'heun', 'midpoint' or 'dpmsolver"),
        ({"student": "a", "num_inference_steps": 9}, "a student has 1 to 8 steps"),
        ({"teacher": "a", "target_time": 0.5}, "target_time=0.5: is the student's"),
        ({"student": "no/where"}, "no such folder"),
        ({"teacher": "no where"}, "no such teacher"),
    ],
)
def test_sample_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onestill.sample(**arguments)
