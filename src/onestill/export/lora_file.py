"""A LoRA student as a file that the teacher's own pipeline loads, beside the scheduler of its one step.

A plain LoRA file has no place for the target time, which is a constant added to the time embedding. It needs none:
in one step the pipeline's time is one number, the last layer of the time embedding sees one fixed vector h, and the
update u h^T / |h|^2 adds exactly u.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from onestill.core.tensors import Cond
from onestill.students.injection import TimeEmbeddingInjection, observe
from onestill.students.lora import adapter_tensors
from onestill.students.student import Student
from onestill.teachers.pipelines.teacher import PipelineTeacher

LORA_FOLDER, SCHEDULER_FILE = "lora", "scheduler_config.json"


def why_no_file(student: Student) -> str | None:
    """Return why a student is not written as a LoRA file too, or None if it is."""
    if student.lora is None:
        return "it has no LoRA"
    if not student.teacher.takes_lora_files:
        return "the teacher's pipeline takes no LoRA files"
    if not isinstance(student.injection, TimeEmbeddingInjection):
        return "the target time enters as biases, which a LoRA file does not hold"
    return None


def write_lora(
    teacher: PipelineTeacher, network: nn.Module, embeddings: Mapping[str, Tensor], net_time: float, folder: Path
) -> None:
    """Write `pytorch_lora_weights.safetensors` for the teacher's own pipeline, and the scheduler of its one step.

    The student's network has its adapters. Each time embedding is to give a constant instead, by name in `embeddings`;
    `net_time` is the time that the one step gives the network.
    """
    spec, pipeline_spec = teacher.spec, teacher.pipeline_spec
    tensors = adapter_tensors(network, without=tuple(embeddings)) | constant_updates(teacher, net_time, embeddings)
    save = type(teacher.pipeline).save_lora_weights
    save(folder, **{f"{pipeline_spec.network}_lora_layers": tensors}, safe_serialization=True)
    alpha = spec.process.level(spec.t_max)[0]
    pipeline_spec.one_step(teacher.pipeline, spec.prediction_type, alpha).save_pretrained(folder)


def constant_updates(teacher: PipelineTeacher, net_time: float, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the updates of rank 1 that give each time embedding its constant in the one step at `net_time`."""

    def run(x_t: Tensor, cond: Cond) -> None:
        teacher.call(teacher.network, x_t, torch.full((1,), net_time, device=x_t.device, dtype=x_t.dtype), cond)

    constants = {f"{name}.linear_2": value for name, value in embeddings.items()}
    found: dict[str, Tensor] = {}
    for layer, seen in observe(teacher, teacher.network, constants, run).items():
        h, output = (value[0].double().cpu() for value in seen)
        u = constants[layer].double().cpu() - output
        found[f"{layer}.lora_A.weight"] = (h / h.norm())[None].float()
        found[f"{layer}.lora_B.weight"] = (u / h.norm())[:, None].float()
    return found


def load_with_lora(teacher: PipelineTeacher, folder: Path) -> Any:
    """Return the teacher's own pipeline, loaded afresh, with a LoRA file and the scheduler beside it."""
    scheduler = getattr(diffusers, _scheduler_class(folder)).from_pretrained(folder, local_files_only=True)
    pipeline = teacher.load_afresh({"scheduler": scheduler})
    pipeline.load_lora_weights(folder, local_files_only=True, use_safetensors=True)
    return pipeline


def lora_words(student: Student, folder: Path) -> str:
    """Return what a card says of a LoRA student."""
    assert student.lora is not None
    if (reason := why_no_file(student)) is not None:
        return f"rank {student.lora.rank}, merged into the weights; there is no LoRA file: {reason}"
    kind, place = _scheduler_class(folder / LORA_FOLDER), f'"path/to/this/folder/{LORA_FOLDER}"'
    return (
        f"rank {student.lora.rank}, merged into the weights. `{LORA_FOLDER}/` holds the same student for the teacher's "
        f"own pipeline: `pipe.load_lora_weights({place})`, then `pipe.scheduler = diffusers.{kind}.from_pretrained({place})`, "
        "then the call above; scheduler and LoRA belong together"
    )


def _scheduler_class(folder: Path) -> str:
    return str(json.loads((folder / SCHEDULER_FILE).read_text(encoding="utf-8"))["_class_name"])
