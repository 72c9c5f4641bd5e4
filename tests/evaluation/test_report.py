"""The report: round trips, no silent overwriting, and the protocol under every table."""

import io
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console
from runs_helpers import read_report

from onestill.evaluation.report import EvaluationProtocol, Report, Row, package_versions
from onestill.evaluation.tables import print_report


def make_report(*, student_name: str = "student") -> Report:
    protocol = EvaluationProtocol(
        teacher="digits",
        student="runs/digits",
        extractor="ConvFeatures (64-d, sha256 01234567)",
        feature_dim=64,
        num_images=5000,
        reference="the real digits",
        num_reference_images=1797,
        seeds="0..4999",
        guidance_scale=2.0,
        device="NVIDIA H200",
        large_batch_size=256,
        kernel_subset_size=1000,
        kernel_num_subsets=100,
        neighbours=3,
        speedup_over="teacher DDIM",
        versions={"torch": "2.13.0", "diffusers": "0.42.1"},
        notes=("prompts from a file",),
    )
    teacher = Row(
        name="teacher DDIM",
        num_steps=250,
        network_evaluations=500,
        frechet_distance=7.6,
        kernel_distance=0.0192,
        kernel_distance_std=0.0013,
        precision=0.79,
        recall=0.48,
        label_accuracy=0.99,
        images_per_second=0.21,
        images_per_second_large=1234.5,
        speedup=1.0,
    )
    student = Row(
        name=student_name,
        is_student=True,
        num_steps=1,
        network_evaluations=1,
        frechet_distance=225.4,
        kernel_distance=-0.0001,
        kernel_distance_std=0.0113,
        precision=0.1,
        recall=0.0,
        images_per_second=54.0,
        images_per_second_large=23950.0,
        speedup=257.1,
    )
    return Report(protocol=protocol, rows=(teacher, student), warnings=("few images",))


