"""Plots of an evaluation and of a training: quality against steps and time, and what the run's metrics say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from onestill.pages.plots import OTHERS, STUDENT, TEACHERS, Curve, Plot
from onestill.training.metrics import MetricsLine

if TYPE_CHECKING:
    from onestill.evaluation.report import Report
    from onestill.evaluation.rows import Row

MOST_POINTS = 400
"""Points of a curve: more cannot be told apart on a page, and weigh."""


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


def _curves(rows: Sequence[Row], x: Callable[[Row], float]) -> list[Curve]:
    """Return a curve for each student and for each of the teacher's solvers, along x(row)."""
    groups: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        name = re.sub(r", \d+ steps", "", row.name) if row.is_student else row.name.rpartition("-")[0] or row.name
        groups.setdefault((row.is_student, name), []).append(row)
    students, teachers = [key for key in groups if key[0]], [key for key in groups if not key[0]]
    colors = dict(zip(students, OTHERS if len(students) > 1 else (STUDENT,), strict=False))
    left = [color for color in TEACHERS if color not in colors.values()] or list(TEACHERS)
    colors |= {key: left[i % len(left)] for i, key in enumerate(teachers)}
    curves = []
    for (is_student, name), of in groups.items():
        of = sorted(of, key=lambda row: row.num_steps)
        points = [x(row) for row in of], [row.frechet_distance for row in of]
        dashed = len(students) > 1 and not is_student
        curves.append(Curve(name, *points, colors.get((is_student, name), ""), dots=True, dashed=dashed))
    return curves


# Plots of a training


def training_plots(lines: Sequence[MetricsLine]) -> list[Plot]:
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


def _series(name: str, lines: Sequence[MetricsLine], key: str, *, dots: bool = False) -> Curve:
    found = [(line.step, line.numbers[key]) for line in lines if key in line.numbers]
    return _thinned(Curve(name, [x for x, _ in found], [y for _, y in found], dots=dots))


def _thinned(curve: Curve) -> Curve:
    """Return a curve of means of neighbouring points where it has more than can be seen."""
    every, y = -(-len(curve.x) // MOST_POINTS), [value for value in curve.y if value is not None]
    if every <= 1:
        return curve
    parts = [slice(i, i + every) for i in range(0, len(y), every)]
    return replace(curve, x=[fmean(curve.x[part]) for part in parts], y=[fmean(y[part]) for part in parts])


def _own_losses(lines: Sequence[MetricsLine]) -> list[Curve]:
    """Return the losses of the objectives' own networks."""
    names = list(dict.fromkeys(name for line in lines for name in line.own_losses))
    return [_series(name, [replace(line, numbers=line.own_losses) for line in lines], name) for name in names]


def _held_out(lines: Sequence[MetricsLine]) -> Plot:
    """Return the held-out Fréchet distance of the student along the run, beside the teacher's few steps."""
    found = [(line.step, line.verdict) for line in lines if line.verdict is not None]
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


def _residuals(lines: Sequence[MetricsLine]) -> Plot:
    """Return the residual by target time, at the beginning and now."""
    curves = []
    for name, line in (("first", lines[0]), ("last", lines[-1])):
        num = len(line.residuals)
        middle = [(i + 0.5) / num for i in range(num)]
        curves.append(Curve(f"{name} (step {line.step:,})", middle, line.residuals, dots=True, dashed=name == "first"))
    title, caption = "Residual by target time", "An error of f; towards 0 the picture is clean."
    return Plot("residuals", title, "target time s / t_max", "mean squared residual", curves, (False, True), caption)
