"""Students as ONNX: what onnxruntime draws with the files is what the student draws, with nothing of its time left."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_helpers import trained
from PIL import Image
from runs_helpers import assert_refused, call_cli, finished_run, tiny_network, zero_snr_scheduler
from torch import Tensor, nn

from onestill.core.errors import SettingError
from onestill.core.tensors import Cond, noise
from onestill.diffusion.process import CosineVP
from onestill.export import onnx_file
from onestill.export.export import ExportError, export_student
from onestill.export.settings import Options
from onestill.sampling.generate import student_generator
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.module import module_teacher
from onestill.teachers.pixel import unet2d_teacher

Labels = Callable[[Teacher, int], Cond]


def drawn(student: Student, cond: Cond, num: int, num_steps: int = 1) -> Tensor:
    return student_generator(student, num_steps=num_steps)(noise(range(num), student.spec.sample_shape), cond)


def ran(path: Path, **given: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {name: rows.numpy() for name, rows in given.items()})
    return torch.from_numpy(found)


def depend_on_nothing(model: onnx.ModelProto) -> list[str]:
    """Return the kinds of the nodes that could be computed before anything is given."""
    given, found = {value.name for value in model.graph.input}, []
    for node in model.graph.node:
        if any(name in given for name in node.input):
            given |= set(node.output)
        else:
            found.append(node.op_type)
    return found


@pytest.fixture(scope="module")
def pixel_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path]:
    """A student of a class-conditional teacher, and its folder: read only."""
    student = trained(unet2d_teacher(tiny_network(num_classes=5), zero_snr_scheduler(), null_class=0))
    folder = tmp_path_factory.mktemp("onnx") / "out"
    assert export_student(student, folder, format="onnx") <= 1e-5
    return student, folder


def test_the_graph_is_the_student(pixel_folder: tuple[Student, Path], labels_for: Labels) -> None:
    student, folder = pixel_folder
    for num in (1, 3, 65):
        cond = labels_for(student.teacher, num)
        expected = drawn(student, cond, num).clamp(-1, 1)
        found = ran(folder / "student.onnx", noise=noise(range(num), (1, 8, 8)), **cond)
        assert (found - expected).abs().max() <= 1e-5 and (found.abs() < 1).any()


def test_the_file_says_what_it_is_and_computes_with_no_time(pixel_folder: tuple[Student, Path]) -> None:
    model = onnx.load(pixel_folder[1] / "student.onnx")
    onnx.checker.check_model(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import if not entry.domain] == [("", 18)]
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["opset"] == "18" and said["batch"].startswith("dynamic") and said["picture"] == "in [-1, 1]"
    assert (said["class_labels"], said["network_evaluations"]) == ("1,2,3,4", "1")
    assert not depend_on_nothing(model)
    assert not {"Sin", "Cos"} & {node.op_type for node in model.graph.node}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node), (
        "no file of the machine is named"
    )
    shapes = [[axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
              for value in (*model.graph.input, *model.graph.output)]  # fmt: skip
    assert all(isinstance(shape[0], str) for shape in shapes) and shapes[0][1:] == shapes[-1][1:] == [1, 8, 8]


def test_the_runner_draws_where_torch_cannot_be_imported(pixel_folder: tuple[Student, Path], tmp_path: Path) -> None:
    _, folder = pixel_folder
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "opset 18" in card and "for any number B of pictures" in card and "numpy's, not torch's" in card
    assert "library_name: onnx\n" in card and "- onnx\n- distillation\n" in card and "- diffusers" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    none = "import sys\nsys.modules.update(dict.fromkeys(['torch', 'onestill', 'diffusers', 'transformers']))\n"
    code = f"{none}{code}\nprint(images.shape, images.min() >= -1)".replace("path/to/this/folder", str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "(4, 1, 8, 8) True", done.stderr

    main = (
        f"{none}import runpy\nsys.argv = ['run.py', '2', '4', '--seed', '7', '--output', {str(tmp_path / 'x.png')!r}]\n"
    )
    main += f"runpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')"
    subprocess.run([sys.executable, "-c", main], check=True)
    rows = [np.random.default_rng(seed).standard_normal((1, 8, 8), dtype=np.float32) for seed in (7, 8)]
    found = ran(folder / "student.onnx", noise=torch.from_numpy(np.stack(rows)), class_labels=torch.tensor([2, 4]))
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "x.png"))).float() / 127.5 - 1
    assert (pixels - torch.cat([*found[:, 0]], dim=1)).abs().max() <= 1 / 127


def run_script(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the runner of a folder, as python run.py does it."""
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    runpy.run_path(str(folder / "run.py"), run_name="__main__")


