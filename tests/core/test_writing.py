"""Files that are whole or not there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from onestill.core.writing import WriteError, write_text, writing, written


def fail_halfway(path: Path, error: Exception) -> None:
    with written(path) as partial:
        partial.write_text("half")
        raise error


def test_a_file_and_a_folder_appear_when_they_are_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "x.txt", "new")
    with written(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "one").touch()
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "a" / "x.txt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "folder", "one", "x.txt"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left (os error 28)")]
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "x.png"
    path.write_text("old")
    with pytest.raises(WriteError, match=r"x\.png cannot be written: no space left on the disk; free some and go on"):
        fail_halfway(path, error)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_errors_that_are_not_the_systems_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail_halfway(tmp_path / "x", KeyError("x"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(WriteError, match="cannot be written: Permission denied"), writing("x"):
        raise PermissionError(errno.EACCES, "Permission denied")
