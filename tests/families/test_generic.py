"""Pipelines that no family names: those that fit are covered by the conformance suite, these do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from unnamed_pipelines import REFUSED

from onestill.teachers.load import load_teacher


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_fit_is_refused_saying_why(name: str, tmp_path: Path) -> None:
    builder, arguments, message = REFUSED[name]
    torch.manual_seed(0)
    pipeline = builder()
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"a {type(pipeline).__name__} cannot be a teacher: .*{message}"):
        load_teacher(tmp_path, arguments=arguments)


def test_a_cascade_is_refused_by_its_parts(tmp_path: Path) -> None:
    parts = {"decoder": ["stable_cascade", "StableCascadeUNet"], "vqgan": ["stable_cascade", "PaellaVQModel"]}
    index = {"_class_name": "StableCascadeDecoderPipeline", **parts}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="one network named unet or transformer, .* has decoder, vqgan.*cascade"):
        load_teacher(tmp_path)


def test_an_unknown_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(ValueError, match="a NoSuchPipeline cannot be a teacher: diffusers .* has no such pipeline"):
        load_teacher(tmp_path)
