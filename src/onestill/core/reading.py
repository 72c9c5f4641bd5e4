"""Files that others may have written: read with bounds, and refused in one line that names them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from onestill.core.errors import RunError, in_short
from onestill.core.memory import is_out_of_memory

MOST_BYTES: Final = 64 * 2**20
"""The largest JSON file that is read: indices of hundreds of shards and tokenizers' rules have a few MB."""
DEEPEST: Final = 64
"""The deepest nesting of a JSON file of ours or of a model's configuration."""

# What libraries say of a file, and what it means for who has it; the first that matches.
_MEANINGS = (
    (
        r"bitsandbytes|quanti[sz]|No package metadata was found|torchao|gguf|optimum",
        "its weights are quantised, which a student cannot be trained on: give the folder of the unquantised model",
    ),
    (r"trust_remote_code|custom code|remote code", "it needs code of its own, which is never run"),
    (r"meta tensor|meta device", "some of its weights are missing from the files"),
    (
        r"HeaderTooLarge|InvalidHeader|HeaderTooSmall|MetadataIncomplete|header",
        "a file of its weights is no whole safetensors",
    ),
)


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file; ValueError that names it if it is missing, too large or no text."""
    try:
        if not path.is_file():
            raise ValueError(f"{path} is missing" if not path.exists() else f"{path} is no file")
        size = path.stat().st_size
        if size > most_bytes:
            raise ValueError(f"{path} has {size} bytes; a file of its kind has at most {most_bytes}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {in_short(error)}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or in_short(error)}") from error


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Return what a JSON file holds; ValueError that names it if it cannot be read, or nests deeper than `DEEPEST`."""
    return parse_json(read_text(path, most_bytes), str(path))


def parse_json(text: str, where: str) -> Any:
    """Return what a JSON text holds; ValueError that says `where` it is from if it is none, or nests too deep."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {in_short(error)}") from error
    if _is_deeper(found, DEEPEST):
        raise ValueError(f"{where} is nested deeper than {DEEPEST} levels")
    return found


def read_mapping(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError that names the file if it holds anything else."""
    found = read_json(path, most_bytes)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds {_kind(found)}")
    return found


@contextmanager
def loading(what: str, *passing: type[Exception]) -> Iterator[None]:
    """Turn whatever a library raises while it loads something into ValueError "`what` cannot be read: reason".

    Errors of our own settings pass as they are, as do an interrupt and memory that is not there.

    Args:
        what: What is loaded, as the user knows it: "FOLDER: text_encoder/", "FILE".
        passing: Kinds of exceptions that pass too, where what is called says by them what is wrong.
    """
    passed: tuple[type[Exception], ...] = (RunError, *passing)
    try:
        yield
    except passed:
        raise
    except Exception as error:
        is_ours = isinstance(error, ValueError) and type(error).__module__.startswith("onestill.")
        if is_ours or is_out_of_memory(error):
            raise
        raise ValueError(f"{what} cannot be read: {reason(error)}") from error


def reason(error: BaseException, most: int = 200) -> str:
    """Return a library's exception while loading in words for who has the file."""
    text = f"{type(error).__name__} {error}"
    for pattern, meaning in _MEANINGS:
        if re.search(pattern, text, re.IGNORECASE):
            return meaning
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return in_short(error, most) or type(error).__name__


def _is_deeper(found: Any, levels: int) -> bool:
    now = [found]
    for _ in range(levels):
        inner = [v.values() if isinstance(v, Mapping) else v for v in now if isinstance(v, (Mapping, list))]
        now = [value for values in inner for value in values]
        if not now:
            return False
    return any(isinstance(value, (Mapping, list)) for value in now)


def _kind(found: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}
    return names.get(type(found), "nothing")
