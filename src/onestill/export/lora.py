"""LoRA students as files alone: one for diffusers, and one of the names that ComfyUI and A1111 read.

For the U-Nets of Stable Diffusion those two know the names of Kohya's scripts, of the original code, and of diffusers as
it was: an attention layer's tensor under its present name is passed over, and what is drawn then is broken without an
error. The networks of other families they know by the names that diffusers writes.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file
from torch import Tensor

from onestill.core.files import save_tensors
from onestill.export.lora_file import WEIGHTS_FILE, load_with_lora, why_no_file
from onestill.export.pipeline import PipelineFormat
from onestill.export.programs import Programs
from onestill.export.single_file import why_unknown
from onestill.students.model_card import Facts, is_hub_id
from onestill.students.one_step import OneStep
from onestill.students.student import Student
from onestill.teachers.pipelines.folder import has_checker

# Kohya's names of these are the original ones: diffusers, which reads both, takes its own apart in the wrong place.
ORIGINAL = {
    "lora_unet_add_embedding_linear_1": "lora_unet_label_emb_0_0",
    "lora_unet_add_embedding_linear_2": "lora_unet_label_emb_0_2",
}


class LoraFormat(PipelineFormat):
    """A folder for `load_lora_weights` of the teacher's own pipeline, with the scheduler of the student's steps."""

    def __init__(
        self, student: Student, t: float = 0.0, guidance_scale: float | None = None, num_steps: int = 1
    ) -> None:
        super().__init__(student, t, guidance_scale, num_steps)
        self.programs = Programs(student, num_steps)
        self.second = None if why_unknown(student) else f"{self.programs.stem}-comfyui.safetensors"
        """The file for other programs, where those do not know the names of the first."""
        self.scheduler = ""

    @classmethod
    def why_not(cls, student: Student, num_steps: int) -> str | None:
        why = why_no_file(student)
        return None if why is None else f"there is no LoRA file of this student: {why}"

    def schedulers(self) -> Sequence[Any]:
        if self.second is None or self.plain.few_steps is None:
            return super().schedulers()
        # One step too is told the time that other programs tell it: a LoRA holds the constant of that time alone.
        return self.plain.few_steps(self.teacher.pipeline, self.teacher.spec, self.student.levels(self.num_steps))

    def write(self, step: OneStep, folder: Path) -> None:
        pipeline, net_times = self.assembled(step)
        self.scheduler = type(pipeline.scheduler).__name__
        if not self.write_lora_file(step, pipeline, net_times, folder):
            raise ValueError("the times of its steps hardly differ to the last layer of the teacher's time embedding")
        if self.second is not None:
            said = {"ss_network_module": "networks.lora", "modelspec.usage_hint": self.programs.sampler}
            save_tensors(kohya_tensors(load_file(folder / WEIGHTS_FILE)), folder / self.second, said)

    def check(self, folder: Path) -> float:
        error = 0.0
        for name in (WEIGHTS_FILE, self.second):
            if name is not None:
                error = max(error, self.difference(self.own, load_with_lora(self.teacher, folder, name)))
                gc.collect()  # what was checked
        return error

    def code(self, facts: Facts) -> str:
        call, source = super().code(facts).rpartition("\n")[2], self.teacher.spec.source
        teacher = source if is_hub_id(source) else "path/to/the/teacher"
        return (
            "import diffusers\n\n"
            f'pipe = diffusers.DiffusionPipeline.from_pretrained("{teacher}")\n'
            f'pipe.load_lora_weights("path/to/this/folder", weight_name="{WEIGHTS_FILE}")\n'
            f'pipe.scheduler = diffusers.{self.scheduler}.from_pretrained("path/to/this/folder")\n'
            f"{call}"
        )

    def facts(self, folder: Path, facts: Facts) -> Facts:
        assert self.student.lora is not None, "asked of by `why_not`"
        words = f"rank {self.student.lora.rank}, for the teacher's own pipeline; scheduler and LoRA belong together"
        given = ", ".join(f"{name} {value}" for name, value in self.teacher.arguments.items())
        size = f"{given}, as distilled and as in the call above" if given else facts.size
        kind = "a LoRA of strength 1 beside the teacher's own checkpoint"
        programs = "" if self.second is None else self.programs.words(self.second, kind)
        said = replace(facts, lora=words, size=size, programs=programs, checked=has_checker(self.teacher.folder))
        return replace(said, relation="adapter", is_told=self.second is not None)


def kohya_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA's tensors, `unet.LAYER.lora_A.weight`, by Kohya's names, alpha being the rank of each: a factor of 1."""
    found: dict[str, Tensor] = convert_state_dict_to_kohya(dict(tensors))
    layers = {name: name.partition(".")[0] for name in found}
    return {name.replace(layer, ORIGINAL.get(layer, layer), 1): found[name] for name, layer in layers.items()}
