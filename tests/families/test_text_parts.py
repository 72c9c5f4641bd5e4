"""What of a pipeline makes the conditions of a prompt, and what is known of that: its identity, its release."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from components import word_tokenizer
from pipelines import ARGUMENTS, build
from safetensors.torch import load_file, save_file
from test_conformance import conditions_of, folder_of, noise_of, perturbed
from torch import nn

import onestill
from onestill.export import export_student
from onestill.teachers import encoders
from onestill.teachers.load import load_teacher
from onestill.teachers.pipeline import PipelineTeacher


def own_teacher(name: str) -> PipelineTeacher:
    """Return a teacher that a test may change."""
    teacher = load_teacher(folder_of(name), arguments=ARGUMENTS.get(name))
    assert isinstance(teacher, PipelineTeacher)
    return teacher


def test_a_projection_is_of_the_encoders_and_leaves_with_them(tmp_path: Path) -> None:
    teacher = own_teacher("stable-audio")
    x, cond, identity = noise_of(teacher, 2), conditions_of(teacher), teacher.encoder_identity()
    assert own_teacher("stable-audio").encoder_identity() == identity
    with torch.no_grad():
        for parameter in teacher.pipeline.projection_model.parameters():
            parameter.add_(0.5)
    assert any((conditions_of(teacher)[name] - value).abs().max() > 1 for name, value in cond.items())
    assert teacher.encoder_identity() != identity

    before = teacher.denoised(x, 0.5, cond)
    teacher.release_encoders()
    assert all(getattr(teacher.pipeline, name) is None for name in ("projection_model", "text_encoder", "tokenizer"))
    assert torch.equal(teacher.denoised(x, 0.5, cond), before)
    assert export_student(perturbed(teacher), tmp_path / "out") <= 1e-4
    with pytest.raises(RuntimeError, match="were released"):
        teacher.encoder_identity()


def test_a_run_on_another_projection_is_not_gone_on_with(tmp_path: Path) -> None:
    build("stable-audio").save_pretrained(tmp_path / "t")
    (tmp_path / "p.txt").write_text("red\nblue\n")
    once: dict[str, Any] = {
        "device": "cpu",
        "train_batch_size": 2,
        "max_train_steps": 1,
        "lr_warmup_steps": 0,
        "num_teacher_steps": 2,
        "prompt_file": tmp_path / "p.txt",
        "prompt_cache_dir": tmp_path / "cache",
        "show_progress": False,
    }
    onestill.distill(tmp_path / "t", tmp_path / "run", **once)
    path = tmp_path / "t" / "projection_model" / "diffusion_pytorch_model.safetensors"
    weights = {name: value + 0.5 for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="on those of another text encoder"):
        onestill.distill(tmp_path / "t", tmp_path / "run", resume_from_checkpoint="latest", **once)


def test_words_that_diffusers_puts_before_a_prompt_are_of_the_encoder() -> None:
    lumina, sana = own_teacher("lumina2"), own_teacher("sana")
    before = lumina.encoder_identity(), sana.encoder_identity()
    lumina.pipeline.system_prompt = "Draw it."
    assert lumina.encoder_identity() != before[0]
    words = inspect.signature(type(sana.pipeline).__call__).parameters["complex_human_instruction"].default
    usual = list(words)
    try:
        words[:] = ["Draw it."]
        assert sana.encoder_identity() != before[1]
    finally:
        words[:] = usual
    assert sana.encoder_identity() == before[1]
    assert type(sana.pipeline.tokenizer) is type(word_tokenizer()), "which was watched"


def test_parts_are_all_but_what_denoises_decodes_and_finishes() -> None:
    names = ("unet", "vae", "text_encoder", "connectors", "image_encoder", "safety_checker", "watermarker")
    parts: dict[str, Any] = {name: nn.Linear(1, 1) for name in names}
    parts |= {
        "tokenizer": word_tokenizer(),
        "processor": SimpleNamespace(tokenizer=word_tokenizer()),
        "tokenizer_2": None,
    }
    parts |= {"scheduler": SimpleNamespace(), "feature_extractor": SimpleNamespace()}
    pipeline = SimpleNamespace(components=parts, **parts)
    assert set(encoders.parts(pipeline)) == {"text_encoder", "connectors", "image_encoder", "tokenizer", "processor"}
    assert set(encoders.tokenizers(pipeline)) == {"tokenizer", "processor"}
    before = encoders.identity(pipeline, ())
    with torch.no_grad():
        parts["vae"].weight.add_(1)
    assert encoders.identity(pipeline, ()) == before
    with torch.no_grad():
        parts["connectors"].weight.add_(1)
    assert encoders.identity(pipeline, ()) != before
