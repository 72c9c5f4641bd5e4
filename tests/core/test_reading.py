"""Files that others may have written: each refusal is one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from onestill.core.errors import SettingError
from onestill.core.reading import loading, parse_json, read_json, read_mapping, reason


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no UTF-8 text"),
        (b"[" * 100_000, "is nested too deep"),
        (b"[" * 100 + b"]" * 100, "is nested deeper"),
        (b"[1]", "must hold a JSON object, it holds a list"),
        (b"1" * 5000, "is no JSON"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        read_mapping(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_beyond_its_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    with pytest.raises(ValueError, match="has 8 bytes; a file of its kind has at most 7"):
        read_json(path, 7)
    with pytest.raises(ValueError, match="is missing"):
        read_json(tmp_path / "y.json")
    with pytest.raises(ValueError, match="is no file"):
        read_json(tmp_path)


def test_what_a_library_raises_becomes_one_line_that_names_what_was_loaded() -> None:
    with (
        pytest.raises(ValueError, match="^teacher: unet/ cannot be read: its weights are quantised"),
        loading("teacher: unet/"),
    ):
        raise ImportError("No package metadata was found for bitsandbytes")
    with pytest.raises(ValueError, match="cannot be read: a b$"), loading("x"):
        raise ZeroDivisionError("a\n  b")
    with pytest.raises(SettingError), loading("x"):
        raise SettingError("teacher", why="is our own word")
    assert reason(KeyError()) == "KeyError"
    assert parse_json("[[1]]", "x") == [[1]]
