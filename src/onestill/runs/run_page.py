"""What the page of a run shows: what was distilled and how, how good it is, its curves, and how to use what came of it."""

from __future__ import annotations

import math
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from onestill.core.errors import FoundWarning, as_flags, in_short, named
from onestill.core.reading import parse_json
from onestill.core.settings import about
from onestill.evaluation.report import package_versions
from onestill.evaluation.tables import columns_of, head_columns_of, legend
from onestill.pages.gallery import Gallery, gallery_of
from onestill.pages.page import Code, Page, PageTable
from onestill.pages.plots import OTHERS, STUDENT, TEACHERS, Curve, Plot
from onestill.runs.folder import RunFolder
from onestill.training.config import DistillConfig
from onestill.training.distance import Verdict
from onestill.training.recipes import in_time
from onestill.training.watch import METRICS_FILE

if TYPE_CHECKING:
    from torch import Tensor

    from onestill.evaluation.report import Report
    from onestill.evaluation.rows import Row

PAGE_FILE = "report.html"
MOST_POINTS = 400
"""Points of a curve: more cannot be told apart on a page, and weigh."""
CODE_START, CODE_END = "```python\n", "\n```"
Lines = Sequence[Mapping[str, Any]]


def write_run_page(
    folder: Path,
    rows: Mapping[str, Tensor],
    captions: Sequence[str],
    *,
    students: Sequence[str],
    report: Report | None = None,
    first: int = 0,
) -> Path | None:
    """Write the page of a run with pictures of these rows; return its path.

    A page that cannot be made is warned of, and None returned: what it would show is kept in other files, and a run does
    not end for it. A full disk ends it as ever.
    """
    path = folder / PAGE_FILE
    try:
        run_page(RunFolder(folder), gallery_of(rows, captions, students=students, first=first), report).write(path)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        warnings.warn(f"{path} could not be made: {in_short(error)}; the run goes on", FoundWarning, stacklevel=2)
        return None
    return path


def run_page(run: RunFolder, gallery: Gallery | None, report: Report | None = None) -> Page:
    """Return the page of a run as it is now."""
    config, lines = run.config, metrics_of(run.path)
    facts = [("teacher", config.teacher), ("steps", _steps(config, lines)), ("time", _time(lines))]
    w = " to ".join(f"{w:g}" for w in config.guidance_range or (config.guidance_scale,))
    facts += [("batch", f"{config.train_batch_size * config.gradient_accumulation_steps:,} images")]
    facts += [("guidance", f"w = {w}")] if w != "1" else []
    facts += [("trained", "all weights" if config.lora_rank is None else f"LoRA, rank {config.lora_rank}")]
    facts += [("seed", f"{config.seed}"), *_machine(run)]
    table, plots = ([], []) if report is None else (report_tables(report), report_plots(report))
    return Page(
        title=f"{Path(config.teacher).name or config.teacher}, in a few steps",
        lead=_lead(lines),
        facts=[(name, value) for name, value in facts if value],
        warnings=() if report is None else report.warnings,
        tables=table,
        plots=[*plots, *training_plots(lines)],
        gallery=gallery,
        codes=[Code("The same run again", command_of(config)), *_usage(run)],
        settings=_settings(config),
        made=made_by(),
    )


def report_page(report: Report, gallery: Gallery | None) -> Page:
    """Return the page of an evaluation of what has no run."""
    protocol = report.protocol
    return Page(
        title=f"{protocol.student or 'Samplers'} beside {Path(protocol.teacher).name or protocol.teacher}",
        warnings=report.warnings,
        tables=report_tables(report),
        plots=report_plots(report),
        gallery=gallery,
        made=made_by(),
    )


def made_by() -> str:
    """Return the last line of a page: which versions made it, and when."""
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    return f"{versions}; written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"


