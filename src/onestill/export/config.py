"""The settings of an export: which student, baked in at which time and guidance scale, for how many steps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import MOST_GUIDANCE, MOST_WIDTH, Settings, setting
from onestill.export.settings import Options
from onestill.students.settings import FEW_STEPS, HubSettings

EXPORT = "Export"
DIFFUSERS = "diffusers"
FormatName = Literal["diffusers", "single_file", "lora", "torch", "onnx", "browser"]
"""What a student is written as; each but the first, which is the teacher's own choice, is one file of this room."""
GRAPHS: Final[tuple[FormatName, ...]] = ("torch", "onnx", "browser")
"""Formats whose files hold all steps: a call of them says no number."""


class ExportSettings(Settings):
    """Which student, written as what, and where."""

    student: Path = setting(..., EXPORT, "Folder of a run, or one of its checkpoint-N folders.")
    output: Path = setting(..., EXPORT, "Folder to write.")
    format: tuple[FormatName, ...] = setting(
        (DIFFUSERS,),
        EXPORT,
        "What to write, with commas: diffusers, single_file, lora, torch, onnx, browser; of several each has a folder of its "
        "name in the output.",
        commas=True,
    )
    guidance_scale: float | None = setting(
        None,
        EXPORT,
        "w to bake in, for students that take it; the middle of their range if not given.",
        ge=0,
        le=MOST_GUIDANCE,
    )
    target_time: float | None = setting(
        None, EXPORT, "Target time to bake in; the run's t_min if not given.", ge=0, le=1
    )
    ema_width: float | None = setting(
        None,
        EXPORT,
        "Relative width of the average of the weights, 0 for the weights themselves; that of the run if not given.",
        ge=0,
        le=MOST_WIDTH,
    )
    num_inference_steps: int = setting(
        1, EXPORT, "Steps that the folder is called with; more than one of a run that trains them.", ge=1, le=FEW_STEPS
    )
    half: bool = setting(
        False, EXPORT, "Store the weights of onnx and browser in half precision: files of half the size."
    )
    onnxruntime_web: Path | None = setting(
        None, EXPORT, "For browser: folder of the unpacked npm package onnxruntime-web, whose files are copied."
    )
    device: str = setting("auto", EXPORT, "auto, cpu, cuda, cuda:N or mps.")
    overwrite: bool = setting(False, EXPORT, "Replace what was exported there before.")

    @property
    def places(self) -> dict[str, Path]:
        """The folder of each format: the output itself of one, folders in it of several."""
        alone = len(self.format) == 1
        return {name: self.output if alone else self.output / name for name in self.format}

    @property
    def options(self) -> Options:
        """What some formats are told besides."""
        return Options(self.half, self.onnxruntime_web)


class ExportConfig(HubSettings, ExportSettings):
    """Everything that decides what is exported of a run."""

    @model_validator(mode="after")
    def _has_options_that_act(self) -> Self:
        self.options.refuse_unused(self.format)
        return self

    @model_validator(mode="after")
    def _has_different_formats(self) -> Self:
        if not self.format or max(Counter(self.format).values()) > 1:
            raise SettingError("format", self.format, "must be different formats")
        if self.push_to_hub and len(self.format) > 1:
            why, todo = "uploads one folder with its card", f"export one {named('format')} after the other"
            raise SettingError("push_to_hub", True, why, todo)
        return self
