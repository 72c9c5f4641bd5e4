"""Students as `torch.export` programs: what torch alone draws with the file is what the student draws."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import trained
from runs_helpers import assert_refused, call_cli, finished_run, tiny_network, zero_snr_scheduler
from torch import Tensor, nn

from onestill.core.tensors import Cond, noise
from onestill.diffusion.process import CosineVP
from onestill.export.export import ExportError, export_student
from onestill.export.program import PROGRAM_FILE
from onestill.sampling.generate import student_generator
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.module import module_teacher
from onestill.teachers.pixel import unet2d_teacher

Labels = Callable[[Teacher, int], Cond]


def drawn(student: Student, cond: Cond, num: int, num_steps: int = 1, t: float = 0.0) -> Tensor:
    eps = noise(range(num), student.spec.sample_shape)
    return student_generator(student, num_steps=num_steps, t=t)(eps, cond)


def loaded(folder: Path) -> nn.Module:
    return torch.export.load(folder / PROGRAM_FILE).module()


def test_the_program_of_a_pixel_student(labels_for: Labels, tmp_path: Path) -> None:
    student = trained(unet2d_teacher(tiny_network(num_classes=5), zero_snr_scheduler(), null_class=0))
    error = export_student(student, tmp_path / "out", format="torch", num_inference_steps=2)
    for num in (1, 5, 65):  # diffusers asks whether there are 64
        cond = labels_for(student.teacher, num)
        expected = drawn(student, cond, num, 2)
        found = loaded(tmp_path / "out")(noise(range(num), (1, 8, 8)), *cond.values())
        assert (found - expected.clamp(-1, 1)).abs().max() <= 1e-6 * max(1, float(expected.abs().max()))
    assert error <= 1e-6 and (found.abs() < 1).sum() > 20
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "onestill.json", PROGRAM_FILE]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "num_inference_steps" not in card
    assert "library_name: pytorch\n" in card and "- pytorch\n- distillation\n- 2-step\n" in card
    assert "- diffusers" not in card, "which does not load it"

    with zipfile.ZipFile(tmp_path / "out" / PROGRAM_FILE) as file:
        held = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    assert not [name for name, data in held.items() if data[:1] == b"\x80" and data[-1:] == b"."], "pickles"
    assert not [name for name, data in held.items() if name.endswith(".pt") and data]
    model = held["models/model.json"].decode()
    assert json.loads(model) and "aten.conv2d" in model
    weights = held["data/weights/model_weights_config.json"].decode()
    assert "aten.sin" not in model and "time_embedding.linear_1" not in weights, "no time is computed with"
    assert "conv_in.weight" in weights
    assert ".py" not in model, "no file of the machine is named"


@pytest.mark.parametrize(("name", "t"), [("module-cosine-v", 0.0), ("module-flow-velocity", 0.4)])
def test_networks_of_ones_own(cases: dict[str, Any], tmp_path: Path, name: str, t: float) -> None:
    student = trained(cases[name].build())
    export_student(student, tmp_path / "out", format="torch", t=t)
    found = loaded(tmp_path / "out")(noise(range(4), student.spec.sample_shape))
    assert (found - drawn(student, {}, 4, t=t)).abs().max() <= 1e-5
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "to `sample` [B x 1 x 8 x 8 float32], for any number" in card, "what they draw is left as it is"


def test_guidance_is_baked_and_the_card_draws_with_torch_alone(
    cases: dict[str, Any], labels_for: Labels, tmp_path: Path
) -> None:
    student = trained(cases["module-class"].build(), guidance_range=(1.0, 4.0))
    export_student(student, tmp_path / "out", format="torch", guidance_scale=3.3)
    cond = {**labels_for(student.teacher, 4), "guidance_scale": torch.full((4,), 3.3)}
    found = loaded(tmp_path / "out")(noise(range(4), (1, 8, 8)), cond["class_labels"])
    assert (found - drawn(student, cond, 4)).abs().max() <= 1e-5
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    none = "import sys; sys.modules.update(dict.fromkeys(['onestill', 'diffusers', 'transformers'])); "
    code = f"{none}{code}\nprint(tuple(images.shape))".replace("path/to/this/folder", str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(3, 1, 8, 8)", done.stderr


def test_a_network_that_cannot_be_traced_is_no_program(tmp_path: Path) -> None:
    class Choosing(nn.Module):
        """Asks what its numbers are."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor, net_time: Tensor) -> Tensor:
            return self.one(x) + self.two(x) if float(x.sum()) > 0 else self.two(x) - self.one(x)

    student = trained(module_teacher(Choosing(), CosineVP(), "sample", (2,)))
    with pytest.raises(ExportError, match=r"cannot be exported: torch.export cannot trace it: \S"):
        export_student(student, tmp_path / "out", format="torch")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_it_and_refuses_what_it_cannot(tmp_path: Path) -> None:
    run, place = finished_run(), tmp_path / "both"
    both = call_cli("export", run, "--format", "diffusers,torch", "--output", place)
    assert both.code == 0 and len(re.findall("self-check against the student", both.out)) == 2
    assert {path.name for path in place.iterdir()} == {"diffusers", "torch"}
    again = call_cli("export", run, "--format", "torch", "--output", place / "torch")
    assert_refused(again, f"--output {place / 'torch'}: exists")
    assert_refused(call_cli("export", run, "--format", "jax", "--output", tmp_path / "no"), "--format ")
    assert_refused(call_cli("sample", place / "torch", "--output", tmp_path / "x.png"), "--student ")
    assert {path.name for path in tmp_path.iterdir()} == {"both"}