# What a run has left


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics that can be read, in their order."""
    path, found = folder / METRICS_FILE, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = parse_json(line, "a line")
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            found.append(record)
    return found


def verdict_of(line: Mapping[str, Any]) -> Verdict | None:
    """Return the verdict of a line of metrics, if it has one."""
    found = line.get("held_out")
    if not isinstance(found, dict):
        return None
    of = {name: {int(k): float(v) for k, v in found[name].items()} for name in ("teacher", "student")}
    return Verdict(**of, num_samples=found["num_samples"], features=found["features"], before=float(found["before"]))


def _lead(lines: Lines) -> list[str]:
    """Return how good the student is, in sentences."""
    verdict = next((v for line in reversed(lines) if (v := verdict_of(line)) is not None), None)
    if verdict is None:
        return []
    few = max(verdict.student)
    said = [
        f"{_number_of_steps(k)} {'is' if k == 1 else 'are'} as good as the teacher's {n:.3g}"
        for k in verdict.student
        if math.isfinite(n := verdict.steps(k))
    ]
    said = [", ".join(said) + f", by {verdict.num_samples:,} held-out samples."] if said else []
    return said or [f"Not as good as the teacher's few steps yet: {verdict.student[few]:.3g} in {few}."]


def _number_of_steps(num: int) -> str:
    return "One step of the student" if num == 1 else f"{num} steps"


def _steps(config: DistillConfig, lines: Lines) -> str:
    done = lines[-1]["step"] if lines else 0
    return f"{done:,}" if done == config.max_train_steps else f"{done:,} of {config.max_train_steps:,}"


def _time(lines: Lines) -> str:
    """Return how long the steps took, pools and validations not counted."""
    seconds, before = 0.0, 0
    for line in lines:
        seconds, before = seconds + float(line["seconds_per_step"]) * (line["step"] - before), line["step"]
    return f"{in_time(seconds)} of steps" if seconds else ""


def _machine(run: RunFolder) -> list[tuple[str, str]]:
    facts = run.facts
    if facts is None:
        return []
    versions = ", ".join(f"{name} {number}" for name, number in facts.versions.items())
    return [("hardware", facts.hardware), ("versions", versions), ("budget", facts.budget or "")]


def differing(config: DistillConfig) -> dict[str, Any]:
    """Return the settings of a run that differ from the defaults, but for where it lies."""
    fields, here = DistillConfig.model_fields, ("output_dir", "teacher", "resume_from_checkpoint")
    return {
        name: v
        for name, v in config.model_dump(mode="json").items()
        if name not in here and v != _plain(fields[name].default)
    }


def _plain(value: Any) -> Any:
    """Return a default as the dump of a configuration has it."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def command_of(config: DistillConfig) -> str:
    """Return the command of a run, in lines that a shell reads as one."""
    words = [f"onestill distill {named('teacher')} {shlex.quote(config.teacher)} {named('output_dir')} RUN"]
    for name, value in differing(config).items():
        if isinstance(value, bool):
            words.append(named(name if value else f"no_{name}"))
        elif isinstance(value, list) and not about(DistillConfig.model_fields[name], "commas"):
            words += [_flag(name, each) for each in value]
        elif value is not None:
            words.append(_flag(name, ",".join(map(str, value)) if isinstance(value, list) else value))
    return as_flags(" \\\n  ".join(words))


def _flag(name: str, value: Any) -> str:
    """Return a setting as a flag with its value; one that begins with a dash would be read as another flag."""
    text = shlex.quote(str(value))
    return f"{named(name)}{'=' if str(value).startswith('-') else ' '}{text}"


def _settings(config: DistillConfig) -> PageTable:
    fields = DistillConfig.model_fields
    rows = [
        (name, shown_value(value), shown_value(_plain(fields[name].default)), fields[name].description or "")
        for name, value in differing(config).items()
    ]
    return PageTable("Settings that differ from the defaults", ("setting", "here", "default", ""), rows)


def shown_value(value: Any) -> str:
    """Return the value of a setting as a table has it."""
    return (
        "–" if value is None or value == [] else ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"
    )


def _usage(run: RunFolder) -> list[Code]:
    """Return how to use what a run has exported: what its card says, and this project's own commands."""
    card, found = run.pipeline / "README.md", []
    if card.is_file() and CODE_START in (text := card.read_text(encoding="utf-8", errors="replace")):
        found = [Code("In Python, without onestill", text.partition(CODE_START)[2].partition(CODE_END)[0])]
    name, steps = shlex.quote(run.path.name), f"{named('num_inference_steps')} 4"
    few = f"onestill sample {name} {steps}\nonestill export {name} {steps} {named('output')} {name}-4\n"
    lines = as_flags(f"onestill sample {name}\n{few if run.is_map else ''}onestill evaluate {name}")
    return [*found, Code("On the command line", lines)] if run.pipeline.is_dir() else []


# Tables and plots of an evaluation


def report_tables(report: Report) -> list[PageTable]:
    """Return the tables of a report, with its protocol beneath."""
    columns, heads = columns_of(report), head_columns_of(report)
    strong = [i for i, row in enumerate(report.rows) if row.is_student]
    of = (("Student and teacher", columns), ("What the pictures show of their prompts", heads))
    tables = [
        PageTable(
            title,
            [c.title.replace("\n", " ") for c in those],
            [[c.cell(row) for c in those] for row in report.rows],
            strong,
        )
        for title, those in of
        if those
    ]
    notes = [*report.protocol.lines(), legend(columns)]
    return [*tables[:-1], PageTable(tables[-1].title, tables[-1].columns, tables[-1].rows, strong, notes)]


