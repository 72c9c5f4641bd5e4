"""Prompts in a file: where each begins, never all of them as strings.

A .txt has one prompt per line; a .jsonl or .csv one per record, in a field. The file is read once to find the
offset and the hash of every different prompt (16 bytes each); after that a prompt is read when it is asked for.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from onestill.core.errors import SettingError, named
from onestill.core.settings import LONGEST_TEXT

Ints = np.ndarray[Any, np.dtype[np.int64]]

KINDS = (".txt", ".jsonl", ".csv")
LONGEST_LINE = 1 << 20
_BLOCK = 1 << 14
_BOM = b"\xef\xbb\xbf"


def text_key(text: str) -> int:
    """Return a 64-bit hash of a prompt, as numpy's int64 holds it: equal texts and equal keys are the same here."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _in_line(path: Path, number: int, why: str, todo: str = "") -> SettingError:
    return SettingError("prompt_file", path, f"line {number}: {why}", todo)


class PromptFile(Sequence[str]):
    """The different prompts of a file in the order in which they first occur, read by index.

    Attributes:
        path: The file.
        keys: Hash of each prompt, [N] int64.
        num_repeated: Prompts that were left out because they had occurred before.

    Args:
        path: A .txt, .jsonl or .csv file in UTF-8.
        field: Field of the prompt in a .jsonl or .csv.

    Raises:
        SettingError: If the file is missing, empty, binary, not UTF-8 or of another kind, or a line has no such field;
            names the line.
    """

    def __init__(self, path: Path, field: str | None = None) -> None:
        self.path, self._kind = path, _kind_of(path, field)
        self._field = "prompt" if field is None else field
        self._column = 0
        offsets, keys = array("q"), array("q")
        with _opened(path) as file:
            for offset, text in self._records(file):
                offsets.append(offset)
                keys.append(text_key(text))
        if not keys:
            raise SettingError("prompt_file", path, "holds no prompt")
        # The index of the first of equal keys; sorted, these are the different prompts in the file's order.
        found = np.frombuffer(keys, dtype=np.int64)
        first = np.sort(np.unique(found, return_index=True)[1])
        self.keys: Ints = found[first]
        self._offsets: Ints = np.frombuffer(offsets, dtype=np.int64)[first]
        self.num_repeated = len(found) - len(first)
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        """Return the prompt at an index, read from the file, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if self._file is None:
            self._file = _opened(self.path)
        self._file.seek(int(self._offsets[number]))
        try:
            text = self._parse(_Lines(self.path, self._file).lines())
        except (ValueError, StopIteration):
            text = ""
        if text_key(text) != self.keys[number]:
            raise SettingError("prompt_file", self.path, "has changed since it was opened", "start again")
        return text

    def close(self) -> None:
        """Close the file; it opens again when a prompt is asked for."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, str]]:
        """Yield (offset, prompt) for every record that is not blank."""
        source = _Lines(self.path, file)
        lines = source.lines()
        while True:
            offset, start = source.offset, source.number + 1
            try:
                if self._kind == ".csv" and start == 1:
                    self._column = _column_of(lines, self._field)
                    continue
                text = self._parse(lines)
            except StopIteration:
                return
            except SettingError:
                raise
            except ValueError as error:
                raise _in_line(self.path, start, str(error)) from None
            if len(text) > LONGEST_TEXT:
                why = f"a prompt of {len(text):,} characters; give at most {LONGEST_TEXT:,}"
                raise _in_line(self.path, start, why, "" if self._kind != ".txt" else "give one prompt per line")
            if text:
                yield offset, text

    def _parse(self, lines: Iterator[str]) -> str:
        """Return the prompt of the next record, stripped; "" if it is blank."""
        if self._kind == ".csv":
            row = next(_csv_rows(lines))
            if not any(cell.strip() for cell in row):
                return ""
            if len(row) <= self._column:
                raise ValueError(f"it has {len(row)} columns, and {self._field!r} is column {self._column + 1}")
            return row[self._column].strip()
        line = next(lines).strip()
        return line if self._kind == ".txt" or not line else _json_field(line, self._field)


