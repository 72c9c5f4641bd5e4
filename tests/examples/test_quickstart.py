"""The notebook, not run: it is one, it holds no outputs, and its calls are those of the package. .ci/run executes it."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

import onestill
from onestill.evaluation.config import EvaluateConfig
from onestill.sampling.config import DrawSettings, SamplerSettings
from onestill.training.config import DistillConfig

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
PIP = ["-m", "pip", "install", "--quiet"]
SETTINGS = {
    "distill": {*DistillConfig.model_fields},
    "evaluate": {*EvaluateConfig.model_fields},
    "sample": {*SamplerSettings.model_fields, *DrawSettings.model_fields},
    "load_sampler": {*SamplerSettings.model_fields},
    "interpolate": {*DrawSettings.model_fields},
    "inspect_teacher": set(),
}


@pytest.fixture(scope="module")
def notebook() -> Any:
    found = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]  # nbformat has no types
    nbformat.validate(found)
    return found


@pytest.fixture(scope="module")
def cells(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_it_holds_no_outputs(notebook: Any) -> None:
    # What it shows is made by whoever runs it, and a change of it can be read.
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 8 and not any(cell.outputs or cell.execution_count for cell in code)
    assert NOTEBOOK.stat().st_size < 20_000


def test_it_installs_only_what_is_not_there(cells: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[list[str]] = []

    class Failed:
        returncode = 1

    def run(command: list[str], **how: Any) -> Failed:
        done.append(command)
        return Failed()

    monkeypatch.setattr("subprocess.run", run)
    exec(cells[0], {})
    assert done == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"onestill is not installed: set SOURCE to git\+ and the repository's address"
    ):
        exec(cells[0], {})
    assert done == [], "nothing of that name is taken from an index"
    monkeypatch.setenv("ONESTILL_SOURCE", "no-such-folder")
    with pytest.raises(RuntimeError, match="pip cannot install 'no-such-folder': is it a clone of onestill"):
        exec(cells[0], {})
    monkeypatch.delenv("ONESTILL_SOURCE")
    monkeypatch.chdir(NOTEBOOK.parent)
    with pytest.raises(RuntimeError, match="pip cannot install '..'"):
        exec(cells[0], {})
    assert [command[1:] for command in done] == [[*PIP, "no-such-folder"], [*PIP, ".."]]


def test_its_calls_are_those_of_the_package(cells: list[str]) -> None:
    called = set()
    for node in (node for cell in cells for node in ast.walk(ast.parse(cell))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "onestill"
        ):
            called.add(node.func.attr)
            named = {keyword.arg for keyword in node.keywords if keyword.arg}
            own = {*inspect.signature(getattr(onestill, node.func.attr)).parameters}
            assert named <= own | SETTINGS[node.func.attr], node.func.attr
    assert called == SETTINGS.keys()


def test_ci_makes_it_short(cells: list[str]) -> None:
    (variable,) = re.findall(r'MAX_TRAIN_STEPS = int\(os.environ.get\("(\w+)", "1200"\)\)', cells[1])
    assert f"{variable}=" in (NOTEBOOK.parents[1] / ".ci" / "run").read_text(encoding="utf-8")
