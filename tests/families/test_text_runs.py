"""Whole runs of a text teacher: from the command line and a prompt file to an exported folder that takes prompts."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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
    snapshot,
    teacher_folder,
    with_places,
)
from safetensors.torch import load_file, save_file

import onestill
from onestill.core.files import MARK_FILE
from onestill.data.prompt_pool import choose
from onestill.evaluation.comparison import NO_KERNEL
from onestill.export.export import ExportError, export_student
from onestill.objectives.anchors import Anchors
from onestill.objectives.pool import Pool
from onestill.runs.build import build_run
from onestill.runs.distill import make_trainer
from onestill.students import model_card as card
from onestill.students.student import Student
from onestill.teachers.load import load_teacher
from onestill.teachers.pipelines.teacher import PipelineTeacher
from onestill.training.config import make_config
from onestill.training.trainer import Trainer

PROMPTS = [f"{word} {letter}" for word in ("red", "blue") for letter in "abcdefghij"]


@functools.cache
def place() -> Path:
    """Return a folder with a teacher, t/, and a prompt file, p.txt: read only."""
    folder = Path(tempfile.mkdtemp(prefix="onestill-text-"))
    build("sd-epsilon").save_pretrained(folder / "t")
    (folder / "p.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
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
    }
    return {**base, **own}


@functools.cache
def text_run() -> Path:
    """Return a finished run with guidance and a negative prompt: read only."""
    folder = Path(tempfile.mkdtemp(prefix="onestill-text-run-"))
    own = {"guidance_scale": 2.0, "negative_prompt": "blue", "empty_prompt_fraction": 0.2}
    outcome = call_cli(
        "distill", "--teacher", place() / "t", "--output_dir", folder / "run", *as_flags(settings(folder / "cache", **own))
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "20 prompts (1 repeated), of which the run draws from 16" in outcome.words, outcome.words
    assert "truncated" not in outcome.err
    return folder / "run"


@functools.cache
def exported_alone() -> Path:
    """Return that run's exported folder, taken out of it: read only."""
    return copied(text_run() / "pipeline", Path(tempfile.mkdtemp(prefix="onestill-text-alone-")) / "pipeline")