class _Lines:
    """The lines of a file as text; knows the offset and the number of the next one, and says which line is wrong."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.number, self.offset = 0, file.tell()

    def lines(self) -> Iterator[str]:
        size = _BLOCK
        while whole := self.file.readline(size):
            pieces = whole.splitlines(keepends=True)  # at a lone CR too, as old editors end lines
            if len(whole) == size <= LONGEST_LINE and not whole.endswith(b"\n"):
                self.file.seek(-len(pieces[-1]), os.SEEK_CUR)  # which goes on beyond what was read
                del pieces[-1]
            size = _BLOCK if pieces else min(16 * size, LONGEST_LINE + 1)
            for raw in pieces:
                self.number += 1
                first = self.offset == 0
                self.offset += len(raw)
                yield self._text(raw.removeprefix(_BOM) if first else raw)

    def _text(self, raw: bytes) -> str:
        if b"\0" in raw:
            why = "it holds a zero byte: this is a binary file, or not UTF-8"
            raise _in_line(self.path, self.number, why, "give text in UTF-8")
        if len(raw) > LONGEST_LINE:
            why = f"it is longer than {LONGEST_LINE:,} bytes"
            raise _in_line(self.path, self.number, why, "give one prompt per line")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            why = f"it is not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1})"
            raise _in_line(self.path, self.number, why, "convert the file to UTF-8") from None


def _kind_of(path: Path, field: str | None) -> str:
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise SettingError("prompt_file", path, "give a .txt (one prompt per line), a .jsonl or a .csv")
    if kind == ".txt" and field is not None:
        raise SettingError("prompt_field", field, f"{path} is a .txt, which has one prompt per line", "leave it out")
    if not path.is_file():
        raise SettingError("prompt_file", path, "is a folder" if path.is_dir() else "no such file")
    return kind


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise SettingError("prompt_file", path, str(error.strerror)) from error


def _csv_rows(lines: Iterator[str]) -> Iterator[list[str]]:
    """Yield the rows of a CSV; a row takes from `lines` what is its own and nothing more."""
    try:
        yield from csv.reader(lines, strict=True)
    except csv.Error as error:
        raise ValueError(f"it is no CSV: {error}") from None


def _column_of(lines: Iterator[str], field: str) -> int:
    header = [name.strip() for name in next(_csv_rows(lines), [])]
    if field not in header:
        has = ", ".join(header) or "nothing"
        raise ValueError(f"no column {field!r}, it has {has}; name one with {named('prompt_field')}")
    return header.index(field)


def _json_field(line: str, field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f'it holds no object such as {{"{field}": "..."}}')
    if field not in record:
        has = ", ".join(record) or "nothing"
        raise ValueError(f"no field {field!r}, it has {has}; name one with {named('prompt_field')}")
    if not isinstance(record[field], str):
        raise ValueError(f"field {field!r} is no text but {record[field]!r}"[:200])
    text: str = record[field].strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field {field!r} holds half of a surrogate pair, which is no character") from None
    return text


def read_prompts(
    prompts: Sequence[str] = (), prompt_file: str | Path | None = None, prompt_field: str | None = None
) -> Sequence[str]:
    """Return the prompts that are given, or those of a file, which are read as they are asked for."""
    if isinstance(prompts, str):
        raise SettingError("prompts", prompts, "must be a list of prompts, not one string")
    if prompt_file is None:
        if prompt_field is not None:
            raise SettingError("prompt_field", prompt_field, f"is for a {named('prompt_file')}, and none was given")
        return tuple(prompts)
    if prompts:
        raise SettingError(("prompts", "prompt_file"), why="give one or the other, not both")
    return PromptFile(Path(prompt_file).expanduser(), prompt_field)
