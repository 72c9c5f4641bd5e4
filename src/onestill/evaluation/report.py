"""The report: a table of samplers beside each other, and always the protocol beneath it."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from onestill.core.errors import SettingError, named
from onestill.core.writing import write_text, written_into
from onestill.evaluation.heads import ALL

if TYPE_CHECKING:
    from rich.console import Console

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"
HEADS_TITLE = "Share of pictures that show what their prompt says, part by part"
_MISSING = "–"


class _Record(BaseModel):
    """Immutable, no unknown fields, no NaN: a report that loads is a report that says something."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EvaluationProtocol(_Record):
    """How the numbers were made: what has to be equal before two numbers may be compared.

    Attributes:
        teacher: The teacher's name or path.
        student: The student's name or path.
        extractor: The extractor's name (`FeatureExtractor.name`).
        feature_dim: D, the length of a feature.
        num_images: Generated images per row.
        reference: What the generated images are compared with.
        num_reference_images: How many of those.
        seeds: The seeds of the generated images, for example `0..4999`.
        guidance_scale: w in u + w (c - u); 1 is no guidance, None is an unconditional teacher.
        device: What the speeds were measured on.
        dtype: Precision of the networks; `onestill evaluate` runs them as they were loaded, in float32.
        clip_model: The model of `Row.clip_score`.
        large_batch_size: The batch size of `Row.images_per_second_large`; None where no speed was measured.
        kernel_subset_size: Rows per subset of the kernel distance.
        kernel_num_subsets: Subsets of the kernel distance.
        neighbours: k of precision and recall.
        speedup_over: The row that `Row.speedup` is relative to.
        versions: Versions of the packages that were involved.
        notes: Anything else that a reader has to know.
    """

    teacher: str
    student: str | None = None
    extractor: str
    feature_dim: int
    num_images: int
    reference: str
    num_reference_images: int
    seeds: str
    guidance_scale: float | None = None
    device: str = "cpu"
    dtype: str = "float32"
    clip_model: str | None = None
    large_batch_size: int | None = None
    kernel_subset_size: int | None = None
    kernel_num_subsets: int | None = None
    neighbours: int | None = None
    speedup_over: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the protocol as short lines of text, as printed beneath every table."""
        scale = self.guidance_scale
        guidance = "" if scale is None else f", guidance scale {scale:g} (1 = none)"
        lines = [
            f"teacher {self.teacher}" + (f", student {self.student}" if self.student else ""),
            f"{self.num_images:,} images per row, seeds {self.seeds}{guidance}",
            f"compared with {self.num_reference_images:,} images: {self.reference}",
            f"features {self.extractor}, D = {self.feature_dim}",
        ]
        if self.kernel_subset_size and self.kernel_num_subsets:
            lines[-1] += f", KD over {self.kernel_num_subsets} subsets of {self.kernel_subset_size:,}"
        if self.neighbours:
            lines[-1] += f", k = {self.neighbours}"
        if self.clip_model:
            lines.append(f"CLIP score with {self.clip_model}: mean of max(100 cos, 0)")
        if self.large_batch_size:
            lines.append(f"speed on {self.device}, {self.dtype}, batches of 1 and {self.large_batch_size:,}")
        if self.versions:
            lines.append(", ".join(f"{name} {number}" for name, number in self.versions.items()))
        return lines + list(self.notes)


class Row(_Record):
    """One sampler's numbers; None where something was not measured.

    Attributes:
        name: For example `teacher DDIM` or `student`.
        is_student: Whether this is the distilled student; such rows are set in bold.
        num_steps: Steps of the sampler.
        network_evaluations: Evaluations of the network per image; guidance makes two of one step.
        frechet_distance: Lower is better.
        kernel_distance: Lower is better; may be negative.
        kernel_distance_std: Its standard deviation over the subsets.
        precision: Share of generated images within the real manifold.
        recall: Share of real images within the generated manifold.
        label_accuracy: Share of images that show their label.
        prompt_accuracy: Share of judged images on which each head of the classifier sees what the prompt says, by
            the head's name, and first, as `all`, on which every head does.
        clip_score: Mean of max(100 cos, 0) between images and prompts, in 0..100.
        images_per_second: At batch 1.
        images_per_second_large: At `EvaluationProtocol.large_batch_size`.
        speedup: How many times faster than `EvaluationProtocol.speedup_over`, measured in turns with it.
    """

    name: str
    is_student: bool = False
    num_steps: int
    network_evaluations: int
    frechet_distance: float | None = None
    kernel_distance: float | None = None
    kernel_distance_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    label_accuracy: float | None = None
    prompt_accuracy: dict[str, float] | None = None
    clip_score: float | None = None
    images_per_second: float | None = None
    images_per_second_large: float | None = None
    speedup: float | None = None


class Report(_Record):
    """Rows, the protocol they share, and warnings about both."""

    kind: Literal["onestill.Report"] = "onestill.Report"
    protocol: EvaluationProtocol
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Return the table, the warnings and the protocol as GitHub-flavoured Markdown."""
        columns, heads = _columns(self), _head_columns(self)
        blocks = [_markdown_table(columns, self.rows)]
        if heads:
            blocks += [f"{HEADS_TITLE}:", _markdown_table(heads, self.rows)]
        if self.warnings:
            blocks.append("\n".join(f"> **Warning:** {warning}" for warning in self.warnings))
        blocks.append("\n".join(["Protocol:", ""] + [f"- {line}" for line in self.protocol.lines()]))
        blocks.append(_legend(columns))
        return "\n\n".join(blocks) + "\n"

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> tuple[Path, Path]:
        """Write `report.json` and `report.md` into the folder, which is made if missing, and return their paths.

        Raises:
            SettingError: If there is a report already and `overwrite` is not set.
        """
        target = Path(folder)
        self.check_save(target, overwrite=overwrite)
        with written_into(target) as partial:
            self.write(partial)
        return target / JSON_NAME, target / MARKDOWN_NAME

    def check_save(self, folder: Path, *, overwrite: bool) -> None:
        """Raise SettingError if there is a report already and `overwrite` is not set."""
        existing = [name for name in (JSON_NAME, MARKDOWN_NAME) if (folder / name).exists()]
        if existing and not overwrite:
            todo = f"name another folder, or give {named('overwrite')}"
            raise SettingError("output", folder, f"already holds {' and '.join(existing)}", todo)

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.md` into a folder that is there."""
        write_text(folder / JSON_NAME, self.model_dump_json(indent=2) + "\n")
        write_text(folder / MARKDOWN_NAME, self.to_markdown())


def package_versions(names: Sequence[str] = ("onestill", "torch", "diffusers")) -> dict[str, str]:
    """Return the installed versions of the packages, for `EvaluationProtocol.versions`."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def print_report(report: Report, console: "Console") -> None:
    """Print tables, warnings and protocol on a rich console, in 80 columns; lines are wrapped on a terminal only."""
    from rich.text import Text

    columns, heads = _columns(report), _head_columns(report)
    _print_table(columns, report.rows, console)
    if heads:
        console.print(Text(HEADS_TITLE))
        _print_table(heads, report.rows, console)
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=not console.is_terminal)
    for line in [*report.protocol.lines(), _legend(columns)]:
        console.print(Text(line, style="dim"), soft_wrap=not console.is_terminal)


def _print_table(columns: "Sequence[_Column]", rows: Sequence[Row], console: "Console") -> None:
    """Print one table; the columns move together where it would be wider than the console."""
    from rich.box import HORIZONTALS
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(box=HORIZONTALS, header_style="bold", border_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="left" if column.left else "right", no_wrap=True)
    for row in rows:
        cells = [Text(column.cell(row)) for column in columns]
        table.add_row(*cells, style="bold green" if row.is_student else "")
    unbounded = console.options.update(max_width=10_000)
    if Measurement.get(console, unbounded, table).maximum > console.width:
        table.padding = (0, 0, 0, 0)
    console.print(table)


class _Column(NamedTuple):
    title: str
    cell: Callable[[Row], str]
    legend: str = ""
    left: bool = False


def _columns(report: Report) -> list[_Column]:
    """Return the columns that this report has something to say in."""
    large, baseline = report.protocol.large_batch_size, report.protocol.speedup_over
    columns = [
        _Column("sampler", lambda row: row.name, left=True),
        _Column("steps", lambda row: f"{row.num_steps:,}"),
        _Column("NFE", lambda row: f"{row.network_evaluations:,}", "NFE: network evaluations per image"),
        _Column("FD↓", lambda row: _number(row.frechet_distance), "FD: Fréchet distance"),
        _Column("KD↓\n×10³", lambda row: _number(row.kernel_distance, scale=1e3), "KD: kernel distance"),
        _Column("prec↑", lambda row: _share(row.precision)),
        _Column("rec↑", lambda row: _share(row.recall)),
        _Column("label↑", lambda row: _share(row.label_accuracy), "label: share that shows its label"),
        _Column("prompt↑", lambda row: _of_head(row, ALL), "prompt: share that shows all its prompt says"),
        _Column("CLIP↑", lambda row: _number(row.clip_score), "CLIP: CLIP score"),
        _Column("img/s\n×1", lambda row: _number(row.images_per_second), "×B: images per second in batches of B"),
        _Column(f"img/s\n×{large:,}" if large else "img/s\nlarge", lambda row: _number(row.images_per_second_large)),
        _Column("speedup", lambda row: _number(row.speedup, "×"), f"speedup over {baseline}" if baseline else ""),
    ]
    # The first three always are; a table without rows has no others.
    measured = [column for column in columns[3:] if any(column.cell(row) != _MISSING for row in report.rows)]
    return [*columns[:3], *measured]


def _head_columns(report: Report) -> list[_Column]:
    """Return the columns of the second table, one for each head; empty where prompts were not judged by heads."""
    heads = list(dict.fromkeys(name for row in report.rows for name in row.prompt_accuracy or {} if name != ALL))
    columns = [_Column(f"{name}↑", partial(_of_head, name=name)) for name in heads]
    return [_Column("sampler", lambda row: row.name, left=True), *columns] if heads else []


def _of_head(row: Row, name: str) -> str:
    return _share((row.prompt_accuracy or {}).get(name))


def _number(value: float | None, unit: str = "", scale: float = 1) -> str:
    """Three significant digits, never an exponent for what a reader compares by eye."""
    if value is None:
        return _MISSING
    value *= scale
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{decimals}f}{unit}"


def _share(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}"


def _legend(columns: Sequence[_Column]) -> str:
    return "; ".join(column.legend for column in columns if column.legend)


def _markdown_table(columns: Sequence[_Column], rows: Sequence[Row]) -> str:
    """Return the rows as a GitHub-flavoured table, students in bold."""
    lines = [[column.title.replace("\n", " ") for column in columns]]
    lines.append([":---" if column.left else "---:" for column in columns])
    for row in rows:
        mark = "**" if row.is_student else ""
        lines.append([f"{mark}{column.cell(row)}{mark}" for column in columns])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)
