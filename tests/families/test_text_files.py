"""Text students as files of graphs: prompts, as token ids, are what their pipeline makes of them."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_conformance import perturbed, teacher_of
from tokenizers import Tokenizer

from onestill.core.tensors import noise
from onestill.export.export import check_format, export_student
from onestill.export.program import PROGRAM_FILE
from onestill.sampling.generate import student_generator

PROMPTS = ["a photo", "something longer than there is room for, and then some"]


def ids_of(folder: Path) -> torch.Tensor:
    rows = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(PROMPTS)
    return torch.tensor([row.ids for row in rows])


def test_prompts_are_what_the_pipeline_makes_of_them(tmp_path: Path) -> None:
    teacher = teacher_of("sd-v-zero-snr")
    student, cond, folder, seeds = perturbed(teacher), teacher.encode(PROMPTS), tmp_path / "onnx", (5, 6)
    rows = [np.random.default_rng(seed).standard_normal(student.spec.sample_shape, dtype=np.float32) for seed in seeds]
    eps = torch.from_numpy(np.stack(rows))
    expected = teacher.decode(student_generator(student)(eps, cond)).clamp(-1, 1)
    assert (expected[0] - expected[1]).abs().max() > 1e-3, "prompts must matter for this to be a test"
    assert export_student(student, folder, format="onnx") <= 1e-4
    graphs = {"text_encoder.onnx", "student.onnx", "decoder.onnx"}
    assert {path.name for path in folder.iterdir()} == {
        *graphs, "tokenizer.json", "run.py", "README.md", "onestill.json",
    }  # fmt: skip
    runner = runpy.run_path(str(folder / "run.py"))
    hidden = runner["PARTS"]["text_encoder"].run(None, {"token_ids": ids_of(folder).numpy()})[0]
    assert (torch.from_numpy(hidden) - cond["encoder_hidden_states"]).abs().max() <= 1e-5
    assert (torch.from_numpy(runner["draw"](PROMPTS, seeds)) - expected).abs().max() <= 1e-4


def test_a_program_reads_token_ids(tmp_path: Path) -> None:
    teacher = teacher_of("sd-v-zero-snr")
    student = perturbed(teacher)
    assert export_student(student, tmp_path / "torch", format="torch") <= 1e-4
    eps = noise(range(2), student.spec.sample_shape)
    expected = teacher.decode(student_generator(student)(eps, teacher.encode(PROMPTS))).clamp(-1, 1)
    program = torch.export.load(tmp_path / "torch" / PROGRAM_FILE).module()
    assert (program(eps, ids_of(tmp_path / "torch")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["sdxl-zeros", "pixart-sigma", "if"])
def test_other_families_are_refused_before_any_work(name: str) -> None:
    student = perturbed(teacher_of(name))
    with pytest.raises(ValueError, match="format='onnx': takes prompts that one text encoder turns into one tensor"):
        check_format(student, "onnx")
    with pytest.raises(ValueError, match="format='browser': .*the format torch has them as inputs"):
        check_format(student, "browser")
    assert check_format(student, "torch") == "torch"


@pytest.mark.parametrize(("name", "kind"), [("flux", "FluxPipeline"), ("lumina2", "Lumina2Pipeline")])
def test_networks_that_torch_does_not_trace_are_refused_by_name(name: str, kind: str) -> None:
    student = perturbed(teacher_of(name))
    with pytest.raises(ValueError, match=f"format='torch': cannot be had of a {kind}, whose network torch.export"):
        check_format(student, "torch")
