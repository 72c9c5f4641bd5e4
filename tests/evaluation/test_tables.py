"""Tables in the forms of other programs: nothing is lost, and no name breaks one."""

import csv
import io

import pytest
from runs_helpers import call_cli
from test_report import make_report, rendered

from onestill.evaluation.report import Report
from onestill.evaluation.tables import as_csv, as_latex, in_format


def with_heads() -> Report:
    report = make_report()
    teacher, student = report.rows
    heads = {"prompt_accuracy": {"all": 0.25, "colour": 1 / 3}}
    return report.model_copy(update={"rows": (teacher, student.model_copy(update=heads))})


def test_csv_has_every_digit_and_nothing_where_nothing_was_measured() -> None:
    report = with_heads()
    teacher, student = csv.DictReader(io.StringIO(as_csv(report)))
    assert float(student["prompt_accuracy.colour"]) == 1 / 3 and teacher["prompt_accuracy.colour"] == ""
    assert float(student["kernel_distance"]) == -0.0001 and student["label_accuracy"] == ""
    assert (teacher["is_student"], student["is_student"]) == ("False", "True")
    named = {name for name in teacher if not name.startswith("prompt_accuracy.")}
    assert named == set(type(report.rows[0]).model_fields) - {"prompt_accuracy", "intervals"}


def with_intervals() -> Report:
    report = with_heads()
    teacher, student = report.rows
    ends = {"frechet_distance": (7.0, 8.5), "kernel_distance": (0.0191, 0.0194), "precision": (0.78, 0.8001)}
    more = {"frechet_distance": (225.1, 225.7), "prompt_accuracy.all": (0.2, 0.3)}
    rows = teacher.model_copy(update={"intervals": ends}), student.model_copy(update={"intervals": more})
    protocol = report.protocol.model_copy(update={"resamples": 1000})
    return report.model_copy(update={"rows": rows, "protocol": protocol})


def test_numbers_stand_with_half_of_their_intervals() -> None:
    report = with_intervals()
    text = report.to_markdown()
    # To the decimals of the number; to the first digit where that is less.
    assert "| teacher DDIM | 250 | 500 | 7.60 ± 0.75 | 19.2 ± 0.2 | 0.790 ± 0.010 | 0.480 |" in text
    assert "| **student** | **1** | **1** | **225 ± 0.3** | **-0.100** |" in text and "**0.250 ± 0.050**" in text
    assert "- ± half of the 95% interval over 1,000 resamples of a row's images" in text
    assert r"7.60 $\pm$ 0.75" in as_latex(report)
    assert Report.model_validate_json(in_format(report, "json")) == report


def test_csv_has_the_ends_of_intervals() -> None:
    teacher, student = csv.DictReader(io.StringIO(as_csv(with_intervals())))
    assert (teacher["frechet_distance.low"], teacher["frechet_distance.high"]) == ("7.0", "8.5")
    assert (student["prompt_accuracy.all.high"], student["precision.low"]) == ("0.3", "")
    assert "intervals" not in teacher


def test_on_a_terminal_an_interval_stands_below_its_number() -> None:
    lines = rendered(with_intervals(), width=100).splitlines()
    row = next(i for i, line in enumerate(lines) if "teacher DDIM" in line)
    assert "±" not in lines[row] and lines[row + 1].split() == ["±0.75", "±0.2", "±0.010"]
    assert lines[row].index("7.60") + 4 == lines[row + 1].index("±0.75") + 5, "set to the right"
    assert max(map(len, lines[row - 3 : row + 4])) <= 100


def test_csv_of_a_hostile_name_is_one_cell() -> None:
    name = 'a,"b"\nc;=1+1'
    assert [row["name"] for row in csv.DictReader(io.StringIO(as_csv(make_report(student_name=name))))][1] == name


def test_latex_is_a_table_of_equal_rows_with_students_in_bold() -> None:
    text = as_latex(with_heads())
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert lines.count(r"\toprule") == lines.count(r"\bottomrule") == 2
    rows = [line for line in lines if line.endswith(r"\\")]
    assert [line.count("&") for line in rows] == [11] * 3 + [1] * 3
    assert rows[2].startswith(r"\textbf{student} & \textbf{1} & ") and r"\textbf{225}" in rows[2]
    assert r"FD $\downarrow$" in rows[0] and r"KD $\downarrow$ $\times$10$^3$" in rows[0]
    assert all(f"% {line}" in text.splitlines() for line in make_report().protocol.lines())


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("50% & more_of #1", r"50\% \& more\_of \#1"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("a^b~c<d>", r"a\textasciicircum{}b\textasciitilde{}c\textless{}d\textgreater{}"),
    ],
)
def test_latex_of_a_hostile_name_is_text(name: str, shown: str) -> None:
    assert rf"\textbf{{{shown}}} & " in as_latex(make_report(student_name=name))


def test_a_comment_of_latex_stays_one() -> None:
    report = make_report()
    protocol = report.protocol.model_copy(update={"notes": ("one\n\\input{x}",)})
    assert "\n\\input" not in as_latex(report.model_copy(update={"protocol": protocol}))


def test_json_loads_again() -> None:
    assert Report.model_validate_json(in_format(with_heads(), "json")) == with_heads()


def test_one_form_is_printed() -> None:
    found = call_cli("evaluate", "somewhere", "--json", "--format", "csv")
    assert found.code == 2 and "--format csv: and JSON are two forms" in found.err
    found = call_cli("evaluate", "somewhere", "--format", "excel")
    assert found.code == 2 and "excel" in found.err and "latex" in found.err
