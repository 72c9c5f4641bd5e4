"""Runs and exported folders opened again: one student, whichever way it is reached."""

from pathlib import Path

import pytest
import torch
from runs_helpers import NUM_CLASSES, copied, finished_run, teacher_folder
from torch import Tensor

from onestill.core.tensors import noise
from onestill.runs.build import fit_teacher
from onestill.runs.load import open_student, open_teacher
from onestill.runs.restore import check_student_request, read_run_config, restore_student, run_teacher
from onestill.sampling.generate import generate_images
from onestill.sampling.samplers import Source
from onestill.teachers.load import load_teacher
from onestill.training.checkpoint import read_checkpoint
from onestill.training.config import make_config

CPU = torch.device("cpu")
# Baked weights and the folded head sum the same float32 numbers in another order.
TOLERANCE = 1e-5


def images(source: Source, num: int = 5, batch_size: int = 64, chosen: tuple[int, ...] = ()) -> Tensor:
    cond = source.conditions(num, chosen)
    return generate_images(source.generate, range(num), source.sample_shape, cond, batch_size=batch_size)


@pytest.mark.parametrize("kind", ["plain", "class", "null_first"])
def test_run_checkpoint_and_pipeline_are_one_student(kind: str) -> None:
    run = finished_run(kind)
    ways = [run, run / "pipeline", run / "checkpoint-4"]
    chosen = () if kind == "plain" else (1, 2)
    first, *others = [images(open_student(path, device=CPU), chosen=chosen) for path in ways]
    assert first.shape == (5, 1, 8, 8) and first.abs().max() <= 1
    for other in others:
        assert (other - first).abs().max() <= TOLERANCE
    earlier = images(open_student(run / "checkpoint-2", device=CPU), chosen=chosen)
    assert (earlier - first).abs().max() > 1e-3


def test_without_a_pipeline_the_newest_checkpoint_is_used(tmp_path: Path) -> None:
    from shutil import rmtree

    run = copied(finished_run(), tmp_path / "run")
    expected = images(open_student(run, device=CPU))
    rmtree(run / "pipeline")
    source = open_student(run, device=CPU)
    assert source.folder is None and (images(source) - expected).abs().max() <= TOLERANCE


def test_a_corrupt_newest_checkpoint_is_passed_over_and_said(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    expected = images(open_student(run / "checkpoint-2", device=CPU))
    (run / "checkpoint-4" / "ema.safetensors").write_bytes(b"")
    (run / "pipeline" / "model_index.json").unlink()
    with pytest.warns(UserWarning, match="checkpoint-4 is corrupt.*falling back"):
        source = open_student(run, device=CPU)
    assert torch.equal(images(source), expected)


def test_the_average_is_what_is_restored() -> None:
    run = finished_run()
    student = restore_student(run, read_run_config(run), CPU)
    tensors = read_checkpoint(run / "checkpoint-4").tensors
    assert all(torch.equal(p, tensors["ema"][name]) for name, p in student.named_parameters())


@pytest.mark.parametrize("kind", ["plain", "class"])
def test_an_image_does_not_depend_on_its_batch(kind: str) -> None:
    for path in (finished_run(kind), finished_run(kind) / "checkpoint-4"):
        source = open_student(path, device=CPU)
        together = images(source, 6)
        for batch_size in (1, 4):
            # Matrix products of other sizes round otherwise in the last digits.
            assert (images(source, 6, batch_size) - together).abs().max() <= TOLERANCE
    teacher = open_teacher(teacher_folder("plain"), device=CPU, num_steps=3)
    assert (images(teacher, 3, 1) - images(teacher, 3)).abs().max() <= TOLERANCE


def test_target_time() -> None:
    run = finished_run()
    clean = images(open_student(run, device=CPU))
    early = images(open_student(run, device=CPU, target_time=0.9))
    assert (clean - early).abs().max() > 1e-3
    student = restore_student(run, read_run_config(run), CPU)
    with torch.no_grad():
        expected = student(noise(range(5), (1, 8, 8)), None, 0.9, {}).clamp(-1, 1)
    assert torch.equal(early, expected)


def test_guidance_of_a_student_that_takes_it() -> None:
    run = finished_run("drawn")
    default, low, middle = (images(open_student(run, device=CPU, guidance_scale=w)) for w in (None, 1.0, 2.0))
    # The exported pipeline has the middle of the range baked in.
    assert (default - middle).abs().max() <= TOLERANCE
    assert (low - middle).abs().max() > 1e-4
    from_checkpoint = images(open_student(run / "checkpoint-4", device=CPU))
    assert (from_checkpoint - middle).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("kind", "labels"), [("class", (0, 1, 2)), ("null_first", (1, 2, 3)), ("plain", ())])
