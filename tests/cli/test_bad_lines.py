"""The generated table of bad command lines: a sample of it, or with ONESTILL_ALL_BAD_LINES=1 all of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from bad_lines import Line, lines, set_up
from runs_helpers import call_cli

ALL = lines()
SHOWN = ALL if os.environ.get("ONESTILL_ALL_BAD_LINES") else ALL[::12]


def test_there_are_at_least_a_thousand() -> None:
    assert len(set(ALL)) >= 1000


def fault(line: Line) -> str:
    """Return what is wrong with how a command ends; "" if nothing is."""
    if line.yaml is not None:
        Path("c.yaml").write_text(line.yaml, encoding="utf-8")
    before, started = sorted(Path().rglob("*")), time.monotonic()
    try:
        outcome = call_cli(*line.arguments)
    except BaseException as error:  # which would be a traceback
        return f"{type(error).__name__}: {str(error)[:200]}"
    took, said = time.monotonic() - started, outcome.err.splitlines()
    if outcome.code != 2 or outcome.out:
        return f"exit {outcome.code}: {outcome.err[-300:]}"
    if not said or not all(each.startswith("error: ") for each in said) or len(said) > 12:
        return f"said {outcome.err[:300]!r}"
    if line.words not in outcome.err or max(map(len, said)) > 1000:
        return f"said {outcome.err[:300]!r}, without {line.words}"
    if sorted(Path().rglob("*")) != before:
        return "something was written"
    return f"took {took:.0f} s" if took > 10 else ""


def test_each_ends_with_clear_lines_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    set_up(tmp_path)
    faults = {str(line): wrong for line in SHOWN if (wrong := fault(line))}
    assert not faults, f"{len(faults)} of {len(SHOWN)}:\n" + "\n".join(f"{k}\n    {v}" for k, v in faults.items())
