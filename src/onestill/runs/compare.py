"""`compare`: runs side by side, from what each has written; nothing is trained, drawn or measured again."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onestill.core.arguments import checked
from onestill.core.errors import SettingError, named
from onestill.core.files import check_output
from onestill.core.reading import read_object
from onestill.core.settings import make
from onestill.core.writing import written_into
from onestill.evaluation.merged import merged
from onestill.evaluation.report import JSON_NAME, MARKDOWN_NAME, Report
from onestill.evaluation.tables import number
from onestill.pages.config import CompareConfig
from onestill.pages.page import Page, PageTable
from onestill.pages.plots import OTHERS, Curve, Plot, plot_files
from onestill.runs.folder import EVALUATION_FOLDER, RunFolder
from onestill.runs.run_page import (
    PAGE_FILE,
    differing,
    made_by,
    report_tables,
    shown_value,
)
from onestill.runs.run_plots import report_plots, training_plots
from onestill.training.metrics import metrics_of

OF_A_TABLE = {JSON_NAME, MARKDOWN_NAME, *plot_files("quality-steps", "quality-time")}
"""What is written of a common table, and goes with it where there is none any more."""
MOST_SHEET_BYTES = 2_500_000
"""Of the runs' own pictures in a page, as files."""


@dataclass(frozen=True)
class RunsCompared:
    """Runs side by side.

    Attributes:
        report: Their evaluations as one, None if not all runs were evaluated.
        page: The page.
        summary: A table of what all runs have.
    """

    report: Report | None
    page: Page
    summary: PageTable


@checked(CompareConfig)
def compare(runs: Sequence[str | Path], *, config_file: str | Path | None = None, **settings: Any) -> RunsCompared:
    """Compare runs by what they have written; write a page with tables and plots if `output` is given.

    Args:
        runs: Folders of runs, two or more.
        config_file: A YAML file of settings; those given here win.
        **settings: Fields of `CompareConfig`; an unknown name is refused.

    Raises:
        ValueError: If a folder is no run, or evaluations cannot be compared; nothing has been written then.
    """
    config = make(CompareConfig, {**settings, "runs": [str(run) for run in runs]}, config_file)
    found = _named([_opened(path) for path in config.runs])
    reports = {name: report for name, run in found.items() if (report := _report_of(run)) is not None}
    report, why_not = None, ""
    if len(reports) == len(found):
        try:
            report = merged(reports)
        except SettingError as error:
            why_not = f"no common table: {error.why}"
    page = _page(found, report, [name for name in found if name not in reports], why_not)
    if config.output is not None:
        names = {*OF_A_TABLE, *plot_files(*(plot.name for plot in page.plots))}
        found_there = next((name for name in (PAGE_FILE, *sorted(names)) if (config.output / name).exists()), "")
        check_output(config.output, found_there, overwrite=config.overwrite)
        with written_into(config.output) as partial:
            if report is not None:
                report.write(partial)
            for plot in page.plots:
                plot.save(partial)
            page.write(partial / PAGE_FILE)
            there = {path.name for path in partial.iterdir()}
        for name in OF_A_TABLE - there:
            (config.output / name).unlink(missing_ok=True)
    return RunsCompared(report, page, page.tables[0])


def _opened(path: Path) -> RunFolder:
    run = RunFolder.of(path)
    if run is None:
        raise SettingError(
            "runs", path, "is no run", f"name folders that onestill distill has written as {named('output_dir')}"
        )
    return run


def _named(runs: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Return runs by short names that differ: as many last parts of their paths as it takes."""
    paths = [run.path.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise SettingError("runs", twice, "is given twice")
    for num in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-num:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))


def _report_of(run: RunFolder) -> Report | None:
    path = run.path / EVALUATION_FOLDER / JSON_NAME
    return read_object(path, Report) if path.is_file() else None


def _summary(runs: Mapping[str, RunFolder]) -> PageTable:
    """Return what every run knows of itself, a row each."""
    columns = ("run", "teacher", "steps", "RMS to the teacher", "1 step held out", "as good as the teacher's")
    rows = []
    for name, run in runs.items():
        lines = metrics_of(run.path)
        rms = next((rms for line in reversed(lines) if (rms := line.numbers.get("validation_rms")) is not None), None)
        verdict = next((line.verdict for line in reversed(lines) if line.verdict is not None), None)
        held_out, steps = (None, None) if verdict is None else (verdict.student[1], verdict.steps())
        done = f"{lines[-1].step if lines else 0:,}"
        as_good = "–" if steps is None or steps != steps else f"{steps:.3g} steps"
        rows.append((name, Path(run.config.teacher).name, done, number(rms), number(held_out), as_good))
    notes = ["held out: Fréchet distance to the teacher's own samples, as each run measured it"]
    return PageTable("Runs", columns, rows, notes=notes)


def _page(runs: Mapping[str, RunFolder], report: Report | None, unmeasured: Sequence[str], why_not: str) -> Page:
    has_some = 0 < len(unmeasured) < len(runs)
    lead = f"Not evaluated yet: {', '.join(unmeasured)}. onestill evaluate makes the table of all." if has_some else ""
    return Page(
        title=" · ".join(runs),
        lead=[lead] if lead else [],
        warnings=[*([why_not] if why_not else []), *(report.warnings if report is not None else ())],
        tables=[_summary(runs), *([] if report is None else report_tables(report)), *_settings(runs)],
        plots=[*([] if report is None else report_plots(report)), *_training(runs)],
        sheets=_sheets(runs),
        made=made_by(),
    )


def _settings(runs: Mapping[str, RunFolder]) -> list[PageTable]:
    """Return the settings in which the runs differ."""
    configs = {name: run.config for name, run in runs.items()}
    names = dict.fromkeys(setting for config in configs.values() for setting in ("teacher", *differing(config)))
    dumps = {name: config.model_dump(mode="json") for name, config in configs.items()}
    rows = [(setting, *(shown_value(dump[setting]) for dump in dumps.values())) for setting in names]
    kept = [row for row in rows if len(set(row[1:])) > 1]
    return [PageTable("Settings that differ", ("setting", *runs), kept)] if kept else []


def _training(runs: Mapping[str, RunFolder]) -> list[Plot]:
    """Return the curves of every run's training in common plots: the first of each kind, where they say the same thing."""
    kinds: dict[str, Plot] = {}
    curves: dict[str, list[Curve]] = {}
    for i, (name, run) in enumerate(runs.items()):
        for plot in training_plots(metrics_of(run.path)):
            curve = plot.curves[-1] if plot.name == "residuals" else plot.curves[0]
            first = kinds.setdefault(plot.name, plot)
            if (first.title, first.caption) == (
                plot.title,
                plot.caption,
            ):  # held-out distances of other features are others
                same = replace(curve, name=name, color=OTHERS[i % len(OTHERS)], dashed=i >= len(OTHERS))
                curves.setdefault(plot.name, []).append(same)
    return [replace(plot, curves=curves[name], levels={}) for name, plot in kinds.items()]


def _sheets(runs: Mapping[str, RunFolder]) -> list[tuple[str, str]]:
    """Return the newest picture of each run, as long as a page has room."""
    found, size = [], 0
    for name, run in runs.items():
        files = [
            path
            for path in (
                run.path / EVALUATION_FOLDER / "samples.png",
                *sorted((run.path / "samples").glob("step-*.png"), reverse=True),
            )
            if path.is_file()
        ]
        if files and (size := size + files[0].stat().st_size) <= MOST_SHEET_BYTES:
            found.append((name, f"data:image/png;base64,{base64.b64encode(files[0].read_bytes()).decode()}"))
    return found