def test_labels_are_the_classes_without_the_null_class(kind: str, labels: tuple[int, ...]) -> None:
    run = finished_run(kind)
    for path in (run, run / "checkpoint-4"):
        source = open_student(path, device=CPU)
        assert source.labels == labels
        expected = {"class_labels": [labels[i % len(labels)] for i in range(5)]} if labels else {}
        assert {name: value.tolist() for name, value in source.conditions(5).items()} == expected


def test_labels_matter() -> None:
    source = open_student(finished_run("class"), device=CPU)
    assert (images(source, chosen=(0,)) - images(source, chosen=(1,))).abs().max() > 1e-3
    assert source.conditions(3, (2, 0))["class_labels"].tolist() == [2, 0, 2]


def test_labels_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--class_labels \[3, 9\]: .* knows 0 to 2"):
        open_student(finished_run("class"), device=CPU).conditions(2, (9, 1, 3))
    with pytest.raises(ValueError, match=r"--class_labels \[1\] was given, but .* is unconditional"):
        open_student(finished_run(), device=CPU).conditions(2, (1,))


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
        source = open_teacher(teacher, device=CPU, num_steps=4, solver=solver, guidance_scale=guidance_scale)
        assert (source.calls, source.num_steps) == (calls, 4)
        counted = 0
        images(source, 2)
        # Guidance makes its two evaluations in one pass of a doubled batch.
        assert counted == (calls if guidance_scale == 1 else calls // 2)


def test_teacher_is_clipped_as_its_scheduler_does() -> None:
    assert images(open_teacher(teacher_folder(), device=CPU, num_steps=2)).abs().max() <= 1


def test_the_teacher_of_a_run_is_fitted_as_in_the_run() -> None:
    run = finished_run("class")
    config = read_run_config(run)
    base = run_teacher(run, config, CPU)
    fitted = fit_teacher(base, config)
    assert base.spec.null_class == NUM_CLASSES and fitted.evaluations == 2
    assert base.fingerprint() == load_teacher(teacher_folder("class"), null_class=NUM_CLASSES).fingerprint()
    assert base.fingerprint() != load_teacher(teacher_folder("class")).fingerprint()


REFUSED = {
    "no such folder": lambda: open_student("nowhere/at/all", device=CPU),
    "neither a run": lambda: open_student(teacher_folder() / "unet", device=CPU),
    "exported pipeline, whose target time and guidance are baked in": lambda: open_student(
        finished_run() / "pipeline", device=CPU, target_time=0.5
    ),
    "distilled with w = 1 fixed": lambda: open_student(finished_run(), device=CPU, guidance_scale=2.0),
    "outside 1 to 3": lambda: open_student(finished_run("drawn"), device=CPU, guidance_scale=4.0),
    "--target_time must be between 0": lambda: open_student(finished_run(), device=CPU, target_time=1.5),
    "--target_time must be between": lambda: open_student(finished_run(), device=CPU, target_time=float("nan")),
    "--num_inference_steps must be at least 1": lambda: open_teacher(teacher_folder(), device=CPU, num_steps=0),
    "needs a teacher with a null class": lambda: open_teacher(teacher_folder(), device=CPU, guidance_scale=2.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_say_what_is_wrong(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_target_times_below_what_was_trained_are_refused() -> None:
    run = finished_run()
    student = restore_student(run, read_run_config(run), CPU)
    config = make_config({**read_run_config(run).model_dump(), "t_min": 0.2})
    check_student_request(student, config, 0.0, None)
    check_student_request(student, config, 0.2, None)
    with pytest.raises(ValueError, match="--target_time 0.1 is below the run's --t_min 0.2"):
        check_student_request(student, config, 0.1, None)


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
        with pytest.raises(ValueError, match=f"--student {folder} does not load"):
            open_student(folder, device=CPU)