def report_plots(report: Report) -> list[Plot]:
    """Return quality against sampling steps and against seconds, the teacher's curves beside the student."""
    ticks = sorted({row.num_steps for row in report.rows})
    steps = Plot(
        "quality-steps", "Quality against sampling steps", "sampling steps", "Fréchet distance (lower is better)",
        _curves(report.rows, lambda row: float(row.num_steps)), log=(True, True), ticks=ticks,
    )  # fmt: skip
    seconds = Plot(
        "quality-time", "Quality against time", "milliseconds per picture, one at a time",
        "Fréchet distance (lower is better)",
        _curves(report.rows, lambda row: 1e3 / row.images_per_second if row.images_per_second else math.nan), log=(True, True),
        caption=report.protocol.device,
    )  # fmt: skip
    return [plot for plot in (steps, seconds) if plot.has_points]


def _curves(rows: Sequence[Row], x: Any) -> list[Curve]:
    """Return a curve for the students and one for each of the teacher's solvers, along x(row)."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("student" if row.is_student else row.name.rpartition("-")[0] or row.name, []).append(row)
    curves, colors = [], iter(TEACHERS * len(groups))
    for name, of in groups.items():
        of = sorted(of, key=lambda row: row.num_steps)
        color = STUDENT if name == "student" else next(colors)
        curves.append(Curve(name, [x(row) for row in of], [row.frechet_distance for row in of], color, dots=True))
    return curves


# Plots of a training


def training_plots(lines: Lines) -> list[Plot]:
    """Return the curves of a run's metrics: those that it has."""
    if len(lines) < 2:
        return []
    plots = [
        _held_out(lines),
        Plot(
            "distance", "Distance to the teacher, from the same noise", "step", "RMS",
            [_series("student, 1 step", lines, "validation_rms", dots=True)],
        ),
        Plot("loss", "Loss", "step", "loss", [_series("loss", lines, "loss"), *_own_losses(lines)], log=(False, True)),
        _residuals(lines),
        Plot("gradient", "Gradient norm", "step", "norm before clipping", [_series("norm", lines, "grad_norm")], log=(False, True)),
        Plot("rate", "Learning rate", "step", "rate", [_series("rate", lines, "learning_rate")]),
    ]  # fmt: skip
    return [plot for plot in plots if plot.has_points]


def _series(name: str, lines: Lines, key: str, *, dots: bool = False) -> Curve:
    found = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    return _thinned(Curve(name, [x for x, _ in found], [y for _, y in found], dots=dots))


def _thinned(curve: Curve) -> Curve:
    """Return a curve of means of neighbouring points where it has more than can be seen."""
    every, y = -(-len(curve.x) // MOST_POINTS), [value for value in curve.y if value is not None]
    if every <= 1:
        return curve
    parts = [slice(i, i + every) for i in range(0, len(y), every)]
    return replace(curve, x=[fmean(curve.x[part]) for part in parts], y=[fmean(y[part]) for part in parts])


def _own_losses(lines: Lines) -> list[Curve]:
    """Return the losses of the objectives' own networks."""
    names = list(dict.fromkeys(name for line in lines for name in line.get("own_losses") or {}))
    flat = [{"step": line["step"], **(line.get("own_losses") or {})} for line in lines]
    return [_series(name, flat, name) for name in names]


def _held_out(lines: Lines) -> Plot:
    """Return the held-out Fréchet distance of the student along the run, beside the teacher's few steps."""
    found = [(line["step"], verdict) for line in lines if (verdict := verdict_of(line)) is not None]
    if not found:
        return Plot("held-out", "", "", "", [])
    steps, last = [float(step) for step, _ in found], found[-1][1]
    curves = [
        Curve(f"student, {k} step{'s' if k > 1 else ''}", steps, [v.student.get(k) for _, v in found], color, dots=True)
        for k, color in zip(last.student, OTHERS, strict=False)
    ]
    levels = {
        f"teacher, {n} step{'s' if n > 1 else ''}": d for n, d in last.teacher.items() if math.isfinite(d) and d > 0
    }
    worst = max((v for curve in curves for v in curve.y if v is not None and math.isfinite(v)), default=math.inf)
    levels = {name: d for name, d in levels.items() if d <= 1.5 * worst}
    words = f"{last.num_samples:,} samples, {last.features}"
    return Plot(
        "held-out",
        "Distance to the teacher's law, held out",
        "step",
        "Fréchet distance",
        curves,
        (False, True),
        words,
        levels,
    )


def _residuals(lines: Lines) -> Plot:
    """Return the residual by target time, at the beginning and now."""
    curves = []
    for name, line in (("first", lines[0]), ("last", lines[-1])):
        bins = line.get("residual_by_time") or []
        middle = [(i + 0.5) / len(bins) for i in range(len(bins))]
        y = [value if isinstance(value, (int, float)) else None for value in bins]
        curves.append(Curve(f"{name} (step {line['step']:,})", middle, y, dots=True, dashed=name == "first"))
    title, caption = "Residual by target time", "An error of f; towards 0 the picture is clean."
    return Plot("residuals", title, "target time s / t_max", "mean squared residual", curves, (False, True), caption)
