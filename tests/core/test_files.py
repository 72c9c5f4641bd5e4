"""Files of tensors have the mode that any new file has, whoever writes them."""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import onestill
from onestill.core.files import save_tensors, set_usual_mode
from onestill.evaluation.classifier import ConvFeatures
from onestill.export.export import export_student
from onestill.students.student import Student

TENSORS = {"x": torch.zeros(2)}


@pytest.fixture(params=[(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=["022", "077", "002"])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode that new files have under the umask of the test."""
    umask, wanted = request.param
    before = os.umask(umask)
    try:
        yield wanted
    finally:
        os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_a_file_has_the_mode_of_any_other(tmp_path: Path, mode: int) -> None:
    save_tensors(TENSORS, tmp_path / "a.safetensors", {"about": "it"})
    (tmp_path / "b.json").write_text("{}")
    assert modes(tmp_path) == {mode}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.json"]


def test_the_umask_is_the_one_of_now_and_not_of_an_earlier_file(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(TENSORS, path)
    before = os.umask(0o027)
    try:
        save_tensors(TENSORS, path)
    finally:
        os.umask(before)
    assert modes(tmp_path) == {0o640}


@pytest.mark.parametrize("name", ["class-null-last", "module-class"])
def test_exported_folders(cases: dict[str, Any], name: str, tmp_path: Path, mode: int) -> None:
    export_student(Student(cases[name].build()), tmp_path / "out")
    assert list(tmp_path.rglob("*.safetensors"))
    assert modes(tmp_path) == {mode}


def test_classifiers(tmp_path: Path, mode: int) -> None:
    ConvFeatures(width=8, feature_dim=5, num_classes=3).save(tmp_path / "c.safetensors")
    assert modes(tmp_path) == {mode}


def test_what_may_not_be_changed_is_left_where_it_is_right_already(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a file system without modes, where every file shows the same and none can be set.
    save_tensors(TENSORS, tmp_path / "a.safetensors")
    monkeypatch.setattr(Path, "chmod", lambda *_: pytest.fail("it has the mode already"))
    set_usual_mode(tmp_path)


def test_nobody_else_writes_tensors() -> None:
    # What diffusers writes goes through `export_student`, whose folders are looked at above and in test_text_runs.
    package = Path(onestill.__file__).parent
    names = {"save_file", "serialize_file"}
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names}
    }
    assert found == {"core/files.py"}
