"""Text students as files of graphs: prompts, as token ids, are what their pipeline makes of them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from test_conformance import perturbed, teacher_of
from tokenizers import Tokenizer

from onestill.core.tensors import noise
from onestill.export.export import check_format, export_student
from onestill.export.program import PROGRAM_FILE
from onestill.sampling.generate import student_generator

PROMPTS = ["a photo", "something longer than there is room for, and then some"]


def ran(path: Path, **given: torch.Tensor) -> torch.Tensor:
    (found,) = onnxruntime.InferenceSession(path).run(None, {name: rows.numpy() for name, rows in given.items()})
    return torch.from_numpy(found)


def test_prompts_are_what_the_pipeline_makes_of_them(tmp_path: Path) -> None:
    teacher = teacher_of("sd-v-zero-snr")
    student, cond = perturbed(teacher), teacher.encode(PROMPTS)
    eps = noise(range(2), student.spec.sample_shape)
    expected = teacher.decode(student_generator(student)(eps, cond)).clamp(-1, 1)
    for name in ("torch", "onnx"):
        assert export_student(student, tmp_path / name, format=name) <= 1e-4
    rows = Tokenizer.from_file(str(tmp_path / "onnx" / "tokenizer.json")).encode_batch(PROMPTS)
    ids = torch.tensor([row.ids for row in rows])
    program = torch.export.load(tmp_path / "torch" / PROGRAM_FILE).module()
    assert (program(eps, ids) - expected).abs().max() <= 1e-5

    files = {path.name for path in (tmp_path / "onnx").iterdir()}
    graphs = {"text_encoder.onnx", "student.onnx", "decoder.onnx"}
    assert files == {*graphs, "tokenizer.json", "run.py", "README.md", "onestill.json"}
    hidden = ran(tmp_path / "onnx" / "text_encoder.onnx", token_ids=ids)
    assert (hidden - cond["encoder_hidden_states"]).abs().max() <= 1e-5
    latents = ran(tmp_path / "onnx" / "student.onnx", noise=eps, encoder_hidden_states=hidden)
    assert (ran(tmp_path / "onnx" / "decoder.onnx", latents=latents) - expected).abs().max() <= 1e-4
    assert (expected[0] - expected[1]).abs().max() > 1e-3, "prompts must matter for this to be a test"


@pytest.mark.parametrize("name", ["sdxl-zeros", "pixart-sigma", "if"])
def test_other_families_are_refused_before_any_work(name: str) -> None:
    student = perturbed(teacher_of(name))
    with pytest.raises(ValueError, match="format='onnx': takes prompts that one text encoder turns into one tensor"):
        check_format(student, "onnx")
    with pytest.raises(ValueError, match="format='browser': .*the format torch has them as inputs"):
        check_format(student, "browser")
    assert check_format(student, "torch") == "torch"
