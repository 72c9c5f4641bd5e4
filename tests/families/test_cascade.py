"""Chains of two stages: what the first one's student draws is what the second one's teacher and student enlarge."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import build
from runs_helpers import (
    ALONE,
    Interruption,
    as_flags,
    assert_refused,
    call_cli,
    copied,
    finished_run,
    interrupt_at,
    same_state,
    session_folder,
    snapshot,
    with_places,
)
from safetensors import safe_open
from safetensors.torch import load_file
from test_conformance import folder_of, perturbed, teacher_of
from torch import Tensor
from vp_pipelines import if_parts, if_scheduler, if_unet

import onestill
from onestill.core.errors import SettingError
from onestill.core.tensors import noise
from onestill.data.cascade import FIRST_STAGE_SEED, CascadeConditions, FirstStage, open_first_stage, second_noise
from onestill.data.conditions import VALIDATION_SEED
from onestill.export.export import export_student
from onestill.runs.build import build_run
from onestill.runs.distill import make_trainer
from onestill.runs.export import export
from onestill.runs.folder import RunFolder
from onestill.runs.load import load_student
from onestill.runs.plan import measure
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines import text_encoders as encoders
from onestill.teachers.pipelines.families.deepfloyd import low_res_rows
from onestill.teachers.pipelines.teacher import PipelineTeacher
from onestill.training.config import make_config

PROMPTS = ["a photo", "a drawing of it", "red cat", "blue cat"]
LEVEL = 100
SR = "if-super-resolution"


@functools.cache
def place() -> Path:
    """Return a folder with prompts, p.txt, and the first stage's student, base/: read only."""
    folder = session_folder() / "chain"
    folder.mkdir()
    (folder / "p.txt").write_text("\n".join(PROMPTS))
    export_student(perturbed(teacher_of("if")), folder / "base")
    return folder


def settings(cache: Path, **own: Any) -> dict[str, Any]:
    base = {
        "device": "cpu",
        "train_batch_size": 4,
        **ALONE,
        "max_train_steps": 4,
        "lr_warmup_steps": 1,
        "learning_rate": 3e-3,
        "checkpointing_steps": 2,
        "validation_steps": 1000,
        "num_validation_images": 2,
        "num_teacher_steps": 2,
        "prompt_file": place() / "p.txt",
        "prompt_cache_dir": cache,
        "base_student": place() / "base",
    }
    return {**base, **own}


@functools.cache
def first_run() -> Path:
    """Return a finished run of the first stage: read only."""
    folder = session_folder() / "chain-1"
    own = {name: v for name, v in settings(folder / "cache").items() if name != "base_student"}
    onestill.distill(folder_of("if"), folder / "run", show_progress=False, **{**own, "max_train_steps": 2})
    return folder / "run"


@functools.cache
def second_run() -> Path:
    """Return a finished run of the second stage on the pictures of the first: read only."""
    folder = session_folder() / "chain-2"
    own = settings(folder / "cache", base_student=first_run(), noise_level=LEVEL, guidance_scale=2.0)
    command = ["distill", "--teacher", folder_of(SR), "--output_dir", folder / "run", *as_flags(own)]
    outcome = call_cli(*command, "--dry_run")
    assert outcome.code == 0 and not folder.exists(), outcome.err
    assert "enlarging the 8x8 pictures of run/pipeline to 16x16, noise level 100" in outcome.words
    assert (
        "warning: the pictures are enlarged 2 times; published pipelines of this kind are made for 4" in outcome.words
    )
    outcome = call_cli(*command)
    assert outcome.code == 0, outcome.err
    return folder / "run"


def prepared_chain(tmp_path: Path, **own: Any) -> Any:
    values = {"teacher": str(folder_of(SR)), "output_dir": tmp_path / "run", **settings(tmp_path / "cache", **own)}
    return build_run(make_config(values))


def some_rows(trainer: Any, num: int, *, seed: int) -> dict[str, Tensor]:
    conditions = trainer.conditions
    rows: dict[str, Tensor] = conditions.rows(conditions.choose(num, torch.Generator().manual_seed(seed)))
    return rows


def test_a_budget_counts_the_pictures_of_the_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"teacher": str(folder_of(SR)), "output_dir": tmp_path / "run", **ALONE, **settings(tmp_path / "cache")}
    drawn: list[int] = []
    pictures = FirstStage.pictures
    monkeypatch.setattr(
        FirstStage, "pictures", lambda self, eps, cond: drawn.append(len(eps)) or pictures(self, eps, cond)
    )
    speed = measure(make_config(values), teacher_of(SR))
    batch = values["train_batch_size"]
    assert speed.step > 0 and speed.encoding > 0 and drawn.count(batch) >= 4 and not (tmp_path / "run").exists()


