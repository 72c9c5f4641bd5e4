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
_TOO_LARGE = ("File too large", "os error 27")
_FULL_WORDS = ("No space left", "os error 28", "Disk quota", "os error 122", *_TOO_LARGE)


class WriteError(RunError):
    """Something cannot be written: which, and why. Nothing half is left."""


@contextmanager
def written(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give the path of a new file or folder beside `path` to write to; it becomes `path` when all went well.

    Whatever fails, nothing half is left, no folder that was made for it either, and what was at `path` stays. A folder
    takes the place of none but an empty one unless `overwrite`.

    Raises:
        WriteError: If the system refuses, as when the disk is full.
    """
    with _beside(path, path) as partial:
        yield partial
        if partial.is_dir() and path.is_dir() and overwrite:
            _exchange(partial, path)
        else:
            if partial.is_dir() and path.is_dir():
                path.rmdir()
            os.replace(partial, path)


def _exchange(new: Path, folder: Path) -> None:
    """Put a folder in the place of another, which is gone then, or stays if that fails."""
    old = folder.with_name(f".{folder.name[:100]}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def written_into(folder: Path) -> Iterator[Path]:
    """Give a new folder to write files into; when all went well each takes its place in `folder`, made if missing.

    Of files that belong together none is replaced before all are whole.

    Raises:
        WriteError: If the system refuses, as when the disk is full.
    """
    with _beside(folder / "files", folder) as partial:
        partial.mkdir()
        yield partial
        for file in sorted(partial.iterdir()):
            os.replace(file, folder / file.name)


@contextmanager
def _beside(path: Path, what: Path) -> Iterator[Path]:
    """Give such a path beside `path`, and take away what is left of it; errors are of `what`."""
    partial = path.with_name(f".{path.name[:100]}.partial-{os.getpid()}{path.suffix}")
    missing = [parent for parent in path.parents if not os.path.lexists(parent)]
    try:
        with writing(what):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
    except WriteError as error:  # of a file inside, whose place will be another
        raise WriteError(str(error).replace(str(partial), str(what))) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        with suppress(OSError):
            for parent in missing:  # the empty ones; the first that holds something ends this
                parent.rmdir()


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turn what the system says against writing into `WriteError`, one line; other errors pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunError) or not (isinstance(error, OSError) or is_full(error)):
            raise
        why = getattr(error, "strerror", None) or in_short(error)
        if is_full(error):
            large = any(words in str(error) for words in _TOO_LARGE)
            why = "this disk takes no file so large" if large else "no space left on the disk; free some and go on"
        raise WriteError(f"{what} cannot be written: {why}") from error


def is_full(error: BaseException) -> bool:
    """Return whether an error, of the system or a library's, is that there is no room on the disk."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)


def is_refusal(error: BaseException) -> bool:
    """Return whether an error is the system's word against writing: no room, no permission, a broken disk."""
    return is_full(error) or getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with written(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a UTF-8 text file, which is made if missing; none or all of it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:  # a buffer would be written when the file is closed
            length, left = file.tell(), f"{line}\n".encode()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(length)
                raise
