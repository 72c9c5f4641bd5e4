"""Folders that look like teachers and cannot be: each is refused by name, saying what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from components import vae
from diffusers import DiTPipeline, DiTTransformer2DModel, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from pipelines import build
from vp_pipelines import cond_unet

from onestill.teachers.load import load_teacher


def refusal(pipeline: Any, folder: Path) -> str:
    pipeline.save_pretrained(folder)
    return message(folder)


def message(folder: Path) -> str:
    with pytest.raises(ValueError, match=folder.name) as caught:
        load_teacher(folder)
    return str(caught.value)


def edit_index(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("name", ["dit", "pixart-sigma", "if"])
def test_a_scheduler_of_another_kind(name: str, tmp_path: Path) -> None:
    pipeline = build(name)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert "the scheduler FlowMatchEulerDiscreteScheduler is not supported" in refusal(pipeline, tmp_path / "teacher")


def test_an_edm_scheduler_around_latents(tmp_path: Path) -> None:
    pipeline = build("sdxl-zeros")
    pipeline.scheduler = EDMEulerScheduler()
    assert "StableDiffusionXLPipeline with EDMEulerScheduler is not supported" in refusal(pipeline, tmp_path / "t")


@pytest.mark.parametrize("name", ["sd-epsilon", "sdxl-zeros", "pixart-alpha", "if"])
def test_a_missing_text_encoder(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "teacher")
    edit_index(tmp_path / "teacher", text_encoder=[None, None])
    assert "text_encoder" in message(tmp_path / "teacher")


@pytest.mark.parametrize("name", ["sdxl-zeros", "dit", "pixart-sigma", "if-super-resolution"])
def test_a_component_with_pickled_weights_only(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    build(name).save_pretrained(folder)
    part = "transformer" if (folder / "transformer").is_dir() else "text_encoder_2" if "xl" in name else "text_encoder"
    for weights in (folder / part).glob("*.safetensors"):
        weights.unlink()
    torch.save({}, folder / part / "pytorch_model.bin")
    assert f"{part}/ holds only the pickle pytorch_model.bin, which can run code when loaded" in message(folder)


def test_a_missing_folder(tmp_path: Path) -> None:
    build("pixart-alpha").save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "transformer").rename(tmp_path / "elsewhere")
    assert "the folder transformer/ (PixArtTransformer2DModel) is missing" in message(tmp_path / "teacher")


def test_an_inpainting_pipeline(tmp_path: Path) -> None:
    build("sd-epsilon").save_pretrained(tmp_path / "teacher")
    edit_index(tmp_path / "teacher", _class_name="StableDiffusionInpaintPipeline")
    text = message(tmp_path / "teacher")
    assert "a StableDiffusionInpaintPipeline cannot be a teacher: its network is given a mask" in text
    assert "9 channels" in text


def test_an_inpainting_network_in_a_plain_pipeline(tmp_path: Path) -> None:
    pipeline = build("sd-epsilon")
    pipeline.unet = cond_unet(in_channels=9)
    assert "the network takes 9 channels and returns 4" in refusal(pipeline, tmp_path / "teacher")


def test_a_dit_of_other_classes_than_its_pipeline_guides_with(tmp_path: Path) -> None:
    transformer = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    )
    pipeline = DiTPipeline(transformer, vae(), build("dit").scheduler)
    assert "the network has 10 classes, but DiTPipeline guides with label 1000" in refusal(pipeline, tmp_path / "t")


@pytest.mark.parametrize("entry", [[], ["diffusers"], ["diffusers", 3]])
@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "LattePipeline", "DDPMPipeline"])
def test_an_index_with_a_broken_entry(kind: str, entry: list[Any], tmp_path: Path) -> None:
    index = {"_class_name": kind, "_ignored": [], "unet": entry, "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    text = message(tmp_path)
    assert f"model_index.json gives 'unet' as {json.dumps(entry)}, not as [library, class]" in text and "\n" not in text
