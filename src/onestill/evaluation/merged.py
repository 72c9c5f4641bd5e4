"""Reports of several students as one, where their numbers may be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from onestill.core.errors import SettingError
from onestill.evaluation.references import TEACHERS_OWN
from onestill.evaluation.report import Report
from onestill.evaluation.rows import EvaluationProtocol, Row

DECIDING: Final = (
    *("extractor", "feature_dim", "num_images", "reference", "num_reference_images", "seeds", "clip_model", "notes"),
    *("kernel_subset_size", "kernel_num_subsets", "neighbours"),
)
"""What has to be equal before two numbers may be compared; `notes` say which prompts or classes are drawn."""
OF_THE_TEACHER: Final = ("teacher", "guidance_scale")
"""And where the teacher's own samples are the reference, whose they are."""
OF_SPEED: Final = ("device", "dtype", "large_batch_size", "speedup_over")
SPEEDS: Final = ("images_per_second", "images_per_second_large", "speedup")


def merged(reports: Mapping[str, Report]) -> Report:
    """Return one report of several, by their names: rows that are the same once, others under their report's name.

    Speeds are left out where they were measured in different ways, and so are intervals.

    Raises:
        SettingError: If numbers of two may not be compared; says which line of their protocols differs.
    """
    (first_name, first), *others = reports.items()
    for name, report in others:
        of_teacher = OF_THE_TEACHER if first.protocol.reference.startswith(TEACHERS_OWN) else ()
        for field in (*DECIDING, *of_teacher):
            here, there = (getattr(each.protocol, field) for each in (first, report))
            if here != there:
                why = f"{first_name} and {name} were evaluated in different ways: {field} is {here} and {there}"
                raise SettingError("runs", why=why, todo="evaluate both in the same way, or compare them one by one")
    is_timed_alike = all(_alike(first.protocol, report.protocol, OF_SPEED) for _, report in others)
    is_resampled_alike = all(_alike(first.protocol, report.protocol, ("resamples",)) for _, report in others)
    left_out: dict[str, Any] = {} if is_timed_alike else dict.fromkeys(SPEEDS)
    rows = _rows(reports, left_out if is_resampled_alike else {**left_out, "intervals": {}})
    scales = {report.protocol.guidance_scale for report in reports.values()}
    versions = {tuple(report.protocol.versions.items()) for report in reports.values()}
    protocol = first.protocol.model_copy(
        update={
            "student": ", ".join(reports),
            "teacher": ", ".join(dict.fromkeys(report.protocol.teacher for report in reports.values())),
            "guidance_scale": first.protocol.guidance_scale if len(scales) == 1 else None,
            **({} if len(versions) == 1 else {"versions": {}}),
            **({} if is_timed_alike else {"large_batch_size": None, "speedup_over": None}),
            **({} if is_resampled_alike else {"resamples": None}),
        }
    )
    warnings = dict.fromkeys(warning for report in reports.values() for warning in report.warnings)
    return Report(protocol=protocol, rows=tuple(rows), warnings=tuple(warnings))


def _rows(reports: Mapping[str, Report], left_out: Mapping[str, Any]) -> list[Row]:
    """Return the teacher's rows, those that are equal in all but their speeds once, and then the students'."""
    rows: dict[str, Row] = {}
    for name, report in reports.items():
        for row in report.rows:
            known = rows.get(row.name)
            blank: dict[str, Any] = {**dict.fromkeys(SPEEDS), "intervals": {}}
            is_same = known is None or known.model_copy(update=blank) == row.model_copy(update=blank)
            told = row.name if is_same and not row.is_student else f"{name}: {row.name}"
            rows.setdefault(told, row.model_copy(update={"name": told, **left_out}))
    return sorted(rows.values(), key=lambda row: row.is_student)


def _alike(one: EvaluationProtocol, other: EvaluationProtocol, fields: tuple[str, ...]) -> bool:
    return all(getattr(one, field) == getattr(other, field) for field in fields)