def test_rows_hold_the_picture_of_the_same_prompt(tmp_path: Path) -> None:
    prepared = prepared_chain(tmp_path, noise_level=LEVEL)
    assert prepared.config.noise_level == LEVEL and prepared.config.base_student.is_absolute()
    trainer = make_trainer(prepared)
    assert isinstance(prepared.conditions, CascadeConditions)
    assert prepared.teacher.unguided.pipeline.text_encoder is None
    assert prepared.first_stage.teacher.pipeline.text_encoder is None

    cond = some_rows(trainer, 3, seed=7)
    generator = torch.Generator().manual_seed(7)
    prompts = [PROMPTS[i] for i in torch.randint(len(PROMPTS), (3,), generator=generator)]
    eps, blur = torch.randn(3, 3, 8, 8, generator=generator), torch.randn(3, 3, 16, 16, generator=generator)
    base, teacher = load_teacher(place() / "base"), teacher_of(SR)
    assert isinstance(base, PipelineTeacher)
    pictures = base.one_step(eps, base.encode(prompts)).clamp(-1, 1)
    expected = low_res_rows(teacher.pipeline, pictures, blur, LEVEL)
    torch.testing.assert_close(cond["low_res"], expected["low_res"], atol=1e-5, rtol=0)
    assert cond["class_labels"].tolist() == [LEVEL] * 3
    torch.testing.assert_close(
        cond["encoder_hidden_states"], teacher.encode(prompts)["encoder_hidden_states"], atol=1e-6, rtol=0
    )
    assert set(cond) == set(teacher.example_cond)
    again = some_rows(trainer, 3, seed=7)
    assert all(torch.equal(value, again[name]) for name, value in cond.items())

    # What a run shows has the pictures that `sample` draws for its seeds.
    seeds = range(VALIDATION_SEED, VALIDATION_SEED + 2)
    pictures = open_first_stage(place() / "base").seeded(seeds, PROMPTS[:2])
    expected = low_res_rows(teacher.pipeline, pictures, second_noise(seeds, (3, 16, 16)), LEVEL)
    torch.testing.assert_close(trainer.conditions.grid(2)["low_res"], expected["low_res"], atol=1e-5, rtol=0)


def test_both_guided_halves_see_the_same_picture(tmp_path: Path) -> None:
    few = {"anchor_fraction": 0.25, "anchor_solver": "midpoint", "num_anchors": 4, "num_anchor_steps": 1}
    prepared = prepared_chain(tmp_path, guidance_scale=3.0, **{**ALONE, **few})
    trainer = make_trainer(prepared)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    prepared.teacher.unguided.network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs["class_labels"], kwargs["encoder_hidden_states"])),
        with_kwargs=True,
    )
    (tmp_path / "run").mkdir()
    assert sum(num for _, num in trainer.prepare()) == 4
    trainer.update()
    assert len(seen) == 2 + 2, "two calls of a midpoint step of anchors, two of the bootstrap target"
    for sees, levels, text in seen:
        (one, two), (prompt, no_prompt) = sees[:, 3:].chunk(2), text.chunk(2)
        assert torch.equal(one, two) and levels.tolist() == [250] * len(sees)
        assert not torch.equal(prompt, no_prompt)
        assert len(torch.unique(one, dim=0)) == len(one), "a picture of its own in every row"


def test_the_cache_holds_no_pictures(tmp_path: Path) -> None:
    make_trainer(prepared_chain(tmp_path))
    shards = list((tmp_path / "cache").glob("*/*.safetensors"))
    assert len(shards) == 2, "the prompts for the teacher and those for the base student, whose encoders differ"
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert "encoder_hidden_states" in file.keys() and not {"low_res", "class_labels"} & set(file.keys())  # noqa: SIM118