def rendered(report: Report, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    print_report(report, console)
    return console.export_text()


def test_round_trip(tmp_path: Path) -> None:
    report = make_report()
    json_path, markdown_path = report.save(tmp_path / "evaluation")
    assert (json_path.name, markdown_path.name) == ("report.json", "report.md")
    assert read_report(json_path.parent) == report
    assert markdown_path.read_text(encoding="utf-8") == report.to_markdown()


def test_nothing_is_overwritten_silently(tmp_path: Path) -> None:
    make_report().save(tmp_path)
    other = make_report(student_name="another")
    with pytest.raises(ValueError, match=r"output=.*: already holds report.json and report.md; name another"):
        other.save(tmp_path)
    assert read_report(tmp_path) == make_report()
    other.save(tmp_path, overwrite=True)
    assert read_report(tmp_path) == other


def test_half_a_report_counts_as_one(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(ValueError, match="already holds report.md"):
        make_report().save(tmp_path)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("change", [{"frechet_distance": float("nan")}, {"fid": 1.0}])
def test_rows_refuse_nan_and_unknown_columns(change: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Row.model_validate({"name": "x", "num_steps": 1, "network_evaluations": 1, **change})


def test_markdown_table() -> None:
    text = make_report().to_markdown()
    lines = text.splitlines()
    titles = "sampler,steps,NFE,FD↓,KD↓ ×10³,prec↑,rec↑,label↑,img/s ×1,img/s ×256,speedup"
    assert lines[0] == "| " + titles.replace(",", " | ") + " |"
    assert lines[2] == ("| teacher DDIM | 250 | 500 | 7.60 | 19.2 | 0.790 | 0.480 | 0.990 | 0.210 | 1,234 | 1.00× |")
    assert lines[3].startswith("| **student** | **1** | **1** | **225** | **-0.100** |")
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_protocol_and_warnings_stand_beneath_every_table() -> None:
    report = make_report()
    for text in (report.to_markdown(), rendered(report, width=300)):
        for line in report.protocol.lines():
            assert line in text
        for words in (
            "few images",
            "5,000 images per row, seeds 0..4999, guidance scale 2 (1 = none)",
            "compared with 1,797 images: the real digits",
            "sha256 01234567",
            "KD over 100 subsets of 1,000, k = 3",
            "NVIDIA H200",
            "torch 2.13.0",
            "prompts from a file",
            "speedup over teacher DDIM",
        ):
            assert words in text


def test_cells_cannot_break_the_markdown_table() -> None:
    lines = make_report(student_name="a|b").to_markdown().splitlines()
    assert "**a\\|b**" in lines[3]


def test_columns_without_a_number_are_left_out() -> None:
    bare = Row(name="student", num_steps=1, network_evaluations=1, frechet_distance=3.0)
    report = make_report().model_copy(update={"rows": (bare,)})
    header = report.to_markdown().splitlines()[0]
    assert header == "| sampler | steps | NFE | FD↓ |"
    assert "label:" not in report.to_markdown()


def test_terminal_table_fits_100_columns() -> None:
    lines = rendered(make_report()).splitlines()
    assert max(map(len, lines)) <= 100
    (teacher,) = (line for line in lines if line.startswith(" teacher DDIM"))
    for number in ("250", "500", "7.60", "19.2", "0.790", "0.480", "0.990", "0.210", "1,234", "1.00×"):
        assert number in teacher
    assert not any("…" in line for line in lines)


def test_outside_of_a_terminal_a_line_stays_a_line() -> None:
    report, said = make_report(), io.StringIO()
    long = "a warning of many words " * 5
    print_report(report.model_copy(update={"warnings": (long,)}), Console(width=40, file=said))
    lines = said.getvalue().splitlines()
    assert {*report.protocol.lines(), f"warning: {long}"} <= set(lines)
    assert not set(report.protocol.lines()) <= set(rendered(report, width=40).splitlines())


def test_a_report_prints_as_its_table() -> None:
    report = make_report()
    assert str(report) == report.to_markdown() and f"{report}".startswith("| sampler |")


def test_without_speeds_the_protocol_says_nothing_of_speed() -> None:
    protocol = make_report().protocol
    assert "speed on NVIDIA H200, float32, batches of 1 and 256" in protocol.lines()
    silent = protocol.model_copy(update={"large_batch_size": None, "speedup_over": None}).lines()
    assert not [line for line in silent if "speed" in line or "H200" in line]
    assert len(silent) == len(protocol.lines()) - 1


def prompted_report() -> Report:
    """A report with every column that a text student can have."""
    report = make_report()
    shares = {"all": 0.71, "character": 0.93, "color": 1.0, "background": 0.875, "style": 0.95, "family": 0.8}
    teacher, student = (row.model_copy(update={"label_accuracy": None}) for row in report.rows)
    teacher = teacher.model_copy(update={"prompt_accuracy": shares, "clip_score": 31.25, "name": "DDIM-50"})
    student = student.model_copy(update={"clip_score": 29.75})
    protocol = report.protocol.model_copy(update={"clip_model": "openai/clip@0123"})
    return report.model_copy(update={"rows": (teacher, student), "protocol": protocol})


def test_prompts_have_a_column_and_a_table_of_their_parts() -> None:
    lines = prompted_report().to_markdown().splitlines()
    titles = "sampler,steps,NFE,FD↓,KD↓ ×10³,prec↑,rec↑,prompt↑,CLIP↑,img/s ×1,img/s ×256,speedup"
    assert lines[0] == "| " + titles.replace(",", " | ") + " |"
    assert " | 0.710 | 31.2 | " in lines[2] and " | **–** | **29.8** | " in lines[3]
    second = lines.index("| sampler | character↑ | color↑ | background↑ | style↑ | family↑ |")
    assert lines[second - 2] == "Share of pictures that show what their prompt says, part by part:"
    assert lines[second + 2] == "| DDIM-50 | 0.930 | 1.000 | 0.875 | 0.950 | 0.800 |"
    assert lines[second + 3].startswith("| **student** | **–** |")
    assert "- CLIP score with openai/clip@0123: mean of max(100 cos, 0)" in lines
    assert "prompt: share that shows all its prompt says; CLIP: CLIP score" in lines[-1]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_terminal_tables_of_prompts_fit(width: int) -> None:
    lines = rendered(prompted_report(), width).splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    first, second = (line.split() for line in lines if line.startswith(" DDIM-50"))
    assert first == [
        "DDIM-50",
        "250",
        "500",
        "7.60",
        "19.2",
        "0.790",
        "0.480",
        "0.710",
        "31.2",
        "0.210",
        "1,234",
        "1.00×",
    ]
    assert second == ["DDIM-50", "0.930", "1.000", "0.875", "0.950", "0.800"]


def test_reports_of_prompts_come_back(tmp_path: Path) -> None:
    report = prompted_report()
    report.save(tmp_path)
    assert read_report(tmp_path) == report
    assert "part by part" not in make_report().to_markdown()


def test_markup_in_names_is_printed_as_it_is() -> None:
    assert "[red]student" in rendered(make_report(student_name="[red]student"))


def test_package_versions() -> None:
    versions = package_versions(("torch", "no-such-package"))
    assert versions["torch"] and versions["no-such-package"] == "not installed"