def test_the_whole_way(tmp_path: Path) -> None:
    run = copied(text_run(), tmp_path / "run")
    images = []
    for i, student in enumerate((run, run / "checkpoint-4", run / "pipeline")):
        path = tmp_path / f"{i}.safetensors"
        flags = ["--prompt", "red a", "--prompt", "blue b", "--num_images", 3, "--seed", 5, "--output", path]
        outcome = call_cli("sample", "--student", student, *flags)
        assert outcome.code == 0, outcome.err
        images.append(load_file(path)["images"])
    assert images[0].shape == (3, 3, 16, 16) and images[0].abs().max() <= 1
    assert (images[1] - images[0]).abs().max() <= 1e-4 and torch.equal(images[2], images[0])
    assert call_cli("sample", "--student", run, "--prompt", "it", "--output", tmp_path / "x.png").code == 0

    few = ["--num_samples", 10, "--steps", "2,1", "--num_reference_steps", 2, "--device", "cpu", "--batch_size", 5]
    outcome = call_cli("evaluate", "--student", run, *few, "--json")
    assert outcome.code == 0, outcome.err
    protocol = json.loads(outcome.out)["protocol"]
    assert "mid_block of latents" in protocol["extractor"]
    assert protocol["notes"] == ["prompts: 20 of p.txt, in turn", NO_KERNEL]
    assert protocol["guidance_scale"] == 2
    assert (run / "evaluation" / "samples.png").is_file()

    said = (run / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-to-image" in said and "library_name: diffusers" in said
    assert 'pipe("a photo of a cat", num_inference_steps=1, guidance_scale=1.0).images' in said
    assert json.loads(outcome.out)["rows"][0]["name"] in said
    outcome = call_cli("export", "--student", run / "checkpoint-2", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err


def test_an_exported_folder_says_its_guidance_and_is_evaluated_with_it(tmp_path: Path) -> None:
    folder = copied(text_run() / "pipeline", tmp_path / "out")
    said = (folder / "README.md").read_text(encoding="utf-8")
    assert "w = 2 in u + w (c - u), away from the negative prompt 'blue'" in said and "onestill_null_class" not in said
    assert card.distilled(folder) == card.Distilled(2.0, "blue")
    few: dict[str, Any] = {"num_samples": 10, "steps": [2], "num_reference_steps": 2, "speed": False}
    few |= {"prompts": PROMPTS[:2], "device": "cpu"}
    inside = onestill.evaluate(text_run(), **few)
    for student, teacher in ((folder, place() / "t"), (text_run() / "pipeline", None)):
        report = onestill.evaluate(student, teacher=teacher, **few)
        assert report.protocol.guidance_scale == 2
        for one, other in zip(report.rows, inside.rows, strict=True):
            assert one.frechet_distance == pytest.approx(other.frechet_distance, rel=1e-3)
    unlike = onestill.evaluate(folder, teacher=place() / "t", negative_prompt="red a", **few)
    assert unlike.rows[0].frechet_distance != pytest.approx(inside.rows[0].frechet_distance, rel=1e-3)


def test_students_and_teachers_are_not_taken_for_each_other() -> None:
    sample = ("sample", "--prompt", "a", "--num_images", 1, "--output", place() / "x.png")
    outcome = call_cli(*sample, "--student", place() / "t")
    assert outcome.code == 2 and "it is a pipeline of many steps, no one-step student" in outcome.words
    outcome = call_cli(*sample, "--teacher", text_run() / "pipeline")
    assert outcome.code == 2 and "pipeline: is a one-step student" in outcome.words
    assert not (place() / "x.png").exists()


def hub_with(files: dict[str, str], snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub have the teacher as "owner/name", with some files that come only if they are asked for."""
    copied(place() / "t", snapshot)

    def fetch(_source: str, name: str, **_: Any) -> str:
        (snapshot / name).write_text(files[name])
        return str(snapshot / name)

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)


def test_a_student_of_the_hub_is_known_by_its_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = (text_run() / "pipeline" / MARK_FILE).read_text()
    hub_with({MARK_FILE: mark}, tmp_path / "snapshot", monkeypatch)
    with pytest.raises(ValueError, match="owner/name.*is a one-step student"):
        onestill.distill("owner/name", tmp_path / "run", show_progress=False, **settings(tmp_path / "cache"))


def test_the_license_of_a_teacher_of_the_hub_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_with({"README.md": "---\nlicense: mit\n---\n"}, tmp_path / "snapshot", monkeypatch)
    result = onestill.distill("owner/name", tmp_path / "run", show_progress=False, **settings(tmp_path / "cache"))
    assert result.pipeline is not None
    said = (result.pipeline / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in said and "base_model: owner/name" in said and str(tmp_path) not in said


def test_one_seed_is_one_image_in_any_batch_and_a_prompt_matters() -> None:
    for source in (text_run(), text_run() / "checkpoint-4"):
        together = onestill.sample(source, prompts=["red a", "blue b"], num_images=4)
        alone = onestill.sample(source, prompts=["red a", "blue b"], num_images=4, batch_size=1)
        assert (together - alone).abs().max() <= 1e-4
        again = onestill.sample(source, prompts=["blue b"], num_images=1, seed=1)
        assert (again[0] - together[1]).abs().max() <= 1e-4
        other = onestill.sample(source, prompts=["red a"], num_images=1, seed=1)
        assert (again - other).abs().max() > 1e-4


def test_a_teacher_takes_prompts_and_a_negative_one() -> None:
    common: dict[str, Any] = {"teacher": place() / "t", "num_inference_steps": 2, "num_images": 2}
    plain = onestill.sample(prompts=["red a"], guidance_scale=3.0, **common)
    negative = onestill.sample(prompts=["red a"], guidance_scale=3.0, negative_prompt="blue b", **common)
    assert plain.shape == (2, 3, 16, 16) and (plain - negative).abs().max() > 1e-4
    from_file = onestill.sample(prompt_file=place() / "p.txt", **common)
    listed = onestill.sample(prompts=PROMPTS[:2], **common)
    assert torch.equal(from_file, listed)


@functools.cache
def drawn_run() -> Path:
    """Return a finished run of a student that takes w from 1 to 4: read only."""
    folder = Path(tempfile.mkdtemp(prefix="onestill-text-drawn-"))
    own = settings(folder / "cache", guidance_scale_min=1.0, guidance_scale_max=4.0)
    onestill.distill(place() / "t", folder / "run", show_progress=False, **own)
    return folder / "run"


def test_a_student_that_takes_the_guidance_scale(tmp_path: Path) -> None:
    images = []
    for w in (1.0, 4.0):
        path = tmp_path / f"{w}.safetensors"
        flags = ["--prompt", "it", "--num_images", 2, "--guidance_scale", w, "--output", path]
        outcome = call_cli("sample", "--student", drawn_run(), *flags)
        assert outcome.code == 0, outcome.err
        images.append(load_file(path)["images"])
    assert (images[0] - images[1]).abs().max() > 1e-6

    # Every row of a sweep is what it is alone.
    source = onestill.load_sampler(drawn_run())
    sheet = onestill.guidance_sweep(source, [1.0, 4.0], num_images=2, prompts=["it"])
    assert sheet.columns == ("it", "it") and sheet.rows == ("w = 1", "w = 4")
    for row, alone in zip(sheet.images, images, strict=True):
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=0)


# Playing


def test_from_one_prompt_to_another() -> None:
    run, ends = text_run(), ["red a", "blue b"]
    for student in (run, run / "checkpoint-4", run / "pipeline"):
        walk = onestill.interpolate(onestill.load_sampler(student), 4, seed=7, prompts=ends)
        assert walk.images.shape == (1, 4, 3, 16, 16) and walk.columns == ("red a", "", "", "blue b")
        for i, prompt in ((0, ends[0]), (3, ends[1])):
            alone = onestill.sample(student, prompts=[prompt], num_images=1, seed=7)
            torch.testing.assert_close(walk.images[0, i], alone[0], atol=1e-5, rtol=0)
        assert all((a - b).abs().max() > 1e-5 for a, b in pairwise(walk.images[0]))


def test_of_a_text_teacher_too() -> None:
    where: dict[str, Any] = {"teacher": place() / "t", "num_inference_steps": 2, "guidance_scale": 3.0}
    source = onestill.load_sampler(**where, negative_prompt="photo")
    walk = onestill.interpolate(source, 3, prompts=["red a", "blue b"])
    alone = onestill.sample(**where, negative_prompt="photo", prompts=["blue b"], num_images=1)
    torch.testing.assert_close(walk.images[0, -1], alone[0], atol=1e-5, rtol=0)
    sheet = onestill.guidance_sweep(source, [1.0, 2.0], prompts=["red a", "blue b"])
    assert sheet.images.shape == (2, 2, 3, 16, 16) and sheet.columns == ("red a", "blue b")
    plain = onestill.sample(teacher=place() / "t", num_inference_steps=2, prompts=["red a", "blue b"], num_images=2)
    torch.testing.assert_close(sheet.images[0], plain, atol=1e-5, rtol=0)


def test_one_prompt_from_noise_to_noise_and_one_noise_for_all_prompts() -> None:
    source = onestill.load_sampler(text_run())
    walk = onestill.interpolate(source, 3, seed=1, to_seed=2, prompts=["red a"])
    apart = onestill.sample(text_run(), prompts=["red a"], num_images=2, seed=1)
    torch.testing.assert_close(walk.images[0, [0, 2]], apart, atol=1e-5, rtol=0)
    sheet = onestill.fixed_noise(source, seed=1, prompts=["red a", "blue b"])
    assert sheet.columns == ("red a", "blue b")
    torch.testing.assert_close(sheet.images[0, 0], apart[0], atol=1e-5, rtol=0)
    other = onestill.sample(text_run(), prompts=["blue b"], num_images=1, seed=1)
    torch.testing.assert_close(sheet.images[0, 1], other[0], atol=1e-5, rtol=0)
    assert onestill.fixed_noise(source, prompts=PROMPTS).images.shape[1] == 16


def test_playing_from_the_command_line(tmp_path: Path) -> None:
    two = ["--prompt", "red a", "--prompt", "blue b"]
    for student, flags, name in (
        (text_run(), ["--target_times", "1,0.5,0", *two], "x.gif"),
        (text_run() / "pipeline", ["--interpolate", 3, *two], "y.gif"),
        (text_run(), ["--fixed_noise", "--prompt_file", place() / "p.txt", "--num_images", 3], "x.png"),
        (drawn_run(), ["--guidance_scales", "1,2", *two], "y.png"),
    ):
        outcome = call_cli("sample", "--student", student, *flags, "--output", tmp_path / name)
        assert outcome.code == 0 and (tmp_path / name).is_file(), outcome.err


def test_the_trajectory_of_a_text_student() -> None:
    times = onestill.student_trajectory(onestill.load_sampler(text_run()), [0.5, 0.0], prompts=["red a", "blue b"])
    assert times.rows == ("seed 0\nred a", "seed 1\nblue b")
    for i, t in enumerate((0.5, 0.0)):
        alone = onestill.sample(text_run(), prompts=["red a", "blue b"], num_images=2, target_time=t)
        torch.testing.assert_close(times.images[:, i], alone, atol=1e-4, rtol=0)


def test_inspect_says_text() -> None:
    outcome = call_cli("inspect", "--teacher", place() / "t", "--json", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["conditioning"], found["family"], found["sample_shape"]) == ("text", "stable_diffusion", [4, 8, 8])
    assert found["num_parameters"] > 0 and 0.5 < found["t_max"] <= 1


# The cache


def test_a_second_run_encodes_nothing_and_lets_the_encoders_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = onestill.distill(place() / "t", tmp_path / "a", show_progress=False, **settings(tmp_path / "cache"))
    asked: list[str] = []
    encode = PipelineTeacher.encode
    monkeypatch.setattr(PipelineTeacher, "encode", lambda self, texts: asked.extend(texts) or encode(self, texts))
    values = {"teacher": str(place() / "t"), "output_dir": tmp_path / "b", **settings(tmp_path / "cache")}
    prepared = build_run(make_config(values))
    asked.clear()  # what the teacher's self-check encodes
    trainer = make_trainer(prepared)
    assert asked == [] and any("all encoded already" in message for message in prepared.messages)
    assert isinstance(prepared.teacher.unguided, PipelineTeacher)
    assert (
        prepared.teacher.unguided.pipeline.text_encoder is None and prepared.teacher.unguided.pipeline.tokenizer is None
    )
    with pytest.raises(RuntimeError, match="were released"):
        prepared.teacher.unguided.encode(["red"])
    for _ in trainer.steps():
        pass
    assert first.checkpoint is not None and same_state(first.checkpoint, tmp_path / "b" / "checkpoint-4")


def test_a_text_run_becomes_longer_where_its_prompts_stay(tmp_path: Path) -> None:
    for own, goes_on in (({}, False), ({"num_prompts": 5}, True)):
        given: dict[str, Any] = {**ALONE, **settings(tmp_path / "cache", **own), "show_progress": False}
        run = tmp_path / f"run-{goes_on}"
        onestill.distill(place() / "t", run, **given)
        longer = {**given, "max_train_steps": 6, "resume_from_checkpoint": "latest"}
        if goes_on:
            assert onestill.distill(place() / "t", run, **longer).num_trained == 2
            continue
        with pytest.raises(ValueError, match="draws from 16 of the 20 prompts; a longer one draws from 20"):
            onestill.distill(place() / "t", run, **longer)


def test_a_pool_of_anchors_is_of_the_prompts_that_are_drawn(tmp_path: Path) -> None:
    """Without a checkpoint nothing but the pool's own file says what it was made with."""

    def trainer(**own: Any) -> Trainer:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.yaml").touch()
        given = settings(tmp_path / "cache", empty_prompt_fraction=0.3, anchor_fraction=0.25, num_anchors=10, **own)
        given |= {"teacher": str(place() / "t"), "output_dir": tmp_path / "run", "resume_from_checkpoint": "latest"}
        return make_trainer(build_run(make_config(given)))

    def made(trainer: Trainer) -> list[int]:
        return [num for _, num in trainer.prepare()]

    def pool(trainer: Trainer) -> Pool:
        (found,) = (objective.pool for objective in trainer.objectives if isinstance(objective, Anchors))
        assert found is not None
        return found

    (stopped := trainer()).stop_requested = True
    assert made(stopped) == [4]
    assert made(trainer()) == [4, 4, 2], "is gone on with"
    assert made(trainer(learning_rate=1.0)) == [10], "is whole, whatever is learned from it"
    assert made(trainer(max_train_steps=6)) == [4, 4, 2], "20 prompts are drawn from, not 16"
    assert made(same := trainer(max_train_steps=7)) == [10], "all 20 are"
    (tmp_path / "run" / "anchors-0.safetensors").unlink()
    assert made(again := trainer(max_train_steps=7)) == [4, 4, 2]
    assert torch.equal(pool(again).signal, pool(same).signal)
    assert all(torch.equal(value, pool(same).chosen[name]) for name, value in pool(again).chosen.items())


def test_another_text_encoder_has_another_cache(tmp_path: Path) -> None:
    other = copied(place() / "t", tmp_path / "t")
    path = other / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(n for n, value in weights.items() if value.ndim == 2)
    weights[name][0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    names = {load.encoder_identity() for load in (load_teacher(other), load_teacher(place() / "t")) if isinstance(load, PipelineTeacher)}  # fmt: skip
    assert len(names) == 2
    moved = load_teacher(copied(place() / "t", tmp_path / "moved"))
    assert isinstance(moved, PipelineTeacher) and moved.encoder_identity() in names
    onestill.distill(place() / "t", tmp_path / "a", show_progress=False, **settings(tmp_path / "cache"))
    values = {"teacher": str(other), "output_dir": tmp_path / "b", **settings(tmp_path / "cache")}
    said = " ".join(build_run(make_config(values)).messages)
    assert "other text encoders or settings" in said and "to encode into" in said


def test_a_prompt_that_is_too_long_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("red\na\n" + "\n".join("photo of a long drawing " + "x" * i for i in range(3)))
    for _ in range(2):  # counted when it is encoded, and when it comes from the cache
        outcome = call_cli(
            "distill", "--teacher", place() / "t", "--output_dir", tmp_path / "run",
            *as_flags(settings(tmp_path / "cache", prompt_file=path)), "--dry_run",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        assert "warning: 3 prompts are longer than the 8 tokens" in outcome.words
        onestill.distill(
            place() / "t", tmp_path / str(_), show_progress=False, **settings(tmp_path / "cache", prompt_file=path)
        )


LONG = [f"photo of a long drawing {'x' * i}" for i in range(1, 4)]


@pytest.mark.parametrize("kind", ["run", "checkpoint", "alone", "teacher"])
def test_sample_warns_of_prompts_that_are_cut(kind: str, tmp_path: Path) -> None:
    where = {
        "run": ["--student", text_run()],
        "checkpoint": ["--student", text_run() / "checkpoint-4"],
        "alone": ["--student", exported_alone()],
        "teacher": ["--teacher", place() / "t", "--num_inference_steps", 1],
    }[kind]

    def said(*flags: object) -> str:
        outcome = call_cli("sample", *where, *flags, "--output", tmp_path / "x.png", "--overwrite", "--device", "cpu")
        assert outcome.code == 0, outcome.err
        return outcome.err

    prompts = [part for text in ("red", LONG[0], LONG[1], LONG[1], LONG[2]) for part in ("--prompt", text)]
    words = "warning: {} longer than the 8 tokens the text encoder takes; it cuts {}"
    assert said(*prompts) == f"{words.format('3 prompts are', 'them')}, first '{LONG[0]}'\n"
    # Of those that are drawn, whatever is drawn of them.
    assert said(*prompts, "--num_images", 2) == f"{words.format('1 prompt is', 'it')}: '{LONG[0]}'\n"
    assert said(*prompts, "--num_images", 2, "--fixed_noise") == f"{words.format('1 prompt is', 'it')}: '{LONG[0]}'\n"
    assert said(*prompts, "--num_images", 1) == ""


def test_evaluate_warns_of_prompts_that_are_cut(tmp_path: Path) -> None:
    few: dict[str, Any] = {"num_samples": 10, "steps": [1], "num_reference_steps": 1, "speed": False}
    said: list[str] = []
    onestill.evaluate(text_run(), prompts=["red", *LONG], device="cpu", say=said.append, **few)
    assert said[0].startswith("warning: 3 prompts are longer than the 8 tokens") and LONG[0] in said[0]
    assert sum("longer" in line for line in said) == 1


def test_a_cache_of_another_encoder_is_said_by_the_command(tmp_path: Path) -> None:
    flags = as_flags(settings(tmp_path / "cache"))
    (tmp_path / "cache" / "clip-of-somebody").mkdir(parents=True)
    outcome = call_cli("distill", "--dry_run", "--teacher", place() / "t", "--output_dir", tmp_path / "run", *flags)
    assert outcome.code == 0, outcome.err
    assert (
        "holds prompts of other text encoders or settings too, which are kept apart: clip-of-somebody" in outcome.words
    )
    assert "18 to encode into" in outcome.words and not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_while_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_rows: Any, path: Path, *_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onestill.data.prompt_cache.save_hashed", full)
    flags = ["distill", "--teacher", place() / "t", "--output_dir", tmp_path / "run", *as_flags(settings(tmp_path / "cache"))]  # fmt: skip
    outcome = call_cli(*flags)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert f"error: --prompt_cache_dir {tmp_path / 'cache'}: cannot be written: " in outcome.words
    assert "No space left on device" in outcome.words and "name a folder on another disk" in outcome.words
    assert not (tmp_path / "run").exists() and not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    monkeypatch.undo()
    assert call_cli(*flags).code == 0, "the same command goes on once there is room"


def test_a_prompt_that_cannot_be_encoded_ends_with_one_line(tmp_path: Path) -> None:
    shutil.copytree(place() / "t", tmp_path / "t")
    weights = load_file(path := tmp_path / "t" / "text_encoder" / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("token_embedding.weight"))
    teacher = load_teacher(place() / "t")
    assert isinstance(teacher, PipelineTeacher)
    blue = teacher.pipeline.tokenizer("blue").input_ids
    common = {
        token
        for word in ("", "red", "a photo", "a drawing of it")
        for token in teacher.pipeline.tokenizer(word).input_ids
    }
    weights[name][sorted(set(blue) - common)] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    flags = as_flags(settings(tmp_path / "cache"))
    outcome = call_cli("distill", "--teacher", tmp_path / "t", "--output_dir", tmp_path / "run", *flags)
    assert outcome.code == 1 and "Traceback" not in outcome.err, outcome.err
    assert "stopped: " in outcome.err.splitlines()[-1] and "non-finite" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestill.data.prompt_cache.shutil.disk_usage", lambda _: SimpleNamespace(free=2000))
    flags = as_flags(settings(tmp_path / "cache"))
    outcome = call_cli("distill", "--teacher", place() / "t", "--output_dir", tmp_path / "run", *flags)
    assert outcome.code == 2, outcome.err
    assert "18 encoded prompts need 0.01 MB and 0.00 MB are free; name a folder on another disk" in outcome.words
    assert list(tmp_path.iterdir()) == []


# Draws


def test_the_seed_decides_the_prompts_and_longer_runs_have_those_of_shorter_ones() -> None:
    short, long, other = choose(1000, 50, 0), choose(1000, 400, 0), choose(1000, 50, 1)
    assert len(set(short)) == 50 and set(short) <= set(long) and set(short) != set(other)
    assert (short == choose(1000, 50, 0)).all() and choose(10, 50, 0).tolist() == list(range(10))


def test_empty_prompts_come_as_often_as_asked(tmp_path: Path) -> None:
    values = {"teacher": str(place() / "t"), "output_dir": tmp_path / "run", **settings(tmp_path / "cache")}
    # The negative prompt is what is guided away from, and nothing that is drawn.
    away = {"guidance_scale": 2.0, "negative_prompt": "blue b"}
    prepared = build_run(make_config({**values, **away, "empty_prompt_fraction": 0.25}))
    make_trainer(prepared)
    chosen = prepared.conditions.choose
    drawn = lambda: prepared.conditions.rows(chosen(2000, torch.Generator().manual_seed(0)))  # noqa: E731
    teacher = load_teacher(place() / "t")
    assert isinstance(teacher, PipelineTeacher)
    ((name, nothing),) = teacher.encode([""]).items()
    cond = drawn()
    empty = (cond[name] == nothing).flatten(1).all(1).float().mean()
    assert abs(empty - 0.25) < 0.04  # four standard deviations
    again = drawn()
    assert torch.equal(cond[name], again[name])
    grid = prepared.conditions.grid(3)[name]
    assert torch.equal(grid[2], grid[0]) and prepared.conditions.captions == tuple(PROMPTS[:2])


def test_resume_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    own = settings(tmp_path / "cache", empty_prompt_fraction=0.2, guidance_scale=2.0)
    whole = onestill.distill(place() / "t", tmp_path / "whole", show_progress=False, **own)
    with pytest.raises(Interruption):
        onestill.distill(place() / "t", tmp_path / "cut", show_progress=False, on_step=interrupt_at(3), **own)
    # The file may lie elsewhere, and the cache be shared with other runs meanwhile.
    (tmp_path / "moved.txt").write_text((place() / "p.txt").read_text())
    moved = {**own, "prompt_file": tmp_path / "moved.txt", "resume_from_checkpoint": "latest"}
    resumed = onestill.distill(place() / "t", tmp_path / "cut", show_progress=False, **moved)
    assert whole.checkpoint is not None and resumed.checkpoint is not None
    assert same_state(whole.checkpoint, resumed.checkpoint)
    (tmp_path / "moved.txt").write_text("other\nprompts\n")
    with pytest.raises(ValueError, match="was trained on other prompts"):
        onestill.distill(place() / "t", tmp_path / "cut", show_progress=False, **moved)


# Bad input

D = "distill --output_dir run --device cpu --prompt_cache_dir cache "
BAD = [
    ("no prompts", D + "--teacher TEXT", "--prompt_file: this teacher takes prompts: give a file of them"),
    ("no file", D + "--teacher TEXT --prompt_file no.txt", "--prompt_file no.txt: no such file"),
    ("no file, before a teacher is looked for", D + "--teacher no/where --prompt_file no.txt", "--prompt_file no.txt: no such file"),
    ("no base, before a teacher is looked for", D + "--teacher no/where --base_student no", "--base_student no: no such folder"),
    ("kind", D + "--teacher TEXT --prompt_file p.xml", "--prompt_file p.xml: give a .txt"),
    ("empty", D + "--teacher TEXT --prompt_file empty.txt", "--prompt_file empty.txt: holds no prompt"),
    ("binary", D + "--teacher TEXT --prompt_file binary.txt", "--prompt_file binary.txt: line 2: it is not UTF-8"),
    ("field", D + "--teacher TEXT --prompt_file p.jsonl --prompt_field text", "line 1: no field 'text', it has prompt"),
    ("prompts of no text teacher", D + "--teacher PLAIN --prompt_file p.txt", "--prompt_file p.txt: was given, but this teacher takes no text"),
    ("negative of no text teacher", D + "--teacher PLAIN --negative_prompt x", "--negative_prompt x: this teacher takes no text"),
    ("empty share of no text teacher", D + "--teacher PLAIN --empty_prompt_fraction 0.1", "was given, but this teacher takes no text"),
    ("negative that does nothing", D + "--teacher TEXT --prompt_file p.txt --negative_prompt x", "acts through guidance only"),
    ("share", D + "--teacher TEXT --prompt_file p.txt --empty_prompt_fraction 1", "--empty_prompt_fraction 1: must be below 1"),
    ("labels", D + "--teacher TEXT --prompt_file p.txt --class_labels 1", "takes prompts, not labels"),
    ("range reversed", D + "--teacher TEXT --prompt_file p.txt --guidance_scale_min 4 --guidance_scale_max 2", "--guidance_scale_min 4: must be below"),
    ("cache is a file", D.replace("cache ", "p.txt ") + "--teacher TEXT --prompt_file p.txt", "--prompt_cache_dir p.txt: is a file"),
    ("zero byte", D + "--teacher TEXT --prompt_file zero.txt", "--prompt_file zero.txt: line 2: it holds a zero byte: this is a binary file, or not UTF-8"),
    ("negative of classes", D + "--teacher digits --guidance_scale 2 --negative_prompt x", "--negative_prompt x: this teacher takes no text"),
    ("sample with a negative of classes", "sample --output x.png --teacher digits --guidance_scale 2 --negative_prompt x", "--negative_prompt x: this teacher takes no text"),
    ("guidance without a null condition", D + "--teacher FLUX --prompt_file p.txt --guidance_scale 3", "--guidance_scale 3: needs a null condition, and a flux pipeline has none"),
    ("range without a null condition", D + "--teacher FLUX --prompt_file p.txt --guidance_scale_min 1 --guidance_scale_max 3", "--guidance_scale_min and --guidance_scale_max: need a null condition, and a flux pipeline has none: guidance is in its weights already; leave them out"),
    ("negative without a null condition", D + "--teacher FLUX --prompt_file p.txt --negative_prompt x", "--negative_prompt x: a FluxPipeline has no null condition"),
    ("LoRA of no rank", D + "--teacher TEXT --prompt_file p.txt --lora_rank 0", "--lora_rank 0: must be at least 1"),
    ("LoRA of no layers", D + "--teacher TEXT --prompt_file p.txt --lora_rank 2 --lora_target_modules nowhere", "--lora_target_modules nowhere: no Linear or ungrouped Conv layer of UNet2DConditionModel"),
    ("encoder's folder missing", D + "--teacher GONE --prompt_file p.txt", "the folder text_encoder/ (CLIPTextModel) is missing, which model_index.json names"),
    ("no encoder", D + "--teacher MUTE --prompt_file p.txt", "the StableDiffusionPipeline does not run without text_encoder, which encode its prompts: use a folder that holds the whole pipeline"),
    ("stage II alone", D + "--teacher LARGE --prompt_file p.txt", "enlarges the picture of an earlier model"),
    ("too many to show", D + "--teacher TEXT --prompt_file p.txt --num_validation_images 1 --validation_prompt a --validation_prompt b", "--num_validation_images 1: shows fewer than the 2 of --validation_prompt"),
    ("sample of no prompt", "sample --output x.png --student TRUN", "takes text; say what to draw with it, or with --prompt_file"),
    ("sample of a teacher and no prompt", "sample --output x.png --teacher TEXT", "takes text; say what to draw with it, or with --prompt_file"),
    ("sample of both", "sample --output x.png --student TRUN --prompt a --prompt_file p.txt", " and --prompt_file: give one or the other, not both"),
    ("sample of a field", "sample --output x.png --student TRUN --prompt a --prompt_field b", "--prompt_field b: is for a --prompt_file"),
    ("sample of a bad file", "sample --output x.png --student TRUN --prompt_file binary.txt", "binary.txt: line 2: it is not UTF-8"),
    ("sample of a student with a negative", "sample --output x.png --student TRUN --prompt a --negative_prompt b", "--negative_prompt b: is for a teacher"),
    ("sample with a negative that does nothing", "sample --output x.png --teacher TEXT --prompt a --negative_prompt b", "acts through guidance only"),
    ("sample with labels", "sample --output x.png --student TRUN --prompt a --class_labels 1", "takes prompts"),
    ("sample with guidance that is fixed", "sample --output x.png --student TRUN --prompt a --guidance_scale 3", "distilled with w = 2 fixed"),
    ("a way between no prompts", "sample --output x.png --student TRUN --interpolate 4", "give two --prompts (got 0), or --to_seed"),
    ("a way from one prompt", "sample --output x.png --student TRUN --interpolate 4 --prompt a", "give two --prompt (got 1), or one of --prompt and --to_seed"),
    ("a way between noises of no prompt", "sample --output x.png --student TRUN --interpolate 4 --to_seed 1", "takes text; say what to draw"),
    ("one noise of no prompt", "sample --output x.png --student TRUN --fixed_noise", "takes text; say what to draw"),
    ("one noise more often than prompts", "sample --output x.png --student TRUN --fixed_noise --prompt a --num_images 2", "one image for the one prompt"),
    ("scales of a fixed text student", "sample --output x.png --student TRUN --prompt a --guidance_scales 1,2", "distilled with w = 2 fixed"),
    ("times of an exported text student", "sample --output x.png --student TRUN/pipeline --prompt a --target_times 1,0", "give the run's folder"),
    ("evaluate of no prompt", "evaluate --num_samples 10 --output out --student ALONE --teacher TEXT", "takes text; say what to draw"),
    ("evaluate of prompts of no text teacher", "evaluate --num_samples 10 --output out --student RUN --prompt a", "run-plain/pipeline takes no text; leave it out"),
    ("evaluate with another teacher", "evaluate --num_samples 10 --output out --student TRUN --teacher PLAIN", ": makes samples of shape (1, 8, 8), --student of (4, 8, 8)"),
    ("evaluate latents with a folder", "evaluate --num_samples 10 --output out --student TRUN --reference none", "--reference none: no such folder"),
]  # fmt: skip


SPECIAL = {"FLUX": "flux-schnell", "LARGE": "if-super-resolution", "GONE": "sd-epsilon", "MUTE": "sd-epsilon"}


@functools.cache
def special(word: str) -> str:
    """Return a teacher that cannot do what is asked, with the flags it needs to load."""
    folder = place() / word.lower()
    build(SPECIAL[word]).save_pretrained(folder)
    if word == "GONE":
        (folder / "text_encoder").rename(place() / "text_encoder")
    if word == "MUTE":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    return f"{folder} --height 16 --width 16 --max_sequence_length 16" if word == "FLUX" else str(folder)


PLACES: dict[str, Callable[[], object]] = {
    "ALONE": lambda: exported_alone(),
    "TRUN": lambda: text_run(),
    "RUN": lambda: finished_run(),
    "TEXT": lambda: place() / "t",
    "PLAIN": lambda: teacher_folder(),
    **{word: functools.partial(special, word) for word in SPECIAL},
}


@pytest.mark.parametrize(("name", "command", "words"), BAD, ids=[name for name, *_ in BAD])
def test_bad_input(name: str, command: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("red\nblue\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"red\n\xff\xd8\n")
    (tmp_path / "zero.txt").write_bytes(b"red\nbl\0ue\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "red"}\n')
    (tmp_path / "p.xml").write_text("<a/>")
    before = snapshot(tmp_path)
    assert_refused(call_cli(*with_places(command, PLACES)), words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("own", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_a_teacher_of_a_variant_is_exported(own: dict[str, Any], tmp_path: Path) -> None:
    build("sd-epsilon").save_pretrained(tmp_path / "t", variant="fp16")
    once = settings(tmp_path / "cache", variant="fp16", max_train_steps=1, lr_warmup_steps=0, **own)
    onestill.distill(tmp_path / "t", tmp_path / "run", show_progress=False, **once)
    names = {path.name for path in (tmp_path / "run" / "pipeline").rglob("*.safetensors")}
    lora = {"pytorch_lora_weights.safetensors"} if own else set()
    assert names == {"diffusion_pytorch_model.safetensors", "model.safetensors"} | lora
    assert onestill.sample(tmp_path / "run", prompts=["it"], num_images=1, device="cpu").shape == (1, 3, 16, 16)


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    teacher = load_teacher(place() / "t")
    assert isinstance(teacher, PipelineTeacher)
    teacher.folder = tmp_path / "gone"
    with pytest.raises(ExportError, match="cannot be exported: .*gone"):
        export_student(Student(teacher), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)], ids=["022", "077"])
def test_others_may_read_what_they_may_read_elsewhere(tmp_path: Path, umask: int, mode: int) -> None:
    own = settings(tmp_path / "cache", lora_rank=2, anchor_fraction=0.5, num_anchors=4, num_anchor_steps=1)
    before = os.umask(umask)
    try:
        onestill.distill(place() / "t", tmp_path / "run", show_progress=False, **own)
        images = tmp_path / "x.safetensors"
        flags = ["--student", tmp_path / "run", "--prompt", "red a", "--num_images", 1, "--output", images]
        assert call_cli("sample", *flags).code == 0
    finally:
        os.umask(before)
    weights = sorted(tmp_path.rglob("*.safetensors"))
    folders = {"cache", "checkpoint-4", "unet", "vae", "text_encoder", "lora"}
    assert folders <= {part for path in weights for part in path.relative_to(tmp_path).parts}
    assert images in weights and tmp_path / "run" / "anchors-0.safetensors" in weights
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {mode}