def test_stages_that_share_their_encoders_encode_once(tmp_path: Path) -> None:
    from diffusers import IFPipeline

    parts = {name: getattr(build(SR), name) for name in ("text_encoder", "tokenizer")}
    IFPipeline(unet=if_unet(), scheduler=if_scheduler(), **if_parts(**parts)).save_pretrained(tmp_path / "if")
    export_student(perturbed(load_teacher(tmp_path / "if")), tmp_path / "base")
    prepared = prepared_chain(tmp_path, base_student=tmp_path / "base", empty_prompt_fraction=0.5)
    trainer = make_trainer(prepared)
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 1
    generator = torch.Generator().manual_seed(3)
    cond = some_rows(trainer, 6, seed=3)
    prompts = [PROMPTS[i] for i in torch.randint(len(PROMPTS), (6,), generator=generator)]
    empty = torch.rand(6, generator=generator) < 0.5
    assert 0 < empty.sum() < 6
    prompts = ["" if gone else prompt for prompt, gone in zip(prompts, empty, strict=True)]
    eps, blur = torch.randn(6, 3, 8, 8, generator=generator), torch.randn(6, 3, 16, 16, generator=generator)
    base = open_first_stage(tmp_path / "base")
    drawn, rows = base.teacher.pipeline, base.teacher.encode(prompts)
    pipeline = DiffusionPipeline.from_pretrained(folder_of(SR))
    pipeline.text_encoder.load_state_dict({n: v + 1 for n, v in drawn.text_encoder.state_dict().items()})
    encoders.share(pipeline, drawn)
    assert pipeline.text_encoder is not drawn.text_encoder
    pipeline = DiffusionPipeline.from_pretrained(folder_of(SR))
    encoders.share(pipeline, drawn)
    assert pipeline.text_encoder is drawn.text_encoder
    assert all(torch.equal(rows[name], value) for name, value in base.teacher.encode(prompts).items())
    expected = low_res_rows(teacher_of(SR).pipeline, base.pictures(eps, base.teacher.encode(prompts)), blur, 250)
    torch.testing.assert_close(cond["low_res"], expected["low_res"], atol=1e-5, rtol=0)


def test_resume_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    own = settings(tmp_path / "cache", guidance_scale=2.0)
    whole = onestill.distill(folder_of(SR), tmp_path / "whole", show_progress=False, **own)
    with pytest.raises(Interruption):
        onestill.distill(folder_of(SR), tmp_path / "cut", show_progress=False, on_step=interrupt_at(3), **own)
    moved = copied(place() / "base", tmp_path / "moved")
    again = {**own, "base_student": moved, "resume_from_checkpoint": "latest"}
    resumed = onestill.distill(folder_of(SR), tmp_path / "cut", show_progress=False, **again)
    assert whole.checkpoint is not None and resumed.checkpoint is not None
    assert same_state(whole.checkpoint, resumed.checkpoint)
    for change, words in (
        ({"base_student": first_run()}, "was trained on the pictures of another student"),
        ({"noise_level": 90}, "noise_level: 250 -> 90"),
    ):
        with pytest.raises(ValueError, match=words):
            onestill.distill(folder_of(SR), tmp_path / "cut", show_progress=False, **{**again, **change})


def images_of(tmp_path: Path, student: Path, *flags: object) -> Tensor:
    path = tmp_path / "images.safetensors"
    asked = ["--prompt", "red cat", "--prompt", "a photo", "--num_images", 3, "--seed", 5, "--overwrite"]
    outcome = call_cli("sample", "--student", student, *asked, "--output", path, "--device", "cpu", *flags)
    assert outcome.code == 0, outcome.err
    return load_file(path)["images"]


def test_sample_is_what_stock_diffusers_draws(tmp_path: Path) -> None:
    run, prompts = second_run(), ["red cat", "a photo", "red cat"]
    common = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt", "clean_caption": False}

    def generators(first: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(first + i) for i in range(3)]

    base, pipe = (DiffusionPipeline.from_pretrained(folder / "pipeline") for folder in (first_run(), run))
    small = base(prompts, generator=generators(5 + FIRST_STAGE_SEED), **common).images.clamp(-1, 1)
    theirs = pipe(prompts, image=small, noise_level=LEVEL, generator=generators(5), **common).images.clamp(-1, 1)
    ours = images_of(tmp_path, run)
    assert ours.shape == (3, 3, 16, 16)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(images_of(tmp_path, run, "--batch_size", 1), ours, atol=1e-4, rtol=0)
    torch.testing.assert_close(images_of(tmp_path, run / "checkpoint-4"), ours, atol=1e-4, rtol=0)
    # Its scheduler adds 1e-10 times some noise of the global random state.
    torch.testing.assert_close(images_of(tmp_path, run / "pipeline"), ours, atol=1e-6, rtol=0)
    # The exported folder alone: who draws, it must be told; how much noise, its card says.
    alone = copied(run / "pipeline", tmp_path / "alone")
    torch.testing.assert_close(images_of(tmp_path, alone, "--base_student", first_run()), ours, atol=1e-6, rtol=0)
    other = pipe(prompts, image=small.flip(0), noise_level=LEVEL, generator=generators(5), **common).images
    assert (other.clamp(-1, 1) - ours).abs().max() > 1e-3, "the picture must matter for this to be a test"


