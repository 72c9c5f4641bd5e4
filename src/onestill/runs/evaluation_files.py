"""What an evaluation writes: the report, its page and plots, a picture, and the page of the run that it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from onestill.core.writing import written_into
from onestill.evaluation.config import EvaluateConfig
from onestill.evaluation.report import JSON_NAME, MARKDOWN_NAME, Report
from onestill.evaluation.samples import Subjects
from onestill.pages.gallery import NUM_COLUMNS, gallery_of
from onestill.pages.plots import plot_files
from onestill.runs.load import LoadedStudent
from onestill.runs.run_page import PAGE_FILE, guarded, report_page, write_run_page
from onestill.runs.run_plots import report_plots
from onestill.sampling import pictures

PICTURE_NAME = "samples.png"
WRITTEN = (JSON_NAME, MARKDOWN_NAME, PICTURE_NAME, PAGE_FILE, *plot_files("quality-steps", "quality-time"))
"""What an evaluation may write into its folder."""


def captions_of(student: LoadedStudent, subjects: Subjects) -> Sequence[str]:
    """Return what the first images of every row show, in words; empty if nothing is asked for."""
    labels = subjects.rows(student.sampler, NUM_COLUMNS).get("class_labels")
    return subjects.prompts if labels is None else [f"class {label}" for label in labels]


def write_report(
    report: Report,
    shown: Mapping[str, Tensor],
    config: EvaluateConfig,
    captions: Sequence[str],
    student: LoadedStudent,
) -> None:
    """Write the report, its page and plots, and a picture of the first images of each row; what was there goes.

    The page of a run that the folder lies in is rewritten too, with the same pictures, if it is its newest student's.
    """
    output, students = config.output, [row.name for row in report.rows if row.is_student]
    assert output is not None
    report.check_save(output, overwrite=config.overwrite)
    with written_into(output) as partial:
        report.write(partial)
        with guarded(output / PAGE_FILE):
            for plot in report_plots(report):
                plot.save(partial)
            gallery = gallery_of(shown, captions, students=students, first=config.seed)
            report_page(report, gallery).write(partial / PAGE_FILE)
        if pictures.can_be_shown(next(iter(shown.values())).shape[1:]):
            sheet, title = {name: images[:16] for name, images in shown.items()}, "same noise in every column"
            pictures.save_rows(sheet, partial / PICTURE_NAME, title=title, columns=captions[:16])
        written = {path.name for path in partial.iterdir()}
    for name in set(WRITTEN) - written:
        (output / name).unlink(missing_ok=True)
    run = student.run
    if run is None or run.path.resolve() not in output.resolve().parents or not run.config.report:
        return
    if config.student.resolve() in (run.path.resolve(), run.pipeline.resolve()):
        write_run_page(run.path, shown, captions, students=students, report=report, first=config.seed)
