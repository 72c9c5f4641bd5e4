"""Weights as people store them: in half precision, as a variant, in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipelines import ARGUMENTS, build
from torch import nn

from onestill.core.files import variant_of
from onestill.export.export import export_student
from onestill.sampling.samplers.pipeline import open_pipeline
from onestill.students.student import Student
from onestill.teachers.load import load_teacher


def dtypes(pipeline: Any) -> set[torch.dtype]:
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return {value.dtype for part in parts for value in part.state_dict().values() if value.is_floating_point()}


def halved(name: str, dtype: torch.dtype = torch.float16) -> Any:
    pipeline = build(name)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(dtype)
    return pipeline


NAMES = ["sd-epsilon", "sdxl-zeros", "sd3", "flux", "pixart-sigma", "sana", "wan", "if", "stable-audio"]


@pytest.mark.parametrize("name", NAMES)
def test_each_part_is_loaded_in_a_chosen_precision(name: str, tmp_path: Path) -> None:
    halved(name, torch.bfloat16).save_pretrained(tmp_path / "t")
    teacher = load_teacher(tmp_path / "t", arguments=ARGUMENTS.get(name, {}))
    assert dtypes(teacher.pipeline) == {torch.float32}
    if name in ("sd-epsilon", "wan"):
        assert export_student(Student(teacher), tmp_path / "out") <= 1e-4
        assert dtypes(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")) == {torch.float32}


def test_parts_of_several_precisions(tmp_path: Path) -> None:
    pipeline = build("sd-epsilon")
    pipeline.text_encoder.to(torch.bfloat16)
    pipeline.vae.to(torch.float64)
    pipeline.unet.to(torch.float16)
    pipeline.save_pretrained(tmp_path / "t")
    assert dtypes(load_teacher(tmp_path / "t").pipeline) == {torch.float32}


@pytest.mark.parametrize("stored", [{}, {"variant": "fp16", "max_shard_size": "8KB"}])
def test_an_export_that_was_saved_again_in_half_is_drawn(stored: dict[str, str], tmp_path: Path) -> None:
    build("sd-epsilon").save_pretrained(tmp_path / "t")
    export_student(Student(load_teacher(tmp_path / "t")), tmp_path / "out")
    half = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out").to(torch.float16)
    half.save_pretrained(tmp_path / "half", **stored)
    sampler = open_pipeline(tmp_path / "half", torch.device("cpu"))
    assert dtypes(sampler.pipeline) == {torch.float32}


def test_a_network_in_pixels_in_half(uncond_teacher_folder: Path) -> None:
    folder = uncond_teacher_folder / "unet"
    diffusers.UNet2DModel.from_pretrained(folder).to(torch.float16).save_pretrained(folder)
    teacher = load_teacher(uncond_teacher_folder)
    assert {value.dtype for value in teacher.network.parameters()} == {torch.float32}


def test_stable_diffusion_3_without_its_third_encoder_is_not_blamed_for_another_error(tmp_path: Path) -> None:
    import flow_pipelines

    flow_pipelines.stable_diffusion_3(third=False).save_pretrained(tmp_path / "t")
    config = tmp_path / "t" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 64}))
    with pytest.raises(ValueError, match="Height") as caught:
        load_teacher(tmp_path / "t")
    assert "text_encoder_3" not in str(caught.value)


# Variants


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model-00001-of-00005.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00005.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.non_ema.safetensors", "non_ema"),
    ],
)
def test_the_variant_in_a_name(name: str, variant: str | None) -> None:
    assert variant_of(name) == variant


@pytest.mark.parametrize("name", ["sd-epsilon", "wan"])
def test_shards_of_a_variant(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "t", variant="fp16", max_shard_size="8KB")
    assert list((tmp_path / "t").rglob("*.fp16-00001-of-*.safetensors"))
    arguments = ARGUMENTS.get(name, {})
    teacher = load_teacher(tmp_path / "t", variant="fp16", arguments=arguments)
    build(name).save_pretrained(tmp_path / "whole")
    assert teacher.fingerprint() == load_teacher(tmp_path / "whole", arguments=arguments).fingerprint()
    with pytest.raises(ValueError, match=r"variant: \w+/ holds .*; give variant fp16$"):
        load_teacher(tmp_path / "t", arguments=arguments)
    with pytest.raises(ValueError, match=r"variant.*bf16.*: \w+/ holds .*; give variant fp16$"):
        load_teacher(tmp_path / "t", variant="bf16", arguments=arguments)


def test_shards_of_a_variant_in_pixels(uncond_teacher_folder: Path) -> None:
    folder = uncond_teacher_folder / "unet"
    network = diffusers.UNet2DModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    network.save_pretrained(folder, variant="fp16", max_shard_size="8KB")
    assert load_teacher(uncond_teacher_folder, variant="fp16").spec.sample_shape == (1, 8, 8)