def test_a_base_student_that_moved_or_changed(tmp_path: Path) -> None:
    base, cache = copied(first_run(), tmp_path / "one"), tmp_path / "cache"
    own = settings(cache, base_student=base, max_train_steps=1, lr_warmup_steps=0)
    onestill.distill(folder_of(SR), tmp_path / "two", show_progress=False, **own)
    expected = images_of(tmp_path, tmp_path / "two")
    base.rename(tmp_path / "moved")
    flags = ["sample", "--student", tmp_path / "two", "--prompt", "it", "--output", tmp_path / "x.png"]
    outcome = call_cli(*flags)
    assert (
        outcome.code == 2
        and "which is not there any more; say where it is" in outcome.words
        and "--base_student" in outcome.words
    )
    again = images_of(tmp_path, tmp_path / "two", "--base_student", tmp_path / "moved")
    torch.testing.assert_close(again, expected, atol=1e-6, rtol=0)
    assert export(tmp_path / "two", tmp_path / "out", device="cpu") <= 1e-4
    shutil.copytree(place() / "base", base)
    outcome = call_cli(*flags)
    assert outcome.code == 2 and "it has changed since" in outcome.words
    # What is written does not depend on its pictures.
    assert export(tmp_path / "two", tmp_path / "out-2", device="cpu") <= 1e-4
    with pytest.warns(UserWarning, match="trained on the pictures of another student"):
        onestill.sample(tmp_path / "two", prompts=["it"], num_images=1, base_student=base, device="cpu")


def test_evaluation_counts_one_call_for_each_stage() -> None:
    few = ["--num_samples", 10, "--steps", "2,1", "--num_reference_steps", 2, "--device", "cpu", "--batch_size", 5]
    outcome = call_cli("evaluate", "--student", second_run(), *few, "--json", "--overwrite")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert [row["network_evaluations"] for row in report["rows"]] == [2 * 2 + 1, 2 * 1 + 1, 2]
    assert [row["num_steps"] for row in report["rows"]] == [2, 1, 1]
    assert "every row enlarges what run/pipeline draws in one step" in report["protocol"]["notes"][1]

    source = load_student(second_run()).sampler
    calls = []
    assert source.first_stage is not None
    # After each pass: those that only show what a prompt becomes end before it.
    source.first_stage.teacher.network.register_forward_hook(lambda *_: calls.append("base"))  # type: ignore[attr-defined]
    source(noise(range(2), source.sample_shape), source.conditions(2, prompts=["it"]))
    assert calls == ["base"]


