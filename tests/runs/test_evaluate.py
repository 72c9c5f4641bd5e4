"""`evaluate` of whole runs: what is compared with what, where the report goes, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
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
from onestill.core.settings import make
from onestill.evaluation import choice
from onestill.evaluation.config import EvaluateConfig
from onestill.evaluation.inception import InceptionFeatures
from onestill.evaluation.samples import Subjects
from onestill.runs import evaluate as evaluate_module
from onestill.runs.evaluate import default_report_folder
from onestill.runs.export import export
from onestill.runs.folder import RunFolder
from onestill.runs.load import load_student
from onestill.sampling.pictures import to_pil
from onestill.students.model_card import NO_TABLE

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


@pytest.mark.parametrize("scale", [float("nan"), -3.0, float("inf")])
def test_guidance_that_is_no_scale_is_refused_before_any_work(scale: float) -> None:
    with pytest.raises(ValueError, match="guidance_scale=.*: must be (a finite number|at least 0)"):
        onestill.evaluate(finished_run("class"), guidance_scale=scale, **FEW)


def test_settings_come_from_a_file_and_arguments_win(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("num-samples: 12\nsteps: 2,1\nnum_reference_steps: 2\nspeed: false\nseed: 3\n")
    (tmp_path / "other.yaml").write_text("num_sample: 12")
    run = finished_run()
    report = onestill.evaluate(run, config_file=tmp_path / "e.yaml", seed=0, device="cpu")
    assert report == onestill.evaluate(run, **FEW)
    assert report.protocol.seeds == "0..11"
    with pytest.raises(ValueError, match="unknown setting 'num_sample'; did you mean 'num_samples'?"):
        onestill.evaluate(run, config_file=tmp_path / "other.yaml")
    with pytest.raises(ValueError, match="unknown setting 'sead'; did you mean 'seed'?"):
        onestill.evaluate(run, sead=1)


def test_a_drawn_student_is_evaluated_at_the_scale_asked_for() -> None:
    run = finished_run("drawn")
    low, high = (onestill.evaluate(run, guidance_scale=w, **FEW).rows[-1].frechet_distance for w in (1.0, 3.0))
    assert low is not None and high is not None and abs(low - high) > 1e-6


def test_a_student_of_several_steps_has_a_row_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run()
    with pytest.raises(ValueError, match=r"student_steps=\(1, 4\): this student was trained for one step"):
        onestill.evaluate(run, student_steps=(1, 4), **FEW)
    with pytest.raises(ValueError, match=r"student_steps=\(1, 1\): must be different numbers"):
        onestill.evaluate(run, student_steps=(1, 1), **FEW)
    monkeypatch.setattr(RunFolder, "is_map", True)
    report, one = onestill.evaluate(run, student_steps=(1, 4), **FEW), onestill.evaluate(run, **FEW)
    told = [(row.name, row.num_steps, row.network_evaluations, row.is_student) for row in report.rows[2:]]
    assert told == [("student", 1, 1, True), ("student, 4 steps", 4, 4, True)]
    assert report.rows[:3] == one.rows and report.rows[3].frechet_distance != report.rows[2].frechet_distance


def test_solvers_are_compared_side_by_side() -> None:
    run = finished_run()
    report = onestill.evaluate(run, solver=("ddim", "dpmsolver++"), **{**FEW, "steps": (4, 2)})
    told = [(row.name, row.num_steps, row.network_evaluations) for row in report.rows]
    names = ("DDIM-4", "DDIM-2", "DPM++-4", "DPM++-2")
    assert told == [*((name, int(name[-1]), int(name[-1])) for name in names), ("student", 1, 1)]
    distances = [row.frechet_distance for row in report.rows]
    assert distances[0] != distances[2] and distances[1] == distances[3], "two steps are both of order 1"
    with pytest.raises(ValueError, match="solver=.*must be different solvers"):
        onestill.evaluate(run, solver=("ddim", "ddim"), **FEW)


def test_the_interval_of_guidance_is_kept_by_the_run_and_by_the_folder(tmp_path: Path) -> None:
    teacher, interval = teacher_folder("class"), {"guidance_interval_min": 0.2, "guidance_interval_max": 0.8}
    onestill.distill(
        teacher, tmp_path / "run", null_class=NULL_CLASS, guidance_scale=3.0, show_progress=False, **interval, **FAST
    )
    assert RunFolder(tmp_path / "run").config.guidance_interval == (0.2, 0.8)
    folder = copied(tmp_path / "run" / "pipeline", tmp_path / "moved")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "w = 3 in u + w (c - u); at 0.2 < t <= 0.8 alone (0 clean, 1 noise)" in card
    few = {**FEW, "steps": (10, 2)}
    inside, moved = onestill.evaluate(tmp_path / "run", **few), onestill.evaluate(folder, teacher=teacher, **few)
    for report in (inside, moved):
        # Of ten steps those at 0.8, 0.7 ... 0.3 are guided, of two the one at 0.5.
        assert [row.network_evaluations for row in report.rows] == [16, 3, 1]
        assert "teacher guided at 0.2 < t <= 0.8, w = 1 elsewhere" in report.protocol.notes
    found, expected = ([row.frechet_distance for row in made.rows] for made in (moved, inside))
    assert found == pytest.approx(expected, rel=1e-3)
    other = onestill.evaluate(folder, teacher=teacher, guidance_interval_max=0.4, **few)
    assert [row.network_evaluations for row in other.rows] == [14, 2, 1]
    assert [
        row.network_evaluations for row in onestill.evaluate(folder, teacher=teacher, guidance_scale=1, **few).rows
    ] == [10, 2, 1]


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
        ValueError, match="output=.*evaluation': holds a report; name another folder, or give overwrite"
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


def test_a_reference_is_kept_and_taken_as_a_mean_and_a_covariance(tmp_path: Path) -> None:
    run, kept = finished_run(), tmp_path / "stats.npz"
    of_images = onestill.evaluate(run, save_reference=kept, **FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]
    report = onestill.evaluate(run, reference=kept, **FEW)
    found, expected = ([row.frechet_distance for row in made.rows] for made in (report, of_images))
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(row.kernel_distance is row.precision is row.recall is None for row in report.rows)
    assert all(set(row.intervals) == {"frechet_distance"} for row in report.rows)
    protocol = report.protocol
    assert protocol.notes == (
        "no kernel distance, precision or recall: of the reference, a mean and a covariance alone are known",
    )
    assert protocol.reference.startswith("the mean and covariance in stats.npz (sha256 ")
    assert (protocol.num_reference_images, protocol.neighbours, protocol.kernel_subset_size) == (12, None, None)
    other = tmp_path / "other.npz"
    with np.load(kept) as arrays:
        np.savez(other, mu=arrays["mu"], sigma=arrays["sigma"], features="another network")
        np.savez(kept, mu=arrays["mu"], sigma=arrays["sigma"])
    with pytest.raises(
        ValueError, match="reference=.*is of other features: another network, and not the teacher's own"
    ):
        onestill.evaluate(run, reference=other, **FEW)
    # A file as others write it does not say of how many images it is.
    usual = onestill.evaluate(run, reference=kept, **FEW)
    assert usual.protocol.num_reference_images is None and "compared with the mean and covariance" in str(usual)
    assert usual.rows == report.rows


def test_inception_features_bring_the_inception_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Small(InceptionFeatures):
        def __call__(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    network = torch.nn.Module()
    network.fc = torch.nn.Linear(64, 5)
    extractor = Small(network, "small inception")  # type: ignore[arg-type]
    monkeypatch.setattr(choice, "load_inception", lambda path, device: extractor if path == tmp_path / "w" else None)
    settings: dict[str, Any] = {**FEW, "steps": (1,), "features": "inception", "features_weights": tmp_path / "w"}
    report = onestill.evaluate(finished_run(), **settings)
    assert (report.protocol.feature_dim, report.protocol.extractor) == (64, "small inception")
    for row in report.rows:
        assert row.inception_score is not None and row.inception_score >= 1
        low, high = row.intervals["inception_score"]
        assert low <= row.inception_score <= high
    assert " IS↑ " in str(report) and "IS: Inception Score" in str(report)


def test_a_protocol_sets_what_is_in_its_name() -> None:
    class Mine:
        name = "mine"

        def __call__(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    weights: dict[str, Any] = {"protocol": "fid50k", "features_weights": "w.pth", "student": finished_run()}
    config = make(EvaluateConfig, weights)
    assert (config.num_samples, config.seed, config.features, config.class_labels) == (50_000, 0, "inception", ())
    assert make(EvaluateConfig, {**weights, "num_samples": 50_000, "steps": (8,)}).steps == (8,)
    for name, value in (("num_samples", 10_000), ("seed", 1), ("features", "digits"), ("class_labels", [1])):
        with pytest.raises(ValueError, match=f"^{name}=.*: protocol fid50k has .*; leave out one of the two"):
            make(EvaluateConfig, {**weights, name: value})
    with pytest.raises(ValueError, match="features='Mine': is an object, and protocol fid50k has inception"):
        onestill.evaluate(**weights, features=Mine())


def test_a_protocol_is_said_first_and_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    config = EvaluateConfig(student=finished_run(), **{**FEW, "features": "teacher"}).model_copy(
        update={"protocol": "fid50k"}
    )
    monkeypatch.setattr(evaluate_module, "_configured", lambda *_: config)
    report = onestill.evaluate(finished_run(), say=said.append)
    line = "protocol fid50k: 12 images a row, seeds 0..11, teacher features"
    assert line in said and line in report.protocol.notes
    with_labels = evaluate_module._said_of(config, Subjects(class_labels=(0, 1)))
    assert with_labels == "12 images a row, seeds 0..11, all labels in turn, teacher features"


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
    with pytest.raises(ValueError, match="name it with teacher"):
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
    assert load_student(finished_run("null_first") / "pipeline").sampler.labels == (1, 2, 3)


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
    with pytest.raises(ValueError, match="guidance_scale: .* does not say what was distilled into it.*say which w"):
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
    assert load_student(folder).sampler.labels == (2, 0)
    inside, moved = onestill.evaluate(tmp_path / "run", **FEW), onestill.evaluate(folder, teacher=teacher, **FEW)
    expected = [row.frechet_distance for row in inside.rows]
    assert [row.frechet_distance for row in moved.rows] == pytest.approx(expected, rel=1e-3)
    # Without its lines it is another one: what is above compares something.
    text = re.sub("(?m)^  mode: static$", "  mode: none", card)
    assert text != card
    (folder / "README.md").write_text(text, encoding="utf-8")
    other = onestill.evaluate(folder, teacher=teacher, **FEW)
    assert [row.frechet_distance for row in other.rows] != pytest.approx(expected, rel=1e-3)
    for old, new in (("  mode: static", "  mode: of my own"), ("- 2", "- two")):  # what is broken is not guessed
        (folder / "README.md").write_text(card.replace(f"\n{old}\n", f"\n{new}\n"), encoding="utf-8")
        with pytest.raises(ValueError, match="the front matter of .*README.md does not say what it should"):
            load_student(folder)


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
        ({"num_samples": 9}, "num_samples=9: must be at least 10"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"steps": ()}, r"steps=\(\): must be different numbers"),
        ({"steps": (4, 4)}, r"steps=\(4, 4\): must be different numbers"),
        ({"steps": "4,0"}, "steps='0': must be at least 1"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"num_reference_steps": 0}, "num_reference_steps=0: must be at least 1"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"reference": "no/where"}, "reference='no/where': no such folder"),
        ({"features": "no where"}, "features='no where': no such file or folder"),
        ({"features": "network.pt"}, "is a pickle"),
        (
            {"clip": "some/clip"},
            "clip='some/clip': compares pictures with their prompts, and this teacher takes no text",
        ),
        ({"teacher": "no where"}, "no such teacher"),
        ({"guidance_scale": 2}, "needs a teacher with a null class"),
        ({"class_labels": [1]}, "is unconditional"),
        ({"output": __file__}, "output=.*: is a file"),
        ({"output": __file__ + "/out"}, "output=.*: cannot be there: .* is no folder"),
        ({"teacher": "digits"}, "teacher='digits': has 10 classes and student 0; not the same teacher"),
    ],
)
def test_evaluate_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onestill.evaluate(finished_run(), **{**FEW, **arguments})


def test_evaluate_refuses_a_teacher_with_other_classes() -> None:
    folder = finished_run("class") / "pipeline"
    with pytest.raises(ValueError, match="teacher=.*: has 0 classes and student 3; not the same teacher"):
        onestill.evaluate(folder, teacher=teacher_folder(), **FEW)


def test_evaluate_refuses_a_teacher_of_another_size(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher", tiny_network(channels=3))
    with pytest.raises(ValueError, match=r"teacher=.*: makes samples of shape \(3, 8, 8\), student of \(1, 8, 8\)"):
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


def test_report_json_is_plain_json(tmp_path: Path) -> None:
    onestill.evaluate(finished_run(), output=tmp_path / "report", **FEW)
    content = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert content["kind"] == "onestill.Report" and len(content["rows"]) == 3
