"""Files that are whole or not there: written beside and renamed; a full disk ends in one line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onestill.core.errors import RunError, in_short

# What a system says when there is no room; safetensors and Pillow hand on its words in errors of their own.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left", "os error 28", "Disk quota", "os error 122", "File too large", "os error 27")


class WriteError(RunError):
    """Something cannot be written: which, and why. Nothing half is left."""


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Give the path of a new file or folder beside `path` to write to; it becomes `path` when all went well.

    Whatever fails, nothing half is left and what was at `path` stays. A folder takes the place of none but an empty
    one.

    Raises:
        WriteError: If the system refuses, as when the disk is full.
    """
    partial = path.with_name(f".{path.name[:100]}.partial-{os.getpid()}{path.suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if partial.is_dir() and path.is_dir():
                path.rmdir()
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turn what the system says against writing into `WriteError`, one line; other errors pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunError) or not (isinstance(error, OSError) or is_full(error)):
            raise
        full = is_full(error)
        why = "no space left on the disk" if full else getattr(error, "strerror", None) or in_short(error)
        raise WriteError(
            f"{what} cannot be written: {why}{'; free some and run the same again' if full else ''}"
        ) from error


def is_full(error: BaseException) -> bool:
    """Return whether an error, of the system or a library's, is that there is no room on the disk."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with written(path) as partial:
        partial.write_text(text, encoding="utf-8")
