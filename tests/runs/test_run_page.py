"""The page of a run: kept up to date, true to the run's files, and never what a run ends for."""

from __future__ import annotations

import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
from runs_helpers import FAST, copied, finished_run, teacher_folder

import onestill
from browser import opened
from onestill.core.errors import FoundWarning
from onestill.data.conditions import VALIDATION_SEED
from onestill.pages.page import Page
from onestill.runs.folder import RunFolder
from onestill.runs.run_page import PAGE_FILE, command_of, differing, run_page
from onestill.training.config import DistillConfig, make_config
from onestill.training.metrics import MOST_LINES, metrics_of

OWN: dict[str, Any] = {**FAST, "report": True, "validation_steps": 2, "logging_steps": 1, "seed": 7}


def test_a_run_keeps_its_page_up_to_date(tmp_path: Path) -> None:
    seen: dict[int, str] = {}

    def look(log: Any) -> None:
        if log.validation_rms is not None:
            seen[log.step] = (tmp_path / "run" / PAGE_FILE).read_text(encoding="utf-8")

    onestill.distill(teacher_folder(), tmp_path / "run", show_progress=False, on_step=look, **OWN)
    assert list(seen) == [2, 4] and "2 of 4" in seen[2] and "DiffusionPipeline.from_pretrained" not in seen[2]
    page = (tmp_path / "run" / PAGE_FILE).read_text(encoding="utf-8")
    assert "DiffusionPipeline.from_pretrained" in page and "2 of 4" not in page
    assert all(
        words in page for words in ("student, 1 step", "teacher, 2 steps", "torch ", "CPU", "Settings that differ")
    )
    with opened(tmp_path / "run" / PAGE_FILE) as shown:
        seeds = shown.locator("thead th .number").all_inner_texts()
    assert seeds == [str(VALIDATION_SEED + i) for i in range(OWN["num_validation_images"])]
    assert page.count("data:image/png") == 2 * OWN["num_validation_images"]
    assert not [path for path in (tmp_path / "run").iterdir() if "partial" in path.name]
    with opened(tmp_path / "run" / PAGE_FILE) as shown:
        assert shown.heard == [] and shown.locator("figure svg").count() >= 4


def test_without_it_a_run_is_the_same_and_has_no_page() -> None:
    assert not (finished_run() / PAGE_FILE).exists()


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"ema_width": "0.05,0.2", "gradient_checkpointing": True, "guidance_scale": 2.0, "null_class": 3},
        {"recipe": "boot", "anchor_fraction": 1.0, "num_anchors": 300},
        {"num_anchors": 20_000, "max_train_steps": 1000},
        {"class_labels": (1, 2), "negative_prompt": "-- a dash, 'and' \"more\"; $(rm)", "boundary_weight": 1.0},
    ],
    ids=["few", "commas", "a recipe", "what others come to", "lists and dashes"],
)
def test_the_command_on_the_page_is_that_of_the_run(own: dict[str, Any], tmp_path: Path) -> None:
    config = make_config({"teacher": "a b/c", "output_dir": tmp_path / "run", **own})
    words = shlex.split(command_of(config).replace("\\\n", ""))
    assert words[:2] == ["onestill", "distill"] and len(words) >= 6
    config = make_config({name: value for name, value in config.model_dump().items() if name != "budget"})
    assert not {"output_dir", "teacher"} & differing(config).keys()
    found: dict[str, Any] = {}
    it = iter(words[2:])
    for word in it:
        name, is_one, value = word.removeprefix("--").partition("=")
        kind = DistillConfig.model_fields[name.removeprefix("no_")].annotation
        value = not name.startswith("no_") if kind is bool else value if is_one else next(it)  # type: ignore[assignment]
        several = isinstance(getattr(config, name.removeprefix("no_")), tuple) and name != "ema_width"
        found[name.removeprefix("no_")] = (*found.get(name, ()), value) if several else value
    assert make_config({**found, "output_dir": config.output_dir}) == config