def test_the_runner_knows_the_labels(
    pixel_folder: tuple[Student, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, folder = pixel_folder
    for label in ("0", "cat"):  # 0 is the null class
        with pytest.raises(SystemExit, match="2"):
            run_script(folder, monkeypatch, 3, label, "--output", tmp_path / "x.png")
        assert f"run.py: error: {label} is no label of this student, which has 1, 2, 3, 4" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    run_script(folder, monkeypatch, "--output", tmp_path / "none.png")
    run_script(folder, monkeypatch, 1, "--output", tmp_path / "first.png")
    assert (tmp_path / "none.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    draw = runpy.run_path(str(folder / "run.py"))["draw"]
    with pytest.raises(ValueError, match="1 labels or prompts, and 2 seeds"):
        draw([1], [0, 1])


@pytest.fixture
def own_student(timed_network: Callable[..., nn.Module]) -> Student:
    """A student of a network of one's own."""
    return trained(module_teacher(timed_network(width=16), CosineVP(), "v_prediction", (1, 8, 8)))


def test_half_stores_half_and_has_a_bound_of_its_own(
    own_student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = own_student
    with torch.no_grad():
        [*student.network.parameters()][-1].add_(2)  # darker than black
    whole = export_student(student, tmp_path / "whole", format="onnx")
    error = export_student(student, tmp_path / "half", format="onnx", options=Options(half=True))
    assert whole <= 1e-5 < error <= onnx_file.HALF_TOLERANCE
    run_script(tmp_path / "whole", monkeypatch, "--output", tmp_path / "x.png")
    eps = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 8, 8), dtype=np.float32))
    (expected,) = ran(tmp_path / "whole" / "student.onnx", noise=eps)[0]
    assert expected.abs().max() > 1.1, "what such a network draws has no bounds"
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "x.png"))).float() / 127.5 - 1
    assert (pixels - expected.clamp(-1, 1)).abs().max() <= 1 / 127
    (tmp_path / "x.png").unlink()
    types = {
        value.data_type
        for value in onnx.load(tmp_path / "half" / "student.onnx").graph.initializer
        if len(value.raw_data) > 128
    }
    assert types == {onnx.TensorProto.FLOAT16}
    assert "half precision and computed with in single" in (tmp_path / "half" / "README.md").read_text(encoding="utf-8")
    found = ran(tmp_path / "half" / "student.onnx", noise=noise(range(5), (1, 8, 8)))
    assert found.dtype == torch.float32 and (found - drawn(student, {}, 5)).abs().max() <= onnx_file.HALF_TOLERANCE
    with torch.no_grad():
        next(p for p in student.network.parameters() if p.numel() > 64).mul_(0).add_(1e6)  # which half cannot hold
    with pytest.raises(ExportError, match=r"self-check failed: .*allowed 5e-02"):
        export_student(student, tmp_path / "no", format="onnx", options=Options(half=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "whole"]


def test_weights_that_are_too_many_for_one_file_lie_beside_it(
    own_student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 1000)
    export_student(own_student, tmp_path / "out", format="onnx")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "onestill.json", "run.py", "student.onnx", "student.onnx.data"]
    found = ran(tmp_path / "out" / "student.onnx", noise=noise(range(4), (1, 8, 8)))
    assert (found - drawn(own_student, {}, 4)).abs().max() <= 1e-5


def test_several_steps_are_one_graph(own_student: Student, tmp_path: Path) -> None:
    assert export_student(own_student, tmp_path / "out", format="onnx", num_inference_steps=3) <= 1e-5
    found = ran(tmp_path / "out" / "student.onnx", noise=noise(range(5), (1, 8, 8)))
    assert (found - drawn(own_student, {}, 5, 3)).abs().max() <= 1e-5
    assert (found - drawn(own_student, {}, 5)).abs().max() > 1e-3
    model = onnx.load(tmp_path / "out" / "student.onnx")
    assert not depend_on_nothing(model) and [node.op_type for node in model.graph.node].count("Conv") == 6
    assert "# 3-step student" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_time_that_is_no_embedding_is_folded_too(cases: dict[str, Any], tmp_path: Path) -> None:
    student = trained(cases["module-cosine-v"].build())
    assert export_student(student, tmp_path / "out", format="onnx") <= 1e-5
    assert not depend_on_nothing(onnx.load(tmp_path / "out" / "student.onnx"))


def test_what_cannot_be_is_refused_before_anything_is_read(
    own_student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = finished_run(), tmp_path / "out"
    refused = call_cli("export", run, "--format", "torch", "--half", "--output", out)
    assert_refused(refused, "--half: is of the formats onnx and browser; give --format onnx, or leave it out")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find(name, *a))
    refused = call_cli("export", "nowhere", "--format", "onnx", "--output", out)
    assert_refused(refused, "--student nowhere: no such folder")
    refused = call_cli("export", run, "--format", "onnx", "--output", out)
    assert_refused(refused, "--format onnx: needs onnxscript; pip install 'onestill[onnx]' brings them")
    with pytest.raises(SettingError, match="half=True: is of the formats onnx and browser"):
        export_student(own_student, out, options=Options(half=True))
    assert not out.exists()
