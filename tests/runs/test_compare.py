"""`compare`: runs side by side, from what they have written, and only where numbers may be compared."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from runs_helpers import call_cli, copied, finished_run, snapshot

import onestill
from browser import opened
from onestill.evaluation.merged import DECIDING, OF_THE_TEACHER, merged
from onestill.evaluation.report import Report
from onestill.runs.evaluate import evaluate


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one teacher, both evaluated alike, and one that was not evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    found = [
        copied(finished_run(kind), folder / name) for name, kind in {"a": "class", "b": "drawn", "c": "plain"}.items()
    ]
    for run in found[:2]:
        evaluate(
            run, guidance_scale=2.0, num_samples=12, steps=(2, 1), speed=False, output=run / "evaluation", device="cpu"
        )
    return found


def test_students_stand_beside_the_teacher_that_they_share(runs: list[Path], tmp_path: Path) -> None:
    before = [snapshot(run) for run in runs]
    found = onestill.compare(runs[:2], output=tmp_path / "out")
    assert found.report is not None
    assert [row.name for row in found.report.rows] == ["DDIM-2", "DDIM-1", "a: student", "b: student"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", "report.json", "quality-steps.svg"}
    assert [snapshot(run) for run in runs] == before
    with opened(tmp_path / "out" / "report.html") as page:
        text = page.inner_text("body")
        assert page.heard == [] and "a: student" in text and "guidance_scale_min" in text
        assert page.locator("img.sheet").count() == 2


def test_a_run_that_was_not_evaluated_is_named(runs: list[Path], tmp_path: Path) -> None:
    found = onestill.compare(runs, output=tmp_path)
    assert found.report is None and "Not evaluated yet: c" in found.page.lead[0] and len(found.summary.rows) == 3
    said = call_cli("compare", *map(str, runs), "--output", str(tmp_path / "x"), "--format", "csv")
    assert said.code == 2 and "--format csv: needs a table of all runs; not all runs were evaluated" in said.err


def test_runs_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    one, other = (copied(runs[0], tmp_path / name / "run") for name in "xy")
    assert [row[0] for row in onestill.compare([one, other]).summary.rows] == ["x/run", "y/run"]


def test_intervals_of_different_resamples_are_left_out(runs: list[Path]) -> None:
    report = Report.model_validate_json((runs[0] / "evaluation" / "report.json").read_text())
    alike = merged({"a": report, "b": report})
    assert alike.protocol.resamples == 1000
    assert all("frechet_distance" in row.intervals for row in alike.rows)
    rows = tuple(row.model_copy(update={"intervals": {}}) for row in report.rows)
    protocol = report.protocol.model_copy(update={"resamples": None})
    without = merged({"a": report, "b": report.model_copy(update={"rows": rows, "protocol": protocol})})
    assert [row.name for row in without.rows] == [row.name for row in alike.rows]
    assert without.protocol.resamples is None and not any(row.intervals for row in without.rows)


@pytest.mark.parametrize("field", [*DECIDING, *OF_THE_TEACHER])
def test_numbers_of_different_kinds_are_not_put_together(field: str, runs: list[Path]) -> None:
    report = Report.model_validate_json((runs[0] / "evaluation" / "report.json").read_text())
    value = getattr(report.protocol, field)
    other = (*value, "x") if isinstance(value, tuple) else value + 1 if isinstance(value, int) else f"{value}x"
    changed = report.protocol.model_copy(update={field: other})
    with pytest.raises(ValueError, match=f"a and b were evaluated in different ways: {field} is "):
        merged({"a": report, "b": report.model_copy(update={"protocol": changed})})


def test_a_row_that_is_not_the_same_is_not_shared(runs: list[Path]) -> None:
    report = Report.model_validate_json((runs[0] / "evaluation" / "report.json").read_text())
    first, *rest = report.rows
    other = report.model_copy(update={"rows": (first.model_copy(update={"frechet_distance": 99.0}), *rest)})
    found = {row.name: row.frechet_distance for row in merged({"a": report, "b": other}).rows}
    assert found["DDIM-2"] == first.frechet_distance and found["b: DDIM-2"] == 99.0 and "b: DDIM-1" not in found


def test_students_of_two_runs_are_two_curves(runs: list[Path]) -> None:
    found = onestill.compare(runs[:2])
    (plot,) = (plot for plot in found.page.plots if plot.name == "quality-steps")
    assert [curve.name for curve in plot.curves] == ["DDIM", "a: student", "b: student"]
    assert len({curve.color for curve in plot.curves}) == 3


def test_runs_that_were_evaluated_otherwise_have_a_page_without_a_common_table(
    runs: list[Path], tmp_path: Path
) -> None:
    other = copied(runs[0], tmp_path / "other")
    path = other / "evaluation" / "report.json"
    report = Report.model_validate_json(path.read_text())
    protocol = report.protocol.model_copy(update={"num_images": 99})
    path.write_text(report.model_copy(update={"protocol": protocol}).model_dump_json())
    found = onestill.compare([runs[0], other], output=tmp_path / "out")
    assert found.report is None and "num_images is 12 and 99" in found.page.warnings[0]
    assert (tmp_path / "out" / "report.html").is_file() and not (tmp_path / "out" / "report.json").exists()
    said = call_cli("compare", str(runs[0]), str(other), "--format", "csv")
    assert said.code == 2 and "num_images is 12 and 99" in said.err


def test_speeds_of_other_machines_are_left_out(runs: list[Path]) -> None:
    report = Report.model_validate_json((runs[0] / "evaluation" / "report.json").read_text())
    timed = report.model_copy(
        update={
            "rows": tuple(row.model_copy(update={"images_per_second": 2.0, "speedup": 3.0}) for row in report.rows),
            "protocol": report.protocol.model_copy(update={"large_batch_size": 64, "speedup_over": "DDIM-2"}),
        }
    )
    assert all(row.speedup == 3.0 for row in merged({"a": timed, "b": timed}).rows)
    elsewhere = timed.model_copy(update={"protocol": timed.protocol.model_copy(update={"device": "another"})})
    assert all(row.speedup is row.images_per_second is None for row in merged({"a": timed, "b": elsewhere}).rows)


def test_the_command_prints_tables_and_writes_where_it_is_told(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(run) for run in runs[:2]]
    said = call_cli("compare", *words, "--format", "csv")
    assert said.code == 0 and len(list(csv.DictReader(io.StringIO(said.out)))) == 4 and not list(tmp_path.iterdir())
    said = call_cli("compare", "--runs", words[0], "--runs", words[1])
    assert said.code == 0 and "page: comparison/report.html" in said.out and "a: student" in said.out
    again = call_cli("compare", *words)
    assert again.code == 2 and "--output comparison: holds report.html" in again.err
    assert call_cli("compare", *words, "--overwrite").code == 0


@pytest.mark.parametrize("name", ["quality-time.png", "report.json", "loss.svg"])
def test_no_file_of_others_is_lost(name: str, runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    trained = [copied(run, tmp_path.parent / f"{tmp_path.name}-{run.name}") for run in runs[1:]]  # no table, no speeds
    for run in trained:
        path = run / "logs" / "metrics.jsonl"
        line = path.read_text().splitlines()[-1]
        path.write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match=f"output=.*: holds {name}"):
        onestill.compare(trained, output=tmp_path)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["A"], "are 1, and from 2 to 12"),
        (["A", "A"], "is given twice"),
        (["A", "nowhere"], "nowhere: is no run"),
        (["A", ""], "is empty"),
        (["A", "B", "--output", "FILE"], "is a file"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], why: str, runs: list[Path], tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    places = {"A": str(runs[0]), "B": str(runs[1]), "FILE": str(file)}
    said = call_cli("compare", *(places.get(word, word) for word in words))
    assert said.code == 2 and why in said.err and "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == [file]
