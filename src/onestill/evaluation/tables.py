"""A report as a table: for a terminal, Markdown, LaTeX, and as CSV for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from onestill.evaluation.config import Format
from onestill.evaluation.heads import ALL
from onestill.evaluation.rows import EvaluationProtocol, Row

if TYPE_CHECKING:
    from rich.console import Console


HEADS_TITLE = "Share of pictures that show what their prompt says, part by part"
MISSING, SPREAD = "–", " ± "
# Of the signs that tables have, those that LaTeX reads as something else, or has no letter for.
_LATEX: Final = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"},
        **{
            ">": r"\textgreater{}",
            "↑": r" $\uparrow$",
            "↓": r" $\downarrow$",
            "×": r"$\times$",
            "³": "$^3$",
            "–": "--",
            "±": r"$\pm$",
        },
    }
)


class Reported(Protocol):
    """What a table is made of: an `onestill.evaluation.report.Report`."""

    @property
    def protocol(self) -> EvaluationProtocol:
        """How the numbers were made."""

    @property
    def rows(self) -> Sequence[Row]:
        """A sampler each."""

    @property
    def warnings(self) -> Sequence[str]:
        """What has to be known first."""

    def model_dump_json(self, *, indent: int | None = None) -> str:
        """Return all of it as JSON."""


class Column(NamedTuple):
    """A column: its title, what it says of a row, what its title means, and whether it is set to the left."""

    title: str
    cell: Callable[[Row], str]
    legend: str = ""
    left: bool = False


def columns_of(report: Reported) -> list[Column]:
    """Return the columns that a report has something to say in."""
    large, baseline = report.protocol.large_batch_size, report.protocol.speedup_over
    columns = [
        Column("sampler", lambda row: row.name, left=True),
        Column("steps", lambda row: f"{row.num_steps:,}"),
        Column("NFE", lambda row: f"{row.network_evaluations:,}", "NFE: network evaluations per image"),
        Column("FD↓", partial(_measured, name="frechet_distance"), "FD: Fréchet distance"),
        Column("KD↓\n×10³", partial(_measured, name="kernel_distance", scale=1e3), "KD: kernel distance"),
        Column("IS↑", partial(_measured, name="inception_score"), "IS: Inception Score"),
        Column("prec↑", partial(_share, name="precision")),
        Column("rec↑", partial(_share, name="recall")),
        Column("label↑", partial(_share, name="label_accuracy"), "label: share that shows its label"),
        Column("prompt↑", lambda row: _of_head(row, ALL), "prompt: share that shows all its prompt says"),
        Column("CLIP↑", partial(_measured, name="clip_score"), "CLIP: CLIP score"),
        Column("img/s\n×1", lambda row: number(row.images_per_second), "×B: images per second in batches of B"),
        Column(f"img/s\n×{large:,}" if large else "img/s\nlarge", lambda row: number(row.images_per_second_large)),
        Column("speedup", lambda row: number(row.speedup, "×"), f"speedup over {baseline}" if baseline else ""),
    ]
    # The first three always are; a table without rows has no others.
    measured = [column for column in columns[3:] if any(column.cell(row) != MISSING for row in report.rows)]
    return [*columns[:3], *measured]


def head_columns_of(report: Reported) -> list[Column]:
    """Return the columns of the second table, one for each head; empty where prompts were not judged by heads."""
    heads = list(dict.fromkeys(name for row in report.rows for name in row.prompt_accuracy or {} if name != ALL))
    columns = [Column(f"{name}↑", partial(_of_head, name=name)) for name in heads]
    return [Column("sampler", lambda row: row.name, left=True), *columns] if heads else []


def legend(columns: Sequence[Column]) -> str:
    """Return what the columns' titles mean, in a line."""
    return "; ".join(column.legend for column in columns if column.legend)


def number(value: float | None, unit: str = "", scale: float = 1) -> str:
    """Return three significant digits, never an exponent for what a reader compares by eye."""
    if value is None:
        return MISSING
    value *= scale
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{decimals}f}{unit}"


def _measured(row: Row, name: str, scale: float = 1) -> str:
    """Return a number of a row with half of its interval: "0.692 ± 0.061"."""
    return _with_spread(row, name, number(getattr(row, name), scale=scale), scale)


def _share(row: Row, name: str) -> str:
    return _with_spread(row, name, _in_thousandths(getattr(row, name)))


def _of_head(row: Row, name: str) -> str:
    return _with_spread(row, f"prompt_accuracy.{name}", _in_thousandths((row.prompt_accuracy or {}).get(name)))


