"""The stock folder of a student whose teacher is a pipeline of a family, its LoRA file, and the self-checks of both.

A run is at its end here and its device as full as it ever was. So all is loaded and written on the CPU, one pipeline
after the other, and what a self-check computes on the student's own device is one call of one module at a time: two
devices differ by more than an export may (TF32 convolutions, for one), and text encoders need not be there at all.
"""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from onestill.core.tensors import without_autocast
from onestill.sampling.generate import student_generator
from onestill.students import model_card as card
from onestill.students.lora import LORA_FOLDER, SCHEDULER_FILE, load_with_lora, write_lora
from onestill.students.student import Student, TimeEmbeddingInjection, last_layer, time_embeddings
from onestill.teachers.pipelines.folder import has_checker, load_stock
from onestill.teachers.pipelines.spec import PipelineSpec
from onestill.teachers.pipelines.teacher import PipelineTeacher


def write_family(
    student: Student, teacher: PipelineTeacher, folder: Path, t: float, guidance_scale: float | None, facts: card.Facts
) -> tuple[float, card.Facts]:
    """Write a student into an empty folder, all but its card; return what the self-checks found, and what the card says.

    Args:
        student: The student.
        teacher: Its teacher.
        folder: The folder.
        t: The target time.
        guidance_scale: w, for students that take it.
        facts: What is known of the run.
    """
    plain, embeddings = _write_folder(student, teacher, folder, t, guidance_scale)
    gc.collect()  # what was written: modules know each other in circles
    error, net_time = _check_folder(student, teacher, plain, folder, t, guidance_scale)
    facts = replace(facts, checked=has_checker(folder))
    if size := _size_words(teacher, is_default=plain is not teacher.pipeline_spec):
        facts = replace(facts, size=size)
    if why_no_file(student) is None:
        gc.collect()  # what was checked
        write_lora(teacher, student.network, embeddings, net_time, folder / LORA_FOLDER)
        pipeline = load_with_lora(teacher, folder / LORA_FOLDER)
        # This pipeline is the teacher's own, whose default size is another.
        error = max(error, _check(student, teacher, teacher.pipeline_spec, pipeline, t, guidance_scale))
    return error, facts


def _write_folder(
    student: Student, teacher: PipelineTeacher, folder: Path, t: float, guidance_scale: float | None
) -> tuple[PipelineSpec, dict[str, Tensor]]:
    """Write the stock folder; return the family of its plain call, and what its time embeddings give, by name."""
    baked = student.bake(t, guidance_scale)
    plain = teacher.write_student(baked, folder)
    return plain, {name: last_layer(baked.get_submodule(name)).bias.detach() for name in time_embeddings(baked)}


def _check_folder(
    student: Student,
    teacher: PipelineTeacher,
    plain: PipelineSpec,
    folder: Path,
    t: float,
    guidance_scale: float | None,
) -> tuple[float, float]:
    """Return (what `_check` finds of the written folder, the time that its one step gives the network)."""
    pipeline = load_stock(type(teacher.pipeline), folder)
    return _check(student, teacher, plain, pipeline, t, guidance_scale), plain.one_step_time(pipeline)


@torch.no_grad()
@without_autocast
def _check(
    student: Student,
    teacher: PipelineTeacher,
    family: PipelineSpec,
    pipeline: Any,
    t: float,
    guidance_scale: float | None,
    num: int = 2,
) -> float:
    """Return the largest difference of images between the plain call of a pipeline, loaded afresh, and the student.

    Args:
        student: The student.
        teacher: Its teacher.
        family: How the pipeline is called.
        pipeline: The pipeline, on the CPU.
        t: The target time.
        guidance_scale: w, for students that take it.
        num: Images.
    """
    device = next(student.parameters()).device
    network, decoder = getattr(pipeline, family.network), getattr(pipeline, "vae", None)
    with computing_on(device, (network, "forward"), (decoder, "decode")):
        images, eps, cond = family.plain_call(pipeline, teacher.signature, num)
    cond = student.with_scale(cond, guidance_scale, num)
    expected = teacher.decode(student_generator(student, t=t, device=device)(eps, cond))
    return float((images.clamp(-1, 1) - expected.cpu().clamp(-1, 1)).abs().max())


@contextmanager
def computing_on(device: torch.device, *methods: tuple[Any, str]) -> Iterator[None]:
    """Let modules on the CPU compute on a device: each goes there for a call of its method, and back.

    Args:
        device: The device.
        methods: Modules and names of their methods; None in the place of a module that is not there.
    """

    def there(module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)  # pipelines read its signature
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = send_to_device((args, kwargs), device)
            try:
                module.to(device)
                return send_to_device(method(*args, **kwargs), torch.device("cpu"))
            finally:
                module.to("cpu")

        return call

    found = [(module, name) for module, name in methods if module is not None]
    for module, name in found:
        setattr(module, name, there(module, getattr(module, name)))
    try:
        yield
    finally:
        for module, name in found:
            delattr(module, name)  # what the class has is left


def why_no_file(student: Student) -> str | None:
    """Return why a student is not written as a LoRA file too, or None if it is."""
    if student.lora is None:
        return "it has no LoRA"
    if not student.teacher.takes_lora_files:
        return "the teacher's pipeline takes no LoRA files"
    if not isinstance(student.injection, TimeEmbeddingInjection):
        return "the target time enters as biases, which a LoRA file does not hold"
    return None


def lora_words(student: Student, folder: Path) -> str:
    """Return what a card says of a LoRA student."""
    assert student.lora is not None
    if (reason := why_no_file(student)) is not None:
        return f"rank {student.lora.rank}, merged into the weights; there is no LoRA file: {reason}"
    kind = json.loads((folder / LORA_FOLDER / SCHEDULER_FILE).read_text(encoding="utf-8"))["_class_name"]
    return (
        f"rank {student.lora.rank}, merged into the weights. `{LORA_FOLDER}/` holds the same student for the teacher's own "
        f'pipeline: `pipe.load_lora_weights("path/to/this/folder/{LORA_FOLDER}")`, then `pipe.scheduler = '
        f'diffusers.{kind}.from_pretrained("path/to/this/folder/{LORA_FOLDER}")`, then the call above; '
        "scheduler and LoRA belong together"
    )


def _size_words(teacher: PipelineTeacher, *, is_default: bool) -> str:
    """Return what a card says of the arguments that were asked for; "" if none were."""
    asked = ", ".join(f"{name} {value}" for name, value in teacher.pipeline_spec.given.items())
    default = "this folder's default size is that one too" if is_default else "the folder's defaults are others"
    return f"{asked}, as distilled and as in the call above; {default}" if asked else ""
