"""The settings of sampling: what generates, what it draws, and the ways of exploring it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import MOST_GUIDANCE, MOST_LABELS, MOST_ROWS, MOST_WIDTH, Label, Settings, setting
from onestill.diffusion.names import SolverName
from onestill.students.settings import check_steps
from onestill.teachers.settings import STORED, CallSettings, IntervalSettings

GENERATOR, IMAGES = "What generates", "Images"
EXPLORING = "Exploring (one of them; the same noise or condition all over)"
WAYS = ("interpolate", "fixed_noise", "guidance_scales", "target_times")
"""Settings that say how a sampler is explored."""
LONGEST_WAY = 10_000
"""The most images from one noise or prompt to another."""


class SamplerSettings(IntervalSettings, CallSettings):
    """What generates images: a student in one step, or a teacher in many."""

    student: str | None = setting(
        None, GENERATOR, "Folder of a run, a checkpoint-N folder, or an exported pipeline: one step or few.", path=True
    )
    teacher: str | None = setting(None, GENERATOR, "A teacher instead: many steps.", path=True)
    guidance_scale: float | None = setting(
        None, GENERATOR, "w, for teachers and students that take it.", ge=0, le=MOST_GUIDANCE
    )
    target_time: float = setting(0.0, GENERATOR, "The student's target time; 0 is the finished image.", ge=0, le=1)
    ema_width: float | None = setting(
        None,
        GENERATOR,
        "Relative width of the average of a run's weights, 0 for the weights themselves; that of the run if not given.",
        ge=0,
        le=MOST_WIDTH,
    )
    num_inference_steps: int | None = setting(
        None,
        GENERATOR,
        "Steps: 50 of a teacher if not given; of a student 1 to 8, 1 if not given, or those it was exported for.",
        ge=1,
        le=10_000,
    )
    solver: SolverName | None = setting(None, GENERATOR, "Solver of a teacher; ddim if not given.")
    null_class: int | None = setting(None, GENERATOR, "A teacher's label for 'no class'.", ge=0, le=MOST_LABELS)
    negative_prompt: str | None = setting(None, GENERATOR, "In place of 'no prompt' in a text teacher's guidance.")
    base_student: Path | None = setting(
        None, GENERATOR, "For super-resolution: who draws what is enlarged; that of the run if not given."
    )
    noise_level: int | None = setting(
        None, GENERATOR, "Noise in what a teacher enlarges; what its pipeline does (250) if not given.", ge=0, le=1000
    )
    device: str = setting("auto", GENERATOR, "auto, cpu, cuda, cuda:N or mps.")
    local_files_only: bool = setting(False, GENERATOR, "Never use the network.")

    @model_validator(mode="after")
    def _student_or_teacher(self) -> Self:
        if (self.student is None) == (self.teacher is None):
            why = "give one of them: a student (one step) or a teacher (many steps)"
            raise SettingError(("student", "teacher"), why=why)
        if self.teacher is not None:
            if self.target_time != 0:
                why, todo = "is the student's", "a teacher goes to the finished image"
                raise SettingError("target_time", self.target_time, why, todo)
            if self.ema_width is not None:
                raise SettingError("ema_width", self.ema_width, "is the student's", "a teacher has one set of weights")
            return self
        if self.num_inference_steps is not None:
            check_steps(self.num_inference_steps, self.target_time, is_map=True)
        of_teachers = ("negative_prompt", "solver", "null_class", "noise_level", *IntervalSettings.model_fields)
        for name in (*of_teachers, *STORED, *self.call_arguments):
            if (value := getattr(self, name)) is not None:
                raise SettingError(name, value, "is for a teacher; a student has it distilled in", "leave it out")
        return self


class DrawSettings(Settings):
    """Which images are drawn: their seeds, and their labels or prompts to go round."""

    num_images: int | None = setting(
        None, IMAGES, "How many; 16 if not given, fewer when exploring.", ge=1, le=1_000_000
    )
    seed: int = setting(0, IMAGES, "Seed of the first image; image i has seed + i.", ge=0, lt=2**63)
    class_labels: tuple[Label, ...] = setting((), IMAGES, "Label to draw; repeat for more. All if not given.")
    prompts: tuple[str, ...] = setting((), IMAGES, "What to draw, for text teachers; repeat for more.")
    batch_size: int = setting(64, IMAGES, "Images in one network call.", ge=1, le=MOST_ROWS)

    @model_validator(mode="after")
    def _seeds_are_numbers(self) -> Self:
        if self.seed + (self.num_images or 1) >= 2**63:
            raise SettingError("seed", self.seed, "must be below 2^63 minus the number of images")
        return self


class SampleConfig(SamplerSettings, DrawSettings):
    """Everything that decides a sampling: flags, YAML and Python arguments are this model."""

    prompt_file: Path | None = setting(None, IMAGES, "Prompts instead: a .txt, .jsonl or .csv in UTF-8.")
    prompt_field: str | None = setting(None, IMAGES, "Field of the prompt in a .jsonl or .csv; 'prompt' if not given.")
    output: Path | None = setting(
        None,
        IMAGES,
        "A .png (grid), a .safetensors, or a folder (one PNG per seed); a .gif of what is explored. samples.png if not given.",
    )
    overwrite: bool = setting(False, IMAGES, "Replace what is there.")
    interpolate: int | None = setting(
        None,
        EXPLORING,
        f"So many images from {named('seed')} to {named('to_seed')}, or from one prompt to another.",
        ge=2,
        le=LONGEST_WAY,
    )
    to_seed: int | None = setting(None, EXPLORING, f"Where {named('interpolate')} goes to.", ge=0, lt=2**63 - 1)
    fixed_noise: bool = setting(False, EXPLORING, f"One noise ({named('seed')}) for every prompt or label.")
    guidance_scales: tuple[Annotated[float, Field(ge=0, le=MOST_GUIDANCE)], ...] = setting(
        (), EXPLORING, "A row for each w, with commas: 1,2,4,8.", commas=True
    )
    target_times: tuple[Annotated[float, Field(ge=0, le=1)], ...] = setting(
        (), EXPLORING, "A student's prediction at each time, with commas: 1,0.5,0.", commas=True
    )

    @property
    def exploring(self) -> str | None:
        """The setting that says how the sampler is explored; None for plain samples."""
        return next((name for name in WAYS if getattr(self, name)), None)

    @model_validator(mode="after")
    def _one_way_of_exploring(self) -> Self:
        ways = [name for name in WAYS if getattr(self, name)]
        if len(ways) > 1:
            raise SettingError(ways, why="give one of them, each is a picture of its own")
        if self.to_seed is not None and self.interpolate is None:
            why = f"is where {named('interpolate')} goes to"
            raise SettingError("to_seed", self.to_seed, why, "say with that how many images")
        if self.interpolate is not None and self.num_images is not None:
            why = f"{named('interpolate')} {self.interpolate} says how many already"
            raise SettingError("num_images", self.num_images, why)
        for name, one in (("guidance_scales", self.guidance_scale), ("target_times", self.target_time or None)):
            if values := getattr(self, name):
                if one is not None:
                    raise SettingError((name, name.removesuffix("s")), (values, one), "give one or the other")
                check_values(name, values)
        return self


def check_values(name: str, values: Sequence[float]) -> None:
    """Raise SettingError if the values of a setting that takes a list are none, or two of them look the same."""
    if not values or len({f"{value:g}" for value in values}) != len(values):
        raise SettingError(name, tuple(values), "must be different numbers")
    if name == "guidance_scales" and not all(0 <= value < float("inf") for value in values):
        raise SettingError(name, tuple(values), "must be numbers from 0 up")


def check_interpolation(num_images: int, drawn: DrawSettings, to_seed: int | None, prompts: Sequence[str]) -> None:
    """Raise SettingError if an interpolation has no two ends, or more."""
    if num_images < 2:
        raise SettingError("interpolate", num_images, "must be at least 2")
    if len(drawn.class_labels) > 1:
        why = f"with {named('interpolate')} there is nothing between two labels that the network knows"
        todo = f"give one label, and go from {named('seed')} to {named('to_seed')}"
        raise SettingError("class_labels", list(drawn.class_labels), why, todo)
    if to_seed is None:
        if len(prompts) != 2:
            one = f"one of {named('prompts')} and " if len(prompts) else ""
            todo = f"give two {named('prompts')} (got {len(prompts)}), or {one}{named('to_seed')}"
            raise SettingError("interpolate", num_images, "needs two ends", todo)
    elif len(prompts) > 1:
        todo = f"give one of {named('prompts')}, not {len(prompts)}"
        raise SettingError("to_seed", to_seed, "keeps the prompt", todo)
    elif to_seed == drawn.seed:
        raise SettingError("to_seed", to_seed, f"is {named('seed')}: there is nothing between a noise and itself")
    elif not 0 <= to_seed < 2**63 - 1:
        raise SettingError("to_seed", to_seed, "must be between 0 and 2^63 minus the number of images")
