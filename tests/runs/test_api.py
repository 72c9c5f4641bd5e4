"""`onestill.sample`, `onestill.evaluate` and `onestill.export.export` on runs and folders."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs_helpers import (
    FAST,
    NULL_CLASS,
    copied,
    finished_run,
    read_report,
    snapshot,
    teacher_folder,
    tiny_network,
    write_teacher,
)
from torch import Tensor

import onestill
from onestill.export.export import call_pipeline, load_pipeline
from onestill.runs.evaluate import default_report_folder
from onestill.runs.export import export
from onestill.runs.load import open_student
from onestill.sampling.pictures import to_pil
from onestill.students.model_card import NO_TABLE
from onestill.teachers.load import load_teacher

FEW: dict[str, Any] = {
    "num_samples": 12,
    "steps": (2, 1),
    "num_reference_steps": 2,
    "speed": False,
    "device": "cpu",
}


def write_images(folder: Path, num: int = 12, size: int = 8) -> Path:
    folder.mkdir(parents=True)
    for i, picture in enumerate(to_pil(torch.rand(num, 1, size, size) * 2 - 1)):
        picture.save(folder / f"{i}.png")
    return folder


# sample


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
    with pytest.raises(ValueError, match="--guidance_scale must be a number from 0 up"):
        onestill.sample(teacher=teacher_folder("class"), null_class=NULL_CLASS, guidance_scale=scale)
    with pytest.raises(ValueError, match="--guidance_scale must be a number from 0 up"):
        onestill.evaluate(finished_run("class"), guidance_scale=scale, **FEW)


@pytest.mark.parametrize("given", [{"solver": "heun"}, {"null_class": 1}])
def test_what_only_a_teacher_can_do_is_refused_of_a_student(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(given))} .* is for a teacher"):
        onestill.sample(finished_run("class"), **given)


def test_a_drawn_student_is_evaluated_at_the_scale_asked_for() -> None:
    run = finished_run("drawn")
    low, high = (onestill.evaluate(run, guidance_scale=w, **FEW).rows[-1].frechet_distance for w in (1.0, 3.0))
    assert low is not None and high is not None and abs(low - high) > 1e-6


def test_reference_seeds_are_never_those_of_a_row() -> None:
    report = onestill.evaluate(finished_run(), seed=10_000_000, reference="teacher", **FEW)
    teacher = report.rows[0].frechet_distance
    assert teacher is not None and teacher > 1e-6
    assert report.protocol.reference.endswith("seeds 10000012..")


def test_a_report_never_overwrites_a_picture(tmp_path: Path) -> None:
    (tmp_path / "samples.png").write_text("mine")
    with pytest.raises(ValueError, match="holds a report"):
        onestill.evaluate(finished_run(), output=tmp_path, **FEW)
    assert (tmp_path / "samples.png").read_text() == "mine"


def test_report_folders() -> None:
    run = finished_run()
    assert default_report_folder(run) == default_report_folder(run / "pipeline") == run / "evaluation"
    assert default_report_folder(run / "checkpoint-4") == run / "checkpoint-4" / "evaluation"


def test_sample_goes_round_the_labels() -> None:
    run = finished_run("class")
    every = onestill.sample(run, num_images=4)
    assert (onestill.sample(run, num_images=4, class_labels=[0, 1, 2]) - every).abs().max() <= 1e-6
    assert (onestill.sample(run, num_images=4, class_labels=[2]) - every).abs().max() > 1e-3


def test_sample_is_what_plain_diffusers_gives() -> None:
    pipeline = load_pipeline(finished_run("class") / "pipeline", "cpu")
    # Seed 7 of three classes has class 1.
    expected = call_pipeline(pipeline, range(7, 11), [1, 2, 0, 1])
    assert (onestill.sample(finished_run("class"), num_images=4, seed=7) - expected).abs().max() <= 1e-5


def test_sample_of_the_teacher_nears_its_limit_with_more_steps() -> None:
    def rows(num: int, **settings: Any) -> Tensor:
        return onestill.sample(teacher=teacher_folder(), num_images=2, num_inference_steps=num, **settings)

    limit = rows(32)
    error = [(rows(num) - limit).square().mean() for num in (1, 4, 16)]
    assert error[0] > error[1] > error[2]
    assert (rows(4, solver="midpoint") - limit).square().mean() < error[1]


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
        ({}, "give --student .* or --teacher"),
        ({"student": "a", "teacher": "b"}, "give --student .* or --teacher"),
        ({"student": "a", "num_images": 0}, "--num_images must be at least 1, got 0"),
        ({"student": "a", "batch_size": -1}, "--batch_size must be at least 1, got -1"),
        ({"student": "a", "device": "gpu"}, "--device gpu"),
        ({"student": "a", "solver": "euler"}, "--solver euler: choose one of ddim, heun, midpoint"),
        ({"student": "a", "num_inference_steps": 4}, "a student has one step"),
        ({"teacher": "a", "target_time": 0.5}, "--target_time 0.5 is the student's"),
        ({"student": "no/where"}, "no such folder"),
        ({"teacher": "no where"}, "no such teacher"),
    ],
)
def test_sample_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onestill.sample(**arguments)


# evaluate


def test_evaluate_against_the_teacher_with_its_own_features(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    said: list[str] = []
    report = onestill.evaluate(run, output=run / "evaluation", say=said.append, **{**FEW, "speed": True})
    assert [(row.name, row.num_steps, row.network_evaluations) for row in report.rows] == [
        ("DDIM-2", 2, 2),
        ("DDIM-1", 1, 1),
        ("student", 1, 1),
    ]
    for row in report.rows:
        assert row.frechet_distance is not None and row.frechet_distance >= 0
        assert row.precision is not None and 0 <= row.precision <= 1
        assert row.images_per_second is not None and row.images_per_second > 0
        assert row.kernel_distance is not None and row.label_accuracy is None
    assert report.rows[0].speedup == 1

    protocol = report.protocol
    assert protocol.teacher == str(teacher_folder()) and protocol.student == "run/pipeline"
    assert protocol.num_images == protocol.num_reference_images == 12 and protocol.seeds == "0..11"
    assert "the teacher's own 2-step samples" in protocol.reference and "mid_block" in protocol.extractor
    assert report.warnings and "12" in report.warnings[0]  # far too few images for a number that means something
    assert any("reference" in line for line in said)

    assert read_report(run / "evaluation") == report
    assert (run / "evaluation" / "report.md").read_text(encoding="utf-8") == report.to_markdown()
    with Image.open(run / "evaluation" / "samples.png") as picture:
        picture.load()
    card = (run / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert report.to_markdown() in card and NO_TABLE not in card


def test_evaluate_again_replaces_the_table_and_nothing_silently(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    onestill.evaluate(run, output=run / "evaluation", **FEW)
    before = snapshot(run)
    with pytest.raises(
        ValueError, match="--output .*evaluation holds a report; name another folder, or give --overwrite"
    ):
        onestill.evaluate(run, output=run / "evaluation", seed=5, **FEW)
    assert snapshot(run) == before
    report = onestill.evaluate(run, output=run / "evaluation", seed=5, overwrite=True, **FEW)
    card = (run / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert card.count("onestill evaluate: start") == 1 and report.to_markdown() in card


def test_evaluate_without_output_writes_nothing() -> None:
    run = finished_run()
    before = snapshot(run)
    onestill.evaluate(run, **FEW)
    assert snapshot(run) == before


def test_evaluate_against_a_folder_of_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "real")
    report = onestill.evaluate(finished_run(), reference=folder, **FEW)
    assert report.protocol.reference == "the images in real/" and report.protocol.num_reference_images == 12


def test_evaluate_is_the_same_twice_and_depends_on_the_seed() -> None:
    rows = [onestill.evaluate(finished_run(), seed=seed, **FEW).rows for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_evaluate_of_a_guided_student_guides_the_teacher_as_much() -> None:
    report = onestill.evaluate(finished_run("class"), **FEW)
    assert [row.network_evaluations for row in report.rows] == [4, 2, 1]
    assert report.protocol.guidance_scale == 2
    unguided = onestill.evaluate(finished_run("class"), guidance_scale=1, **FEW)
    assert [row.network_evaluations for row in unguided.rows] == [2, 1, 1]


def test_evaluate_of_a_student_with_drawn_guidance_takes_the_middle() -> None:
    assert onestill.evaluate(finished_run("drawn"), **FEW).protocol.guidance_scale == 2


def test_evaluate_of_an_exported_folder_needs_its_teacher(tmp_path: Path) -> None:
    folder = copied(finished_run("class") / "pipeline", tmp_path / "pipeline")
    with pytest.raises(ValueError, match="name it with --teacher"):
        onestill.evaluate(folder, **FEW)
    report = onestill.evaluate(
        folder, teacher=teacher_folder("class"), null_class=NULL_CLASS, guidance_scale=2, output=tmp_path / "out", **FEW
    )
    assert [row.network_evaluations for row in report.rows] == [4, 2, 1]
    assert report.to_markdown() in (folder / "README.md").read_text(encoding="utf-8")
    inside = onestill.evaluate(finished_run("class"), **FEW)
    found = [row.frechet_distance for row in report.rows]
    assert found == pytest.approx([row.frechet_distance for row in inside.rows], rel=1e-3)


def test_evaluate_of_a_runs_own_pipeline_is_that_of_the_run(tmp_path: Path) -> None:
    for kind in ("class", "drawn"):
        run = copied(finished_run(kind), tmp_path / kind)
        inside, pipeline = (onestill.evaluate(path, **FEW) for path in (run, run / "pipeline"))
        assert pipeline == inside and pipeline.protocol.guidance_scale == 2
    # The teacher is guided as asked; what is baked in stays.
    asked = onestill.evaluate(run / "pipeline", guidance_scale=3, **FEW)
    assert asked.protocol.guidance_scale == 3
    assert open_student(finished_run("null_first") / "pipeline", device=torch.device("cpu")).labels == (1, 2, 3)


def test_evaluate_of_an_exported_folder_guides_the_teacher_as_its_card_says(tmp_path: Path) -> None:
    teacher = teacher_folder("class")
    for kind, scale in (("class", 2), ("null_first", 1)):
        folder = copied(finished_run(kind) / "pipeline", tmp_path / kind)
        report = onestill.evaluate(folder, teacher=teacher, **FEW)
        inside = onestill.evaluate(finished_run(kind), **FEW)
        assert report.protocol.guidance_scale == inside.protocol.guidance_scale == scale
        found, expected = ([row.frechet_distance for row in made.rows] for made in (report, inside))
        assert found == pytest.approx(expected, rel=1e-3)
    # What is baked in, not the middle of the range, also where a run's own pipeline was written again.
    run = copied(finished_run("drawn"), tmp_path / "run")
    export(run, run / "pipeline", guidance_scale=1.5, overwrite=True)
    assert onestill.evaluate(run, **FEW).protocol.guidance_scale == 1.5
    # A foreign config.yaml beside an exported folder makes no run of it.
    (tmp_path / "config.yaml").write_text("model: mine")
    moved = copied(run / "pipeline", tmp_path / "pipeline")
    assert onestill.evaluate(moved, teacher=teacher, **FEW).protocol.guidance_scale == 1.5


def test_evaluate_of_a_folder_that_does_not_say_its_guidance_asks_for_it(tmp_path: Path) -> None:
    folder = copied(finished_run("class") / "pipeline", tmp_path / "out")
    card = folder / "README.md"
    card.write_text(re.sub("onestill_guidance_scale: .*\n", "", card.read_text(encoding="utf-8")), encoding="utf-8")
    where: dict[str, Any] = {"teacher": teacher_folder("class"), "null_class": NULL_CLASS, **FEW}
    with pytest.raises(ValueError, match="does not say what guidance was distilled into it.*--guidance_scale"):
        onestill.evaluate(folder, **where)
    assert onestill.evaluate(folder, guidance_scale=1, **where).protocol.guidance_scale == 1


def test_a_moved_folder_keeps_its_labels_and_its_thresholding(tmp_path: Path) -> None:
    teacher, settings = teacher_folder("class"), {**FAST, "learning_rate": 3e-3, "class_labels": [2, 0]}
    onestill.distill(
        teacher, tmp_path / "run", null_class=NULL_CLASS, thresholding="static", threshold_limit=0.2,
        show_progress=False, **settings,
    )  # fmt: skip
    folder = copied(tmp_path / "run" / "pipeline", tmp_path / "moved")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pipe(batch_size=2, class_labels=[2, 0])" in card, "the card calls it with what it can draw"
    assert open_student(folder, device=torch.device("cpu")).labels == (2, 0)
    inside, moved = onestill.evaluate(tmp_path / "run", **FEW), onestill.evaluate(folder, teacher=teacher, **FEW)
    expected = [row.frechet_distance for row in inside.rows]
    assert [row.frechet_distance for row in moved.rows] == pytest.approx(expected, rel=1e-3)
    # Without its lines it is another one: what is above compares something. What is broken counts as absent.
    for text in (
        re.sub("(?m)^  mode: static$", "  mode: of my own", card),
        re.sub("(?m)^  limit: .*$", "  limit: much", card),
    ):
        assert text != card
        (folder / "README.md").write_text(text, encoding="utf-8")
        other = onestill.evaluate(folder, teacher=teacher, **FEW)
        assert [row.frechet_distance for row in other.rows] != pytest.approx(expected, rel=1e-3)
    (folder / "README.md").write_text(re.sub("(?m)^- 2$", "- two", card), encoding="utf-8")
    assert open_student(folder, device=torch.device("cpu")).labels == (0, 1, 2)


def test_evaluate_where_the_null_class_stands_first() -> None:
    report = onestill.evaluate(finished_run("null_first"), **FEW)
    assert len(report.rows) == 3


def test_evaluate_takes_any_extractor() -> None:
    class Flat:
        name = "pixels"

        def __call__(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    report = onestill.evaluate(finished_run(), features=Flat(), **FEW)
    assert report.protocol.extractor == "pixels" and report.protocol.feature_dim == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 9}, "--num_samples must be at least 10"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"steps": ()}, "--steps must be different numbers"),
        ({"steps": (4, 4)}, "--steps must be different numbers"),
        ({"steps": (4, 0)}, "--steps must be different numbers"),
        ({"num_reference_steps": 0}, "--num_reference_steps must be at least 1"),
        ({"device": "gpu"}, "--device gpu"),
        ({"reference": "no/where"}, "--reference no/where: no such folder"),
        ({"features": "no where"}, "--features: no such file or folder"),
        ({"features": "network.pt"}, "is a pickle"),
        (
            {"clip": "some/clip"},
            "--clip some/clip compares pictures with their prompts, and this teacher takes no text",
        ),
        ({"teacher": "no where"}, "no such teacher"),
        ({"guidance_scale": 2}, "needs a teacher with a null class"),
        ({"class_labels": [1]}, "is unconditional"),
        ({"output": __file__}, "--output .* is a file"),
        ({"output": __file__ + "/out"}, "--output .* is not writable"),
        ({"teacher": "digits"}, "--student has 0 classes and --teacher 10: not the same teacher"),
    ],
)
def test_evaluate_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onestill.evaluate(finished_run(), **{**FEW, **arguments})


def test_evaluate_refuses_a_teacher_with_other_classes() -> None:
    folder = finished_run("class") / "pipeline"
    with pytest.raises(ValueError, match="--student has 3 classes and --teacher 0: not the same teacher"):
        onestill.evaluate(folder, teacher=teacher_folder(), **FEW)


def test_evaluate_refuses_a_teacher_of_another_size(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher", tiny_network(channels=3))
    with pytest.raises(ValueError, match=r"--teacher makes samples of shape \(3, 8, 8\), --student of \(1, 8, 8\)"):
        onestill.evaluate(finished_run(), teacher=teacher, **FEW)


def test_where_a_report_goes_if_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run()
    assert default_report_folder(run) == default_report_folder(run / "pipeline") == run / "evaluation"
    assert default_report_folder(tmp_path / "elsewhere") == tmp_path / "elsewhere-evaluation"
    assert default_report_folder("exports/cat") == Path("exports/cat-evaluation")
    # From inside the folder too.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert default_report_folder(".") == tmp_path / "elsewhere-evaluation"
    monkeypatch.chdir(run / "pipeline")
    assert default_report_folder(".") == run.resolve() / "evaluation"


# export


def test_export_of_a_run_and_of_a_checkpoint(tmp_path: Path) -> None:
    run = finished_run()
    assert export(run, tmp_path / "new") <= 1e-5
    assert set(snapshot(tmp_path / "new")) == set(snapshot(run / "pipeline"))
    same = "unet/diffusion_pytorch_model.safetensors"
    assert snapshot(tmp_path / "new")[same] == snapshot(run / "pipeline")[same]
    export(run / "checkpoint-2", tmp_path / "earlier")
    assert snapshot(tmp_path / "earlier")[same] != snapshot(run / "pipeline")[same]
    assert "exported from checkpoint-2" in (tmp_path / "earlier" / "README.md").read_text(encoding="utf-8")
    assert list(tmp_path.glob(".*")) == []


def test_export_bakes_target_time_and_guidance(tmp_path: Path) -> None:
    run = finished_run("drawn")
    export(run, tmp_path / "low", guidance_scale=1.5, target_time=0.5)
    baked = onestill.sample(tmp_path / "low", num_images=4)
    asked = onestill.sample(run, num_images=4, guidance_scale=1.5, target_time=0.5)
    assert (baked - asked).abs().max() <= 1e-5
    assert "w = 1.5" in (tmp_path / "low" / "README.md").read_text(encoding="utf-8")


def test_export_replaces_only_exports_and_only_when_told(tmp_path: Path) -> None:
    run, output = finished_run(), tmp_path / "out"
    export(run / "checkpoint-2", output)
    before = snapshot(output)
    with pytest.raises(ValueError, match=f"--output {output} exists"):
        export(run, output)
    assert snapshot(output) == before
    export(run, output, overwrite=True)
    assert snapshot(output) != before and [path.name for path in tmp_path.iterdir()] == ["out"]

    precious = write_images(tmp_path / "holiday")
    with pytest.raises(ValueError, match="is no exported student, so --overwrite does not replace it"):
        export(run, precious, overwrite=True)
    assert len(snapshot(precious)) == 12

    teacher = copied(teacher_folder(), tmp_path / "teacher")
    before = snapshot(teacher)
    with pytest.raises(ValueError, match="is no exported student, so --overwrite does not replace it"):
        export(run, teacher, overwrite=True)
    assert snapshot(teacher) == before


@pytest.mark.parametrize(
    ("student", "arguments", "message"),
    [
        (lambda: "no/where", {}, "is no run and no checkpoint-N folder"),
        (lambda: teacher_folder(), {}, "is no run and no checkpoint-N folder"),
        (lambda: finished_run() / "samples", {}, "is corrupt"),
        (finished_run, {"guidance_scale": 2}, "distilled with w = 1 fixed"),
        (finished_run, {"target_time": 2}, "--target_time must be between 0"),
        (finished_run, {"device": "gpu"}, "--device gpu"),
        (lambda: finished_run("drawn"), {"guidance_scale": 9}, "outside 1 to 3"),
    ],
)
def test_export_refuses_and_writes_nothing(
    tmp_path: Path, student: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(student(), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_package_says_what_it_has() -> None:
    for name in onestill.__all__:
        assert getattr(onestill, name) is not None
    for name in ("load_teacher", "distill", "sample", "evaluate"):
        assert callable(getattr(onestill, name))
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = onestill.train  # type: ignore[attr-defined]


def test_report_json_is_plain_json(tmp_path: Path) -> None:
    onestill.evaluate(finished_run(), output=tmp_path / "report", **FEW)
    content = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert content["kind"] == "onestill.Report" and len(content["rows"]) == 3
