"""What of a pipeline makes the conditions of a prompt: its identity, its release, and where it cuts a prompt."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from components import word_tokenizer
from pipelines import ARGUMENTS, build
from runs_helpers import ALONE
from safetensors.torch import load_file, save_file
from test_conformance import conditions_of, folder_of, noise_of, perturbed, teacher_of
from torch import nn

import onestill
from onestill.core.errors import named
from onestill.export.export import export_student
from onestill.runs.build import build_run
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines import text_encoders as encoders
from onestill.teachers.pipelines import token_limits
from onestill.teachers.pipelines.teacher import PipelineTeacher
from onestill.training.config import make_config


def own_teacher(name: str) -> PipelineTeacher:
    """Return a teacher that a test may change."""
    teacher = load_teacher(folder_of(name), arguments=ARGUMENTS.get(name))
    assert isinstance(teacher, PipelineTeacher)
    return teacher


def settings(folder: Path, **own: Any) -> dict[str, Any]:
    base = {
        "device": "cpu",
        "train_batch_size": 2,
        **ALONE,
        "max_train_steps": 1,
        "lr_warmup_steps": 0,
        "num_teacher_steps": 2,
        "prompt_file": folder / "p.txt",
        "prompt_cache_dir": folder / "cache",
    }
    return {**base, **own}


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
    once = {**settings(tmp_path), "show_progress": False}
    onestill.distill(tmp_path / "t", tmp_path / "run", **once)
    path = tmp_path / "t" / "projection_model" / "diffusion_pytorch_model.safetensors"
    weights = {name: value + 0.5 for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="on those of another text encoder"):
        onestill.distill(tmp_path / "t", tmp_path / "run", resume_from_checkpoint="latest", **once)


@pytest.mark.parametrize(
    ("name", "arguments", "same"),
    [
        ("sd-epsilon", {"height": 32, "width": 16}, True),
        ("sd3", {"height": 32, "width": 16}, True),
        ("flux", {"height": 32, "width": 32}, True),
        ("wan", {"num_frames": 9}, True),
        ("sdxl-zeros", {"height": 32, "width": 32}, False),
        ("stable-audio", {"audio_end_in_s": 0.5}, False),
        ("sana", {"max_sequence_length": 24}, False),
    ],
)
def test_a_size_is_of_the_encoder_where_it_is_in_the_conditions(
    name: str, arguments: dict[str, Any], same: bool
) -> None:
    usual, other = own_teacher(name), load_teacher(folder_of(name), arguments={**ARGUMENTS.get(name, {}), **arguments})
    assert isinstance(other, PipelineTeacher)
    assert not same or other.spec.sample_shape != usual.spec.sample_shape, "otherwise nothing is tried"
    assert (other.encoder_identity() == usual.encoder_identity()) is same
    one, two = (teacher.prompt_rows(teacher.encode(["red", "a blue b"])) for teacher in (usual, other))
    assert same == (
        one.keys() == two.keys() and all(v.shape == two[k].shape and torch.equal(v, two[k]) for k, v in one.items())
    )


def test_teachers_that_share_their_encoders_share_their_prompts(tmp_path: Path) -> None:
    pipeline = build("sd-epsilon")
    for name in ("one", "two"):
        with torch.no_grad():
            pipeline.unet.conv_in.weight.mul_(0.5)
        pipeline.save_pretrained(tmp_path / name)
    config = tmp_path / "two" / "unet" / "config.json"
    config.write_text(config.read_text().replace('"norm_eps": 1e-05', '"norm_eps": 2e-05'))
    assert '"norm_eps": 2e-05' in config.read_text()
    (tmp_path / "p.txt").write_text("red\nblue\n")
    found = []
    for name in ("one", "two"):
        values = {**settings(tmp_path), "teacher": str(tmp_path / name), "output_dir": tmp_path / f"run-{name}"}
        found.append(" ".join(build_run(make_config(values)).messages))
        onestill.distill(tmp_path / name, tmp_path / f"run-{name}", show_progress=False, **settings(tmp_path))
    assert "2 to encode" in found[0] and "all encoded already" in found[1]


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


# Where prompts are cut

# Words that fit, behind what the pipeline puts before them, beside the tokens that begin and end a text: by encoder.
FIT = {
    "sd-epsilon": [("text_encoder", 6)],
    "sdxl-zeros": [("text_encoder, text_encoder_2", 6)],
    "sd3": [("text_encoder, text_encoder_2", 6), ("text_encoder_3", 255)],
    "sd3-two-encoders": [("text_encoder, text_encoder_2", 6)],
    "flux": [("text_encoder", 6), ("text_encoder_2", 15)],
    "if": [("text_encoder", 76)],
    "if-super-resolution": [("text_encoder", 76)],
    "pixart-sigma": [("text_encoder", 299)],
    "lumina2": [("text_encoder", 255 - 30)],
    "sana": [("text_encoder", 298)],
    "wan": [("text_encoder", 15)],
    "stable-audio": [("text_encoder", 15)],
    "unnamed-auraflow": [("text_encoder", 15)],
}


@pytest.mark.parametrize("name", FIT)
def test_prompts_are_cut_where_the_pipeline_cuts_them(name: str) -> None:
    teacher = teacher_of(name)
    assert [", ".join(limit.encoders) for limit in teacher.prompt_limits] == [encoder for encoder, _ in FIT[name]]
    for place, (_, fit) in enumerate(FIT[name]):
        for num, is_cut in ((fit, False), (fit + 1, True)):
            prompt = " ".join("a" * num)
            assert teacher.exceeded_limits([prompt, ""]) == [2**place - 1 + (2**place if is_cut else 0), 0], num
            with token_limits.listening(teacher.pipeline) as seen:
                teacher.encode([prompt])
            names = {name.replace("text_encoder", "tokenizer") for name in teacher.prompt_limits[place].encoders}
            calls = [call for call in seen if call.name in names and call.most is not None]
            assert calls
            for call in calls:
                (row,) = call.tokenizer(list(call.texts), verbose=False).input_ids
                assert (len(row) > call.most) == is_cut


def test_the_warning_names_the_encoder_that_cuts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(" ".join("a" * num) for num in (6, 7, 8, 300)))
    values = settings(tmp_path, max_train_steps=3, teacher=str(folder_of("sd3")), output_dir=tmp_path / "run")
    expected = [
        "warning: 3 prompts are longer than the 8 tokens text_encoder and text_encoder_2 take; they cut them",
        "warning: 1 prompt is longer than the 256 tokens text_encoder_3 takes; it cuts it",
    ]
    for _ in range(2):  # counted when they are encoded, and when they come from the cache
        prepared = build_run(make_config(values))
        assert [message for message in prepared.messages if "longer" in message] == expected
        assert prepared.prompts is not None
        prepared.prompts.encode()


def test_the_pipelines_number_counts_and_not_the_tokenizers(tmp_path: Path) -> None:
    pipeline = build("if")
    pipeline.tokenizer = word_tokenizer(512)
    pipeline.save_pretrained(tmp_path / "t")
    (tmp_path / "p.txt").write_text("\n".join(" ".join("a" * num) for num in (76, 77, 100)))
    values = settings(tmp_path, max_train_steps=3, teacher=str(tmp_path / "t"), output_dir=tmp_path / "run")
    said = build_run(make_config(values)).messages
    assert "warning: 2 prompts are longer than the 77 tokens the text encoder takes; it cuts them" in said


def test_a_negative_prompt_has_the_limit_of_no_prompt(tmp_path: Path) -> None:
    # Lumina 2 puts its words before a prompt and none before a negative one.
    (tmp_path / "p.txt").write_text("red\nblue\n")
    values = settings(tmp_path, guidance_scale=2.0, teacher=str(folder_of("lumina2")), output_dir=tmp_path / "run")
    for num, is_cut in ((255, False), (256, True)):
        said = build_run(make_config({**values, "negative_prompt": " ".join("a" * num)})).messages
        assert (f"warning: {named('negative_prompt')} is longer than 256 tokens and is cut" in said) == is_cut
