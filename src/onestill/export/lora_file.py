"""A LoRA student as a file that the teacher's own pipeline loads, beside the scheduler of its one step, or its few.

A plain LoRA file has no place for the target time, which is a constant added to the time embedding. It needs none:
in one step the pipeline's time is one number, the last layer of the time embedding sees one fixed vector h, and the
update u h^T / |h|^2 adds exactly u. In K steps it sees K vectors, and sum_k u_k g_k^T of their dual basis adds u_k to
each, eq. (30): rank K.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor, nn

from onestill.students.bake import dual_basis, embedded
from onestill.students.injection import TimeEmbeddingInjection
from onestill.students.lora import adapter_tensors
from onestill.students.student import Student
from onestill.teachers.pipelines.teacher import PipelineTeacher

LORA_FOLDER, SCHEDULER_FILE = "lora", "scheduler_config.json"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"


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
    teacher: PipelineTeacher,
    network: nn.Module,
    wanted: Mapping[str, Tensor],
    net_times: Sequence[float],
    scheduler: Any,
    folder: Path,
) -> None:
    """Write `WEIGHTS_FILE` for the teacher's own pipeline, and the scheduler of the student's steps.

    The student's network has its adapters. Each time embedding is to give constants instead, [K, E] by its last layer's
    name in `wanted`; `net_times` are the times that the K steps give the network.
    """
    embeddings = tuple(name.rpartition(".")[0] for name in wanted)
    tensors = adapter_tensors(network, without=embeddings) | constant_updates(teacher, net_times, wanted)
    save = type(teacher.pipeline).save_lora_weights
    save(folder, **{f"{teacher.pipeline_spec.network}_lora_layers": tensors}, safe_serialization=True)
    scheduler.save_pretrained(folder)


def constant_updates(
    teacher: PipelineTeacher, net_times: Sequence[float], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the updates of rank K that give each time embedding its constants when told K times, eq. (30)."""
    found: dict[str, Tensor] = {}
    for layer, (h, output) in embedded(teacher, teacher.network, net_times).items():
        g, u = dual_basis(h), wanted[layer].double().cpu() - output
        size = g.norm(dim=1, keepdim=True)
        found[f"{layer}.lora_A.weight"] = (g / size).float().contiguous()
        found[f"{layer}.lora_B.weight"] = (u * size).T.float().contiguous()
    return found


def load_with_lora(teacher: PipelineTeacher, folder: Path, name: str = WEIGHTS_FILE) -> Any:
    """Return the teacher's own pipeline, loaded afresh, with a LoRA file of a name and the scheduler beside it."""
    scheduler = getattr(diffusers, scheduler_class(folder)).from_pretrained(folder, local_files_only=True)
    pipeline = teacher.load_afresh({"scheduler": scheduler})
    pipeline.load_lora_weights(folder, weight_name=name, local_files_only=True, use_safetensors=True)
    return pipeline


def lora_words(student: Student, folder: Path) -> str:
    """Return what a card says of a LoRA student."""
    assert student.lora is not None
    reason = why_no_file(student)
    if reason is None and not (folder / LORA_FOLDER).is_dir():
        reason = "the times of its steps hardly differ to the last layer of the teacher's time embedding"
    if reason is not None:
        return f"rank {student.lora.rank}, merged into the weights; there is no LoRA file: {reason}"
    kind, place = scheduler_class(folder / LORA_FOLDER), f'"path/to/this/folder/{LORA_FOLDER}"'
    return (
        f"rank {student.lora.rank}, merged into the weights. `{LORA_FOLDER}/` holds the same student for the teacher's "
        f"own pipeline: `pipe.load_lora_weights({place})`, then `pipe.scheduler = diffusers.{kind}.from_pretrained({place})`, "
        "then the call above; scheduler and LoRA belong together"
    )


def scheduler_class(folder: Path) -> str:
    """Return the class of the scheduler in a folder of a LoRA file."""
    return str(json.loads((folder / SCHEDULER_FILE).read_text(encoding="utf-8"))["_class_name"])
