"""Disks that are full, or may not be written to, outside training: one line, exit 1, nothing half, nothing lost."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs_helpers import call_cli, copied, finished_run, snapshot

from onestill.core import writing
from onestill.core.writing import append_line

COMMANDS = {
    "png": "sample --student RUN --num_images 4 --output OUT/x.png",
    "gif": "sample --student RUN --interpolate 3 --to_seed 9 --seed 1 --output OUT/x.gif",
    "sheet": "sample --student RUN --target_times 0.5,0 --num_images 2 --output OUT/x.png",
    "safetensors": "sample --student RUN --num_images 40 --output OUT/x.safetensors",
    "folder": "sample --student RUN --num_images 3 --seed 2 --output OUT/x",
    "export": "export --student RUN --output OUT/x --device cpu",
    "evaluate": "evaluate --student RUN --output OUT/x --num_samples 16 --num_reference_steps 2 --steps 1 --no_speed",
}


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The system's own refusal: writing beyond so many bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a run in it, and what an earlier command has written."""
    copied(finished_run(), tmp_path / "run")
    return tmp_path


def words_of(name: str, place: Path) -> list[str]:
    words = COMMANDS[name].replace("RUN", str(place / "run")).replace("OUT", str(place / "out")).split()
    return [*words, "--device", "cpu"] if "--device" not in words else words


def assert_stopped(outcome: Any, place: Path, before: dict[str, str]) -> None:
    assert outcome.code == 1 and "Traceback" not in outcome.err, outcome
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "cannot be written: " in errors[0] and ".partial" not in errors[0], outcome.err
    assert snapshot(place) == before


@pytest.mark.parametrize("size", [0, 150], ids=["nothing fits", "a little fits"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_does_not_fit(name: str, size: int, place: Path) -> None:
    if size and name == "folder":
        pytest.skip("its pictures are smaller")
    before = snapshot(place)
    with no_file_larger_than(size):
        outcome = call_cli(*words_of(name, place))
    assert_stopped(outcome, place, before)


@pytest.mark.parametrize(
    ("name", "nth", "code"),
    [("folder", 0, errno.ENOSPC), ("folder", 2, errno.EROFS), ("export", 0, errno.EROFS), ("export", 3, errno.ENOSPC),
     ("evaluate", 1, errno.EROFS), ("evaluate", 2, errno.ENOSPC), ("gif", 0, errno.EDQUOT)],
)  # fmt: skip
def test_the_nth_write_fails_and_what_was_there_stays(
    name: str, nth: int, code: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call_cli(*words_of(name, place)).code == 0
    before, rename, calls = snapshot(place), os.replace, []

    def fail(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == nth + 1:
            raise OSError(code, os.strerror(code))
        rename(source, target)

    monkeypatch.setattr(writing.os, "replace", fail)
    outcome = call_cli(*words_of(name, place), "--overwrite")
    assert_stopped(outcome, place, before)
    assert len(calls) > nth


def test_what_an_evaluation_measured_is_shown_all_the_same(place: Path) -> None:
    with no_file_larger_than(0):
        outcome = call_cli(*words_of("evaluate", place))
    assert "| sampler |" in outcome.err and outcome.code == 1


def test_a_demo_without_room(tmp_path: Path) -> None:
    with no_file_larger_than(0):
        outcome = call_cli("demo", "digits", "--output_dir", tmp_path / "demo", "--max_train_steps", "2")
    assert outcome.code == 1 and "cannot be written" in outcome.err and "Traceback" not in outcome.err, outcome
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    append_line(tmp_path / "a" / "x.jsonl", "one")
    with no_file_larger_than(6), pytest.raises(writing.WriteError, match="takes no file so large"):
        append_line(tmp_path / "a" / "x.jsonl", "two" * 10)
    append_line(tmp_path / "a" / "x.jsonl", "three")
    assert (tmp_path / "a" / "x.jsonl").read_text() == "one\nthree\n"


def test_nothing_is_left_of_folders_made_for_what_failed(tmp_path: Path) -> None:
    with no_file_larger_than(0), pytest.raises(writing.WriteError):
        writing.write_text(tmp_path / "a" / "b" / "c.txt", "text")
    assert list(tmp_path.iterdir()) == []
