"""Runs and exported folders opened again: one student, whichever way it is reached."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs_helpers import NUM_CLASSES, copied, finished_run, restored, teacher_folder
from torch import Tensor

from onestill.core.errors import SettingError
from onestill.core.tensors import noise
from onestill.runs.build import guided_as
from onestill.runs.folder import RunFolder
from onestill.runs.load import load_sampler, load_student, run_teacher
from onestill.sampling.samplers.base import Sampler
from onestill.sampling.samplers.network import check_trained
from onestill.students.model_card import Distilled
from onestill.teachers.load import load_teacher
from onestill.training.checkpoint import read_checkpoint

CPU = torch.device("cpu")
# Baked weights and the folded head sum the same float32 numbers in another order.
TOLERANCE = 1e-5


def opened(path: Path | str, **settings: Any) -> Sampler:
    return load_student(path, **settings).sampler


def images(sampler: Sampler, num: int = 5, batch_size: int = 64, chosen: tuple[int, ...] = ()) -> Tensor:
    return sampler.images(range(num), sampler.conditions(num, chosen), batch_size=batch_size)


@pytest.mark.parametrize("kind", ["plain", "class", "null_first"])
def test_run_checkpoint_and_pipeline_are_one_student(kind: str) -> None:
    run = finished_run(kind)
    ways = [run, run / "pipeline", run / "checkpoint-4"]
    chosen = () if kind == "plain" else (1, 2)
    first, *others = [images(opened(path), chosen=chosen) for path in ways]
    assert first.shape == (5, 1, 8, 8) and first.abs().max() <= 1
    for other in others:
        assert (other - first).abs().max() <= TOLERANCE
    earlier = images(opened(run / "checkpoint-2"), chosen=chosen)
    assert (earlier - first).abs().max() > 1e-3


def test_without_a_pipeline_the_newest_checkpoint_is_used(tmp_path: Path) -> None:
    from shutil import rmtree

    run = copied(finished_run(), tmp_path / "run")
    expected = images(opened(run))
    rmtree(run / "pipeline")
    found = load_student(run)
    assert found.pipeline is None and (images(found.sampler) - expected).abs().max() <= TOLERANCE


def test_a_corrupt_newest_checkpoint_is_passed_over_and_said(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    expected = images(opened(run / "checkpoint-2"))
    (run / "checkpoint-4" / "student-ema.safetensors").write_bytes(b"")
    (run / "pipeline" / "model_index.json").unlink()
    with pytest.warns(UserWarning, match="checkpoint-4 is corrupt.*falling back"):
        source = opened(run)
    assert torch.equal(images(source), expected)


def test_the_average_is_what_is_restored() -> None:
    run = finished_run()
    student = restored(run)
    tensors = read_checkpoint(run / "checkpoint-4").tensors
    assert all(torch.equal(p, tensors["student-ema"][name]) for name, p in student.named_parameters())


@pytest.mark.parametrize("kind", ["plain", "class"])
def test_an_image_does_not_depend_on_its_batch(kind: str) -> None:
    for path in (finished_run(kind), finished_run(kind) / "checkpoint-4"):
        source = opened(path)
        together = images(source, 6)
        for batch_size in (1, 4):
            # Matrix products of other sizes round otherwise in the last digits.
            assert (images(source, 6, batch_size) - together).abs().max() <= TOLERANCE
    teacher = load_sampler(teacher=teacher_folder("plain"), device="cpu", num_inference_steps=3)
    assert (images(teacher, 3, 1) - images(teacher, 3)).abs().max() <= TOLERANCE


def test_target_time() -> None:
    run = finished_run()
    clean = images(opened(run))
    early = images(opened(run, target_time=0.9))
    assert (clean - early).abs().max() > 1e-3
    student = restored(run)
    with torch.no_grad():
        expected = student(noise(range(5), (1, 8, 8)), None, 0.9, {}).clamp(-1, 1)
    assert torch.equal(early, expected)


def test_guidance_of_a_student_that_takes_it() -> None:
    run = finished_run("drawn")
    default, low, middle = (images(opened(run, guidance_scale=w)) for w in (None, 1.0, 2.0))
    # The exported pipeline has the middle of the range baked in.
    assert (default - middle).abs().max() <= TOLERANCE
    assert (low - middle).abs().max() > 1e-4
    from_checkpoint = images(opened(run / "checkpoint-4"))
    assert (from_checkpoint - middle).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("kind", "labels"), [("class", (0, 1, 2)), ("null_first", (1, 2, 3)), ("plain", ())])
def test_labels_are_the_classes_without_the_null_class(kind: str, labels: tuple[int, ...]) -> None:
    run = finished_run(kind)
    for path in (run, run / "checkpoint-4"):
        source = opened(path)
        assert source.labels == labels
        expected = {"class_labels": [labels[i % len(labels)] for i in range(5)]} if labels else {}
        assert {name: value.tolist() for name, value in source.conditions(5).items()} == expected


def test_labels_matter() -> None:
    source = opened(finished_run("class"))
    assert (images(source, chosen=(0,)) - images(source, chosen=(1,))).abs().max() > 1e-3
    assert source.conditions(3, (2, 0))["class_labels"].tolist() == [2, 0, 2]


def test_labels_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match=r"class_labels=\[3, 9\]: .* knows 0 to 2"):
        opened(finished_run("class")).conditions(2, (9, 1, 3))
    with pytest.raises(ValueError, match=r"class_labels=\[1\]: .* is unconditional"):
        opened(finished_run()).conditions(2, (1,))


def test_teacher_sampling_counts_its_evaluations() -> None:
    teacher = load_teacher(teacher_folder("class"), null_class=NUM_CLASSES)
    counted = 0

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1

    network = teacher.network
    assert isinstance(network, torch.nn.Module)
    network.register_forward_hook(count)
    for solver, guidance_scale, calls in (("ddim", 1.0, 4), ("heun", 1.0, 8), ("midpoint", 2.0, 16)):
        source = load_sampler(
            teacher=teacher, device="cpu", num_inference_steps=4, solver=solver, guidance_scale=guidance_scale
        )
        assert (source.evaluations, source.num_steps) == (calls, 4)
        counted = 0
        images(source, 2)
        # Guidance makes its two evaluations in one pass of a doubled batch.
        assert counted == (calls if guidance_scale == 1 else calls // 2)


def test_teacher_is_clipped_as_its_scheduler_does() -> None:
    assert images(load_sampler(teacher=teacher_folder(), device="cpu", num_inference_steps=2)).abs().max() <= 1


def test_the_teacher_of_a_run_is_fitted_as_in_the_run() -> None:
    run = finished_run("class")
    config = RunFolder(run).config
    base = run_teacher(RunFolder(run), CPU)
    wrapped = guided_as(base, config)
    assert base.spec.null_class == NUM_CLASSES and wrapped.evaluations == 2
    assert base.fingerprint() == load_teacher(teacher_folder("class"), null_class=NUM_CLASSES).fingerprint()
    assert base.fingerprint() != load_teacher(teacher_folder("class")).fingerprint()


REFUSED = {
    "no such folder": lambda: opened("nowhere/at/all"),
    "neither a run": lambda: opened(teacher_folder() / "unet"),
    "exported pipeline, whose target time, guidance and average are baked in": lambda: opened(
        finished_run() / "pipeline", target_time=0.5
    ),
    "distilled with w = 1 fixed": lambda: opened(finished_run(), guidance_scale=2.0),
    "outside 1 to 3": lambda: opened(finished_run("drawn"), guidance_scale=4.0),
    "target_time=1.5: must be between 0": lambda: opened(finished_run(), target_time=1.5),
    "target_time=nan: must be between": lambda: opened(finished_run(), target_time=float("nan")),
    "num_inference_steps=0: must be at least 1": lambda: load_sampler(teacher=teacher_folder(), num_inference_steps=0),
    "needs a teacher with a null class": lambda: load_sampler(
        teacher=teacher_folder(), device="cpu", guidance_scale=2.0
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_say_what_is_wrong(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_target_times_below_what_was_trained_are_refused() -> None:
    run = finished_run()
    student = restored(run)
    for time in (0.0, 0.2):
        check_trained(student, time, None, Distilled(), 0.2)
    with pytest.raises(SettingError, match="target_time=0.1: is below the run's t_min 0.2"):
        check_trained(student, 0.1, None, Distilled(), 0.2)


def test_an_exported_folder_that_is_broken_is_refused(tmp_path: Path) -> None:
    weights = "unet/diffusion_pytorch_model.safetensors"
    for name, damage in (
        (weights, lambda path: path.unlink()),
        (weights, lambda path: path.write_bytes(path.read_bytes()[:1000])),
        ("model_index.json", lambda path: path.write_text("{")),
        ("unet/config.json", lambda path: path.unlink()),
    ):
        folder = copied(finished_run() / "pipeline", tmp_path / str(len(list(tmp_path.iterdir()))))
        damage(folder / name)
        with pytest.raises(ValueError, match=f"student='{folder}': does not load"):
            opened(folder)
