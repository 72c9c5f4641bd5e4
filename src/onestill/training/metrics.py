"""A run's lines of numbers, read again: of any length, and damaged or not, they are numbers or left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onestill.core.reading import parse_json
from onestill.training.distance import Verdict
from onestill.training.watch import METRICS_FILE

MOST_LINES = 1200
"""About how many lines are read of more, evenly; every one that has a validation is."""
VALIDATION = '"validation_rms"'


@dataclass(frozen=True)
class MetricsLine:
    """One line: its step, its numbers by name, residuals by time, losses of other networks, the verdict of then."""

    step: int
    numbers: Mapping[str, float]
    residuals: Sequence[float | None] = ()
    own_losses: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None


def metrics_of(run: Path) -> list[MetricsLine]:
    """Return the lines of a run's metrics that can be read, in their order, thinned where there are very many."""
    path = run / METRICS_FILE
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        num = sum(1 for _ in file)
    every, found = max(1, num // MOST_LINES), []
    with path.open(encoding="utf-8", errors="replace") as file:
        for i, text in enumerate(file):
            if (i % every == 0 or i == num - 1 or VALIDATION in text) and (line := _line(text)) is not None:
                found.append(line)
    return found


def _line(text: str) -> MetricsLine | None:
    try:
        record = parse_json(text, "a line")
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    bins = record.get("residual_by_time")
    residuals = [_number(value) for value in bins] if isinstance(bins, list) else []
    return MetricsLine(
        record["step"],
        _numbers(record),
        residuals,
        _numbers(record.get("own_losses")),
        _verdict(record.get("held_out")),
    )


def _number(value: Any) -> float | None:
    """Return a finite number as a float; None of anything else, such as one that was not finite when it was written."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300 or not math.isfinite(value):
        return None
    return float(value)


def _numbers(found: Any) -> dict[str, float]:
    """Return what is a number in a mapping."""
    pairs = found.items() if isinstance(found, dict) else ()
    return {str(name): number for name, value in pairs if (number := _number(value)) is not None}


def _verdict(found: Any) -> Verdict | None:
    """Return what a verdict was, if it can be read whole."""
    if not isinstance(found, dict):
        return None
    rows = {}
    for name in ("teacher", "student"):
        given = found.get(name)
        rows[name] = {int(k): d for k, d in _numbers(given).items() if k.isdecimal()}
        if not isinstance(given, dict) or len(rows[name]) != len(given) or not given:
            return None
    num, features, before = found.get("num_samples"), found.get("features"), _number(found.get("before"))
    if type(num) is not int or not isinstance(features, str) or 1 not in rows["student"]:
        return None
    return Verdict(**rows, num_samples=num, features=features, before=math.nan if before is None else before)
