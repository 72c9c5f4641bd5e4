"""What the page of a run shows: what was distilled and how, how good it is, its curves, and how to use what came of it."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onestill.core.errors import FoundWarning, as_flags, in_short, named
from onestill.core.memory import is_out_of_memory
from onestill.core.settings import about
from onestill.core.writing import WriteError
from onestill.evaluation.report import package_versions
from onestill.evaluation.tables import columns_of, head_columns_of, legend
from onestill.pages.gallery import Gallery, gallery_of
from onestill.pages.page import Code, Page, PageTable
from onestill.runs.build import PYTHON_OBJECT
from onestill.runs.folder import RunFolder
from onestill.runs.run_plots import report_plots, training_plots
from onestill.training.config import DistillConfig, make_config
from onestill.training.metrics import MetricsLine, metrics_of
from onestill.training.recipes import in_time

if TYPE_CHECKING:
    from torch import Tensor

    from onestill.evaluation.report import Report

PAGE_FILE = "report.html"
LEFT_OUT = ("output_dir", "teacher", "resume_from_checkpoint", "budget")
"""What is no setting of the run itself, or is said first."""
CODE_START, CODE_END = "```python\n", "\n```"


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

    A page that cannot be made is warned of, and None returned: what it would show is kept in other files, and nothing ends
    for it. What cannot be written and a full memory do, as ever.
    """
    path = folder / PAGE_FILE
    with guarded(path):
        run_page(RunFolder(folder), gallery_of(rows, captions, students=students, first=first), report).write(path)
        return path
    return None


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Warn of what goes wrong with a page or its plots inside, unless it cannot be written, or memory is full."""
    try:
        yield
    except Exception as error:
        if isinstance(error, WriteError) or is_out_of_memory(error):
            raise
        warnings.warn(f"{path} could not be made: {in_short(error)}; all else goes on", FoundWarning, stacklevel=4)


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
        codes=[*_command(config), *_usage(run)],
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


def _lead(lines: Sequence[MetricsLine]) -> list[str]:
    """Return how good the student is, in the words of the run itself."""
    verdict = next((line.verdict for line in reversed(lines) if line.verdict is not None), None)
    return [] if verdict is None else [f"Quality: {verdict}."]


def _steps(config: DistillConfig, lines: Sequence[MetricsLine]) -> str:
    done = lines[-1].step if lines else 0
    return f"{done:,}" if done == config.max_train_steps else f"{done:,} of {config.max_train_steps:,}"


def _time(lines: Sequence[MetricsLine]) -> str:
    """Return how long the steps took, pools and validations not counted."""
    seconds, before = 0.0, 0
    for line in lines:
        seconds += line.numbers.get("seconds_per_step", 0.0) * (line.step - before)
        before = line.step
    return f"{in_time(seconds)} of steps" if seconds else ""


def _machine(run: RunFolder) -> list[tuple[str, str]]:
    facts = run.facts
    if facts is None:
        return []
    versions = ", ".join(f"{name} {number}" for name, number in facts.versions.items())
    return [("hardware", facts.hardware), ("versions", versions), ("budget", facts.budget or "")]


def differing(config: DistillConfig) -> dict[str, Any]:
    """Return the settings of a run that make it again, but for where it lies: those that others do not come to."""
    fields, own = DistillConfig.model_fields, config.model_dump(mode="json")
    places = {"teacher": config.teacher, "output_dir": config.output_dir}
    kept = {name for name, v in own.items() if name not in LEFT_OUT and v != _plain(fields[name].default)}
    for _ in range(len(fields)):
        made = make_config({**places, **{name: getattr(config, name) for name in kept}}, recorded=True)
        others = {name for name, v in made.model_dump(mode="json").items() if name not in LEFT_OUT and v != own[name]}
        if not others - kept:
            break
        kept |= others
    return {name: own[name] for name in own if name in kept}


def _plain(value: Any) -> Any:
    """Return a default as the dump of a configuration has it."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _command(config: DistillConfig) -> list[Code]:
    """Return the command that makes a run again; nothing of a teacher that was an object."""
    return [] if config.teacher == PYTHON_OBJECT else [Code("The same run again", command_of(config))]


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
        code = text.partition(CODE_START)[2].partition(CODE_END)[0]
        found = [Code("In Python" if "onestill" in code else "In Python, without onestill", code)]
    folder = run.path.resolve().name
    name, several, steps = shlex.quote(folder), shlex.quote(f"{folder}-4"), f"{named('num_inference_steps')} 4"
    few = f"onestill sample {name} {steps}\nonestill export {name} {steps} {named('output')} {several}\n"
    lines = as_flags(f"onestill sample {name}\n{few if run.is_map else ''}onestill evaluate {name}")
    return [*found, Code("On the command line", lines)] if run.pipeline.is_dir() else []


# Tables of an evaluation


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
