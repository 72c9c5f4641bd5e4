"""What stands behind a flag, read as it is meant: numbers in digits, paths that can be paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

_MOST_DIGITS = 40


# A default comes as what it is, not as text.
def _path(text: str | Path) -> Path:
    """A file or folder; of an empty name, which `Path` would make the current folder."""
    if not str(text).strip():
        raise typer.BadParameter("is empty; give a path, or leave it out")
    return Path(text)


def _int(given: str | int) -> int:
    """A whole number."""
    text = str(given)
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise typer.BadParameter(f"{_shown(text)} is no whole number; write digits, such as 100")
    if len(text) > _MOST_DIGITS:
        raise typer.BadParameter(f"{_shown(text)} is too large a number")
    return int(text)


def _float(given: str | float) -> float:
    """A number."""
    text = str(given)
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", text, re.IGNORECASE):
        raise typer.BadParameter(f"{_shown(text)} is no number; write one such as 0.5 or 1e-4")
    return float(text)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MOST_DIGITS else f"{text[:_MOST_DIGITS]}...")


def _titled(parser: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    parser.__name__ = name  # which the help shows
    return parser


PARSERS: Mapping[Any, Callable[[Any], Any]] = {
    int: _titled(_int, "int"),
    float: _titled(_float, "float"),
    Path: _titled(_path, "path"),
}
"""Readers of what flags of a type are given; the others are texts, choices and switches."""