def _in_thousandths(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _with_spread(row: Row, name: str, text: str, scale: float = 1) -> str:
    """Return a number as it is shown, with half of its interval to as many decimals, or to its first digit."""
    if name not in row.intervals or text == MISSING:
        return text
    low, high = row.intervals[name]
    half, decimals = scale * (high - low) / 2, len(text.partition(".")[2])
    if 0 < half < 0.5 * 10**-decimals:
        decimals = min(-math.floor(math.log10(half)), 9)
    return f"{text}{SPREAD}{half:,.{decimals}f}"


# The forms


def in_format(report: Reported, form: Format) -> str:
    """Return a report as text in a form that other programs read, with a line break at its end."""
    return {"json": as_json, "markdown": as_markdown, "csv": as_csv, "latex": as_latex}[form](report)


def as_json(report: Reported) -> str:
    """Return all of a report, as `report.json` has it."""
    return report.model_dump_json(indent=2) + "\n"


def as_markdown(report: Reported) -> str:
    """Return the table, the warnings and the protocol as GitHub-flavoured Markdown."""
    columns, heads = columns_of(report), head_columns_of(report)
    blocks = [_markdown_table(columns, report.rows)]
    if heads:
        blocks += [f"{HEADS_TITLE}:", _markdown_table(heads, report.rows)]
    if report.warnings:
        blocks.append("\n".join(f"> **Warning:** {warning}" for warning in report.warnings))
    blocks.append("\n".join(["Protocol:", ""] + [f"- {line}" for line in report.protocol.lines()]))
    blocks.append(legend(columns))
    return "\n\n".join(blocks) + "\n"


def as_csv(report: Reported) -> str:
    """Return the rows with every digit: a column for each field of `Row`, and of `prompt_accuracy` one for each head.

    The ends of a number's interval stand in columns of its name with `.low` and `.high`. What was not measured is empty.
    """
    ends = list(dict.fromkeys(name for row in report.rows for name in row.intervals))
    heads = list(dict.fromkeys(name for row in report.rows for name in row.prompt_accuracy or {}))
    lines = []
    for row in report.rows:
        found = row.model_dump(exclude={"prompt_accuracy", "intervals"})
        found |= {f"prompt_accuracy.{name}": (row.prompt_accuracy or {}).get(name) for name in heads}
        for name in ends:
            found |= dict(zip((f"{name}.low", f"{name}.high"), row.intervals.get(name, (None, None)), strict=True))
        lines.append(found)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else ["name"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_latex(report: Reported) -> str:
    """Return the tables for LaTeX's booktabs, students in bold; warnings and protocol stand above as comments."""
    columns, heads = columns_of(report), head_columns_of(report)
    said = [f"warning: {warning}" for warning in report.warnings] + report.protocol.lines() + [legend(columns)]
    comments = [f"% {' '.join(line.split())}" for line in said]
    tables = [_latex_table(of, report.rows) for of in (columns, heads) if of]
    return "\n".join([r"% \usepackage{booktabs}", *comments, *tables]) + "\n"


def print_report(report: Reported, console: Console) -> None:
    """Print tables, warnings and protocol on a rich console, in 80 columns; lines are wrapped on a terminal only."""
    from rich.text import Text

    columns, heads = columns_of(report), head_columns_of(report)
    _print_table(columns, report.rows, console)
    if heads:
        console.print(Text(HEADS_TITLE))
        _print_table(heads, report.rows, console)
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=not console.is_terminal)
    for line in [*report.protocol.lines(), legend(columns)]:
        console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)


def _print_table(columns: Sequence[Column], rows: Sequence[Row], console: Console) -> None:
    """Print one table; the columns move together where it would be wider than the console."""
    from rich.box import HORIZONTALS
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(box=HORIZONTALS, header_style="bold", border_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="left" if column.left else "right", no_wrap=True)
    for row in rows:
        cells = [Text(column.cell(row).replace(SPREAD, "\n±")) for column in columns]
        table.add_row(*cells, style="bold green" if row.is_student else "")
    unbounded = console.options.update(max_width=10_000)
    if Measurement.get(console, unbounded, table).maximum > console.width:
        table.padding = (0, 0, 0, 0)
    console.print(table)


def _markdown_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Return the rows as a GitHub-flavoured table, students in bold."""
    lines = [[column.title.replace("\n", " ") for column in columns]]
    lines.append([":---" if column.left else "---:" for column in columns])
    for row in rows:
        mark = "**" if row.is_student else ""
        lines.append([f"{mark}{column.cell(row)}{mark}" for column in columns])
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |" for cells in lines
    )


def _latex_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Return the rows as a `tabular` with the rules of booktabs."""

    def line(cells: Sequence[str], form: str = "{}") -> str:
        return " & ".join(form.replace("{}", cell.replace("\n", " ").translate(_LATEX)) for cell in cells) + r" \\"

    sides = "".join("l" if column.left else "r" for column in columns)
    body = [line([c.cell(row) for c in columns], r"\textbf{{}}" if row.is_student else "{}") for row in rows]
    begin, end = rf"\begin{{tabular}}{{{sides}}}", r"\end{tabular}"
    titles = line([column.title for column in columns])
    return "\n".join([begin, r"\toprule", titles, r"\midrule", *body, r"\bottomrule", end])