def test_damaged_metrics_are_passed_over(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    path = run / "logs" / "metrics.jsonl"
    whole = metrics_of(run)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_bytes("\n".join([*lines, '{"step": "x"}', "[1]", '{"step": 9, "loss": ']).encode() + b"\xff\xfe\n")
    assert metrics_of(run) == whole
    path.unlink()
    assert metrics_of(run) == [] and "digits" not in run_page(RunFolder(run), None).html()


def test_numbers_that_are_none_do_not_end_a_run(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    path = run / "logs" / "metrics.jsonl"
    record = json.loads(path.read_text().splitlines()[-1])
    for own in (
        {"loss": "nan", "grad_norm": "inf", "residual_by_time": [None, "nan"], "seconds_per_step": None},
        {"loss": 10**400, "own_losses": "abc", "states": [], "residual_by_time": "x"},
        {"held_out": {"teacher": {}, "student": {}}},
        {
            "held_out": {
                "teacher": {"1": 1.0},
                "student": {"4": 1.0},
                "num_samples": 9,
                "features": "f",
                "before": "nan",
            }
        },
        {"held_out": {"teacher": [1], "student": {"x": 1.0}}},
        {"held_out": [], "validation_rms": "nan"},
    ):
        path.write_text("".join(json.dumps({**record, "step": step, **own}) + "\n" for step in (1, 2)))
        assert run_page(RunFolder(run), None).html() and onestill.compare([run, finished_run()]).page.html()


def test_very_many_lines_are_thinned_and_validations_kept(tmp_path: Path) -> None:
    run = copied(finished_run(), tmp_path / "run")
    path = run / "logs" / "metrics.jsonl"
    lines = [{"step": i, "loss": 1.0, **({"validation_rms": 0.5} if i % 1000 == 7 else {})} for i in range(1, 20_001)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = metrics_of(run)
    assert len(found) < 1.2 * MOST_LINES and found[-1].step == 20_000
    assert [line.step for line in found if "validation_rms" in line.numbers] == list(range(7, 20_000, 1000))


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, AttributeError])
def test_a_page_that_cannot_be_made_is_warned_of(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Page) -> str:
        raise kind("no such font")

    monkeypatch.setattr(Page, "html", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = onestill.distill(teacher_folder(), tmp_path / "run", show_progress=False, **OWN)
    assert result.pipeline is not None and not (tmp_path / "run" / PAGE_FILE).exists()
    assert any(isinstance(w.message, FoundWarning) and "no such font" in str(w.message) for w in caught)


def test_evaluate_writes_its_page_and_that_of_the_run(tmp_path: Path) -> None:
    run, few = copied(finished_run("class"), tmp_path / "run"), {"num_samples": 12, "steps": (2, 1), "device": "cpu"}
    onestill.evaluate(run, output=run / "evaluation", **few)
    assert (run / "evaluation" / "quality-time.svg").is_file()
    assert not (run / PAGE_FILE).exists(), "it was distilled without a page"
    config = run / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("report: false", "report: true"), encoding="utf-8")
    onestill.evaluate(run, output=run / "evaluation", speed=False, overwrite=True, **few)
    assert not (run / "evaluation" / "quality-time.svg").exists(), "which is of the report that was there"
    names = {path.name for path in (run / "evaluation").iterdir()}
    assert {"report.html", "report.json", "report.md", "samples.png", "quality-steps.svg", "quality-steps.png"} <= names
    for path in (run / PAGE_FILE, run / "evaluation" / PAGE_FILE):
        page = path.read_text(encoding="utf-8")
        assert "DDIM-2" in page and "class 0" in page and "Quality against sampling steps" in page
    assert "The same run again" in (run / PAGE_FILE).read_text(encoding="utf-8")
    before = (run / PAGE_FILE).read_bytes()
    onestill.evaluate(run, output=tmp_path / "elsewhere", speed=False, **few)
    assert (run / PAGE_FILE).read_bytes() == before


@pytest.mark.parametrize("name", ["report.html", "quality-steps.png"])
def test_evaluate_overwrites_no_page_and_no_plot_of_others(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="output=.*: holds a report"):
        onestill.evaluate(finished_run(), output=tmp_path, num_samples=12, steps=(1,), speed=False)
    assert (tmp_path / name).read_text() == "mine"
