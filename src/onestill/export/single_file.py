"""Stable Diffusion students in one file of the original names, as ComfyUI, A1111 and their kin read them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from onestill.core.files import save_tensors
from onestill.diffusion.process import DiscreteVP
from onestill.export.original_names import OPEN_CLIP, OPEN_CLIP_XL, network_names, original_tensors
from onestill.export.pipeline import PipelineFormat
from onestill.export.programs import PREDICTIONS, Programs
from onestill.students.model_card import Facts
from onestill.students.one_step import OneStep
from onestill.students.student import Student
from onestill.teachers.pipelines.folder import INDEX

CONFIG_FOLDER = "config"
FILES_OF = "Stable Diffusion 1.x, 2.x and XL"
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


def why_unknown(student: Student) -> str | None:
    """Return why programs for Stable Diffusion's original names do not know a student's network, or None if they do."""
    pipeline: Any = getattr(student.teacher, "pipeline", None)
    spec, network, kind = student.spec, getattr(pipeline, "unet", None), type(pipeline).__name__
    whose = f"a student of a {kind}" if pipeline is not None else "one of a network alone"
    if not isinstance(network, UNet2DConditionModel) or not isinstance(getattr(pipeline, "vae", None), AutoencoderKL):
        return f"is for {FILES_OF}, and this is {whose}"
    if not hasattr(type(pipeline), "from_single_file") or getattr(pipeline.config, "text_encoder", None) is None:
        return f"is for {FILES_OF}, and diffusers reads no {kind} from a single file"
    if not isinstance(spec.process, DiscreteVP) or spec.prediction_type not in PREDICTIONS:
        return (
            f"holds networks of {', '.join(PREDICTIONS)} on a discrete schedule; this one is of {spec.prediction_type}"
        )
    return None


def why_no_checkpoint(student: Student) -> str | None:
    """Return why a student's pipeline has no file of original names, or None if it has."""
    if (why := why_unknown(student)) is not None:
        return why
    pipeline: Any = getattr(student.teacher, "pipeline", None)
    network = pipeline.unet
    if pipeline.vae.config.get("latents_mean") is not None:
        return "has no place for the mean and deviation of these latents"
    second = getattr(pipeline, "text_encoder_2", None)
    if second is not None and second.config.hidden_size == pipeline.text_encoder.config.hidden_size:
        return "is read by the widths of its two text encoders, and these have the same"
    if not isinstance(network.config.layers_per_block, int):
        return "numbers blocks of one length, and this network's differ"
    try:
        network_names((name for name, _ in student.teacher.network.named_parameters()), network.config.layers_per_block)
    except ValueError as error:
        return str(error)
    return None


class SingleFileFormat(PipelineFormat):
    """A checkpoint of the original names; beside it its configuration, for diffusers."""

    def __init__(
        self, student: Student, t: float = 0.0, guidance_scale: float | None = None, num_steps: int = 1
    ) -> None:
        super().__init__(student, t, guidance_scale, num_steps)
        self.programs = Programs(student, num_steps)
        self.file = f"{self.programs.stem}.safetensors"

    @classmethod
    def why_not(cls, student: Student, num_steps: int) -> str | None:
        return why_no_checkpoint(student)

    def write(self, step: OneStep, folder: Path) -> None:
        pipeline, _ = self.assembled(step)
        pipeline.register_modules(**{name: None for name in _OPTIONAL if name in pipeline.config})
        tensors = original_tensors(pipeline)
        save_tensors({**tensors, **self._markers()}, folder / self.file, self._metadata(tensors))
        pipeline.save_config(folder / CONFIG_FOLDER)
        for name, part in pipeline.components.items():
            if part is not None:
                _save_configuration(part, folder / CONFIG_FOLDER / name)

    def check(self, folder: Path) -> float:
        return self.difference(self.plain, self._loaded(folder))

    def code(self, facts: Facts) -> str:
        call = super().code(facts).rpartition("\n")[2]
        kind = type(self.teacher.pipeline).__name__
        return (
            f"from diffusers import {kind}\n\n"
            f'pipe = {kind}.from_single_file("path/to/this/folder/{self.file}", config="path/to/this/folder/{CONFIG_FOLDER}")\n'
            f"{call}"
        )

    def facts(self, folder: Path, facts: Facts) -> Facts:
        return replace(
            super().facts(folder / CONFIG_FOLDER, facts), programs=self.programs.words(self.file, "a checkpoint")
        )

    def _loaded(self, folder: Path) -> Any:
        """Return the pipeline that diffusers makes of the file and its configuration."""
        index = json.loads((folder / CONFIG_FOLDER / INDEX).read_text(encoding="utf-8"))
        absent = {name: None for name, entry in index.items() if entry == [None, None]}
        config, cls = str(folder / CONFIG_FOLDER), type(self.teacher.pipeline)
        pipeline = cls.from_single_file(str(folder / self.file), config=config, local_files_only=True, **absent)
        pipeline.set_progress_bar_config(disable=True)
        if getattr(pipeline, "watermark", None) is not None:
            pipeline.watermark = None
        return pipeline

    def _markers(self) -> dict[str, Tensor]:
        """Return the empty tensors by which such files say that they are of v-prediction, and of zero terminal SNR."""
        is_v = self.student.spec.prediction_type == "v_prediction"
        names = ["v_pred"] * is_v + ["ztsnr"] * (is_v and math.isinf(self.programs.sigmas[0]))
        return {name: torch.zeros(0) for name in names}

    def _metadata(self, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Return what the file says of itself, by the names of Stability AI's model metadata standard."""
        is_v = self.student.spec.prediction_type == "v_prediction"
        second = f"stable-diffusion-v2-{'768-v' if is_v else '512'}"
        prefixes = {OPEN_CLIP_XL: "stable-diffusion-xl-v1-base", OPEN_CLIP: second}
        kinds = [kind for prefix, kind in prefixes.items() if any(name.startswith(prefix) for name in tensors)]
        said = {
            "sai_model_spec": "1.0.0",
            "architecture": kinds[0] if kinds else "stable-diffusion-v1",
            "implementation": "sgm",
            "title": self.file.removesuffix(".safetensors"),
            "description": f"{self.num_steps}-step student, distilled with onestill without training images",
            "resolution": self.programs.size,
            "prediction_type": "v" if is_v else self.student.spec.prediction_type,
            "usage_hint": self.programs.sampler,
        }
        return {f"modelspec.{name}": value for name, value in said.items()}


def _save_configuration(part: Any, folder: Path) -> None:
    """Write what a component of a pipeline is, but for its weights: a tokenizer whole."""
    save = getattr(part, "save_config", None) or getattr(part, "config", part).save_pretrained
    save(folder)
