"""Memory that was not enough: one line that says what for, and what takes less."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from onestill.core.errors import RunError

# What allocators say: of C++ and numpy, of torch on the CPU, on CUDA and on MPS, of cuBLAS, and of the system.
_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc",
          "alloc_failed", "storage size calculation overflowed")  # fmt: skip


class OutOfMemory(RunError):
    """There was not enough memory: for what, and which settings take less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, of the system or a library's, is that there is not enough memory."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in _WORDS)


@contextmanager
def enough_memory(what: str, todo: str, predicted: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn whatever says that there is not enough memory into `OutOfMemory`, one line; other errors pass.

    Args:
        what: What the memory was for, "a step of batches of 64": what was asked for.
        todo: Which settings take less.
        predicted: Called then for what was to be expected, in words; "" if nothing is known.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        text = f"not enough memory for {what}{_tried(str(error))}"
        traceback.clear_frames(error.__traceback__)  # they hold what has filled it
    else:
        return
    with suppress(Exception):
        text += f"; {said}" if (said := predicted()) else ""
    raise OutOfMemory(f"{text}; {todo}")


def _tried(text: str) -> str:
    """Return how much an allocator had been asked for, where it says that."""
    if found := re.search(r"tried to allocate (\d+) bytes", text):
        return f" ({int(found[1]) / 1e9:.3g} GB more were asked for)"
    found = re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]i?B)", text)
    return f" ({found[1]} more were asked for)" if found else ""