def test_a_first_stage_is_evaluated_on_its_teachers_features(tmp_path: Path) -> None:
    few = ["--num_samples", 10, "--steps", "1", "--num_reference_steps", 2, "--device", "cpu", "--batch_size", 5]
    outcome = call_cli("evaluate", "--student", first_run(), *few, "--json", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    extractor = json.loads(outcome.out)["protocol"]["extractor"]
    assert "the teacher's own mid_block" in extractor and "latents" not in extractor
    assert not any(teacher_of(name).has_decoder for name in ("if", SR)) and teacher_of("sd-epsilon").has_decoder
    # A teacher's row is thresholded and clamped as the student's is.
    source = onestill.load_sampler(teacher=folder_of("if"), num_inference_steps=1, device="cpu")
    assert not source.has_decoder and not source.gives_latents
    images = source(3 * noise(range(2), source.sample_shape), source.conditions(2, prompts=["it"]))
    assert images.abs().max() <= 1


def test_a_base_students_fingerprint_is_of_its_decoder_too() -> None:
    teacher = load_teacher(folder_of("sd-epsilon"))
    assert isinstance(teacher, PipelineTeacher)
    one, same, other = (FirstStage(teacher, Path()) for _ in range(3))
    assert one.fingerprint == same.fingerprint
    with torch.no_grad():
        teacher.pipeline.vae.decoder.conv_out.weight.mul_(2)
    assert other.fingerprint != one.fingerprint


def test_a_teacher_enlarges_what_the_base_student_draws() -> None:
    common: dict[str, Any] = {"teacher": folder_of(SR), "prompts": ["it"], "num_images": 2, "num_inference_steps": 2}
    images = onestill.sample(base_student=place() / "base", **common)
    other = onestill.sample(base_student=place() / "base", noise_level=0, **common)
    assert images.shape == (2, 3, 16, 16) and (images - other).abs().max() > 1e-4


def test_a_chain_at_another_size(tmp_path: Path) -> None:
    first = {name: v for name, v in settings(tmp_path / "cache").items() if name != "base_student"}
    small: dict[str, Any] = {"max_train_steps": 1, "lr_warmup_steps": 0, "show_progress": False}
    onestill.distill(folder_of("if"), tmp_path / "one", height=16, width=16, **{**first, **small})
    assert open_first_stage(tmp_path / "one").shape == (3, 16, 16)
    own = {**settings(tmp_path / "cache", base_student=tmp_path / "one"), **small}
    result = onestill.distill(folder_of(SR), tmp_path / "two", height=32, width=32, **own)
    assert result.export_error is not None and result.export_error <= 1e-4
    both = [
        onestill.sample(student, prompts=["it"], num_images=1, device="cpu")
        for student in (tmp_path / "two", tmp_path / "two" / "checkpoint-1")
    ]
    assert both[0].shape == (1, 3, 32, 32)
    torch.testing.assert_close(*both, atol=1e-4, rtol=0)
    few: dict[str, Any] = {"num_samples": 10, "steps": (1,), "num_reference_steps": 1, "speed": False}
    assert len(onestill.evaluate(tmp_path / "two", device="cpu", **few).rows) == 2


def test_playing_with_a_chain(tmp_path: Path) -> None:
    source = onestill.load_sampler(second_run(), device="cpu")
    same = onestill.fixed_noise(source, prompts=["it", "it", "red cat"]).images[0]
    torch.testing.assert_close(same[0], same[1], atol=1e-6, rtol=0)  # the same small picture, too
    assert (same[0] - same[2]).abs().max() > 1e-4
    sheet = onestill.student_trajectory(source, [0.5, 0.0], prompts=["it"], num_images=2)
    torch.testing.assert_close(sheet.images[:, 1], source(noise(range(2), source.sample_shape),
                               source.conditions(2, prompts=["it"])), atol=1e-4, rtol=0)  # fmt: skip
    command = ["sample", "--student", second_run(), "--prompt", "it", "--interpolate", 3, "--to_seed", 1]
    outcome = call_cli(*command, "--output", tmp_path / "x.png")
    assert outcome.code == 2 and "enlarges the pictures of run/pipeline" in outcome.words


def test_a_chain_says_what_is_cut() -> None:
    run = second_run()
    for student in (run, run / "checkpoint-4"):
        source = onestill.load_sampler(student, device="cpu")
        (limit,) = source.prompt_limits
        fits, long = (" ".join("a" * num) for num in (limit.room - 1, limit.room + 1))
        assert source.warnings([fits]) == []
        (warning,) = source.warnings([fits, long])
        assert f"1 prompt is longer than the {limit.room} tokens" in warning


def test_the_export_is_checked_on_real_pictures_and_says_how_to_call_it(tmp_path: Path) -> None:
    card = (second_run() / "pipeline" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "image=small, num_inference_steps=1, guidance_scale=1.0, noise_level=100" in block
    block = block.replace("path/to/the/student/of/the/first/stage", str(first_run() / "pipeline"))
    found: dict[str, Any] = {}
    exec(block.replace("path/to/this/folder", str(second_run() / "pipeline")), found)
    assert found["images"][0].size == (16, 16)

    prepared = prepared_chain(tmp_path, lora_rank=2)
    assert torch.equal(
        prepared.teacher.unguided.image_condition.example(prepared.teacher.unguided.pipeline, 3)[2],
        prepared.first_stage.examples[0],
    )
    assert any("merged student alone" in message for message in prepared.messages) == (
        not hasattr(prepared.teacher.unguided.pipeline, "load_lora_weights")
    )
    assert export_student(prepared.student, tmp_path / "out") <= 1e-4


def test_a_second_stage_in_several_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "is_map", True)
    for run, name in ((first_run(), "first"), (second_run(), "second")):
        assert export(run, tmp_path / name, num_inference_steps=2) <= 1e-4
    ours = images_of(tmp_path, second_run(), "--num_inference_steps", 2)
    theirs = images_of(tmp_path, tmp_path / "second", "--base_student", first_run())
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert (images_of(tmp_path, second_run()) - ours).abs().max() > 1e-3
    found = load_student(tmp_path / "second", base_student=first_run()).sampler
    assert (found.num_steps, found.evaluations) == (2, 3)
    with pytest.raises(SettingError, match="base_student=.*was exported for 2 steps, and a first stage draws in one"):
        load_student(tmp_path / "second", base_student=tmp_path / "first")


def test_inspect_says_what_is_enlarged() -> None:
    command = ["inspect", "--teacher", folder_of(SR), "--device", "cpu", "--json"]
    found = json.loads(call_cli(*command).out)
    assert found["enlarges"] == "a picture to enlarge"
    assert "--base_student" in call_cli(*command[:-1]).out
    chained = json.loads(call_cli(*command, "--base_student", place() / "base").out)
    assert chained["enlarges"] == "8x8 pictures of chain/base to enlarge, noise level 250"
    assert chained["estimated_memory_gb"] > found["estimated_memory_gb"]


D = "distill --output_dir run --device cpu --prompt_cache_dir cache --prompt_file p.txt "
BAD = [
    ("no base", D + "--teacher SR", "IFSuperResolutionPipeline enlarges the picture of an earlier model"),
    ("base for a first stage", D + "--teacher IF --base_student BASE", "this teacher takes no picture; leave it out"),
    ("level for a first stage", D + "--teacher IF --noise_level 5", "--noise_level 5: this teacher takes no"),
    ("level below", D + "--teacher SR --base_student BASE --noise_level -1", "--noise_level -1: must be at least 0"),
    ("level above", D + "--teacher SR --base_student BASE --noise_level 1000", "--noise_level 1000: this IFSuperResolutionPipeline knows the levels 0 to 999"),
    ("no folder", D + "--teacher SR --base_student nowhere", "--base_student nowhere: no such folder"),
    ("empty folder", D + "--teacher SR --base_student empty", "--base_student empty: holds no exported pipeline"),
    ("unfinished run", D + "--teacher SR --base_student RUN1/checkpoint-2", "checkpoint-2: holds no exported pipeline"),
    ("a teacher", D + "--teacher SR --base_student IF", "IFPipeline of many steps, no one-step student"),
    ("a second stage", D + "--teacher SR --base_student RUN2", "needs a picture itself"),
    ("labels", D + "--teacher SR --base_student LABELS", "takes no text, and the teacher takes prompts"),
    ("no text", D + "--teacher SR --base_student PLAIN", "takes no text, and the teacher takes prompts"),
    ("another size", D + "--teacher SR --base_student LARGE", "draws pictures of 16x16, and the teacher makes 16x16 of smaller ones, such as 4x4 or 8x8"),
    ("sample of a folder alone", "sample --output x.png --prompt it --student ALONE", "name the student that draws them with --base_student"),
    ("sample of a first stage", "sample --output x.png --prompt it --student RUN1 --base_student BASE", "enlarges no picture; leave it out"),
    ("sample of a student with a level", "sample --output x.png --prompt it --student RUN2 --noise_level 3", "--noise_level 3: is for a teacher"),
    ("sample of a teacher alone", "sample --output x.png --prompt it --teacher SR", "distil the earlier model first, and give that run"),
    ("evaluate with the other stage", "evaluate --num_samples 10 --output out --student RUN2 --teacher IF", ": makes samples of shape (3, 8, 8)"),
]  # fmt: skip


@functools.cache
def large_base() -> Path:
    from diffusers import IFPipeline

    folder = session_folder() / "chain-large"
    IFPipeline(unet=if_unet(sample_size=16), scheduler=if_scheduler(), **if_parts()).save_pretrained(folder / "if")
    export_student(perturbed(load_teacher(folder / "if")), folder / "base")
    return folder / "base"


@pytest.mark.parametrize(("name", "command", "words"), BAD, ids=[name for name, *_ in BAD])
def test_bad_input(name: str, command: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("red\nblue\n")
    (tmp_path / "empty").mkdir()
    names: dict[str, Callable[[], object]] = {
        "SR": lambda: folder_of(SR),
        "IF": lambda: folder_of("if"),
        "BASE": lambda: place() / "base",
        "RUN1": first_run,
        "RUN2": second_run,
        "LARGE": large_base,
        "LABELS": lambda: finished_run("class"),
        "PLAIN": finished_run,
        "ALONE": lambda: copied(second_run() / "pipeline", tmp_path / "alone"),
    }
    parts = with_places(command, names)
    before = snapshot(tmp_path)
    assert_refused(call_cli(*parts), words)
    assert snapshot(tmp_path) == before
