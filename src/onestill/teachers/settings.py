"""The settings that say which teacher is distilled, and how it is guided, thresholded and called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from onestill.core.errors import SettingError, named
from onestill.core.settings import MOST_GUIDANCE, MOST_LABELS, Label, Settings, setting

TEACHER = "Teacher"
MOST_PIXELS = 8192
VARIANT = r"^[A-Za-z0-9_-]{1,64}$"
STORED = ("variant", "original_config")
"""Settings that say how a teacher's weights are stored."""
CALL_ARGUMENTS = ("height", "width", "num_frames", "audio_end_in_s", "max_sequence_length")
"""Settings that are arguments of every call of the teacher's pipeline; its own defaults where they are not given."""


class StoredSettings(Settings):
    """How the weights of a teacher lie where it is."""

    variant: str | None = setting(None, TEACHER, "Weights' variant, such as fp16.", may_change=True, pattern=VARIANT)
    original_config: str | None = setting(
        None,
        TEACHER,
        "For a teacher in one .safetensors file: folder or hub id of a pipeline of its architecture, or the YAML of its "
        "training code.",
        may_change=True,
        path=True,
    )


class CallSettings(StoredSettings):
    """How a teacher is stored, and arguments of every call of its pipeline."""

    height: int | None = setting(
        None, TEACHER, "Height of the pictures in pixels; the pipeline's if not given.", ge=1, le=MOST_PIXELS
    )
    width: int | None = setting(
        None, TEACHER, f"Width of the pictures in pixels; given with {named('height')}.", ge=1, le=MOST_PIXELS
    )
    num_frames: int | None = setting(None, TEACHER, "Frames of a video; the pipeline's if not given.", ge=1, le=1000)
    audio_end_in_s: float | None = setting(
        None, TEACHER, "End of a sound in seconds; the pipeline's if not given.", gt=0, le=600
    )
    max_sequence_length: int | None = setting(
        None,
        TEACHER,
        "Tokens of a prompt that a T5 or language-model encoder takes; the pipeline's if not given.",
        ge=1,
        le=8192,
    )

    @model_validator(mode="after")
    def _sizes_go_together(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise SettingError(("height", "width"), why="are given together or not at all")
        return self

    @property
    def call_arguments(self) -> dict[str, Any]:
        """The arguments of every call of the teacher's pipeline that are given."""
        return {name: value for name in CALL_ARGUMENTS if (value := getattr(self, name)) is not None}


class IntervalSettings(Settings):
    """At which levels a teacher is guided."""

    guidance_interval_min: float | None = setting(
        None, TEACHER, "Guide at levels t (0 clean, 1 noise) above this only; outside, w = 1 ...", ge=0, lt=1
    )
    guidance_interval_max: float | None = setting(None, TEACHER, "... and up to this.", gt=0, le=1)

    @model_validator(mode="after")
    def _interval_holds_levels(self) -> Self:
        if (interval := self.guidance_interval) is not None and interval[0] >= interval[1]:
            low, high = interval
            raise SettingError(
                "guidance_interval_min", low, f"must be below {named('guidance_interval_max')}, {high:g}"
            )
        return self

    @property
    def guidance_interval(self) -> tuple[float, float] | None:
        """(low, high): guided where low < t <= high; None if nothing is said."""
        low, high = self.guidance_interval_min, self.guidance_interval_max
        return None if low is high is None else (low or 0.0, 1.0 if high is None else high)

    def check_interval(self, *, acts: bool) -> None:
        """Raise SettingError if an interval is given where nothing is guided."""
        names = [name for name in IntervalSettings.model_fields if getattr(self, name) is not None]
        if names and not acts:
            given, todo = [getattr(self, name) for name in names], f"give a {named('guidance_scale')} other than 1"
            raise SettingError(names, given, "w = 1 is no guidance at any level", todo)


class TeacherSettings(IntervalSettings, CallSettings):
    """Which teacher, from where, guided and thresholded how."""

    teacher: str = setting(
        ...,
        TEACHER,
        "Folder of a diffusers pipeline or one .safetensors of it, hub id, or embedded teacher (digits, glyphs).",
        may_change=True,  # its weights are compared themselves
        path=True,
    )
    revision: str | None = setting(None, TEACHER, "Branch, tag or commit of the hub id.", may_change=True, min_length=1)
    cache_dir: Path | None = setting(
        None, TEACHER, "Where downloads of a hub id go, and what a single file is made into.", may_change=True
    )
    local_files_only: bool = setting(False, TEACHER, "Never use the network.", may_change=True)
    null_class: int | None = setting(
        None, TEACHER, "Label that means 'no class'; needed for guidance.", ge=0, le=MOST_LABELS
    )
    t_max: float | None = setting(None, TEACHER, "Start level; chosen from the teacher if not given.", gt=0, le=1)
    guidance_scale: float = setting(
        1.0,
        TEACHER,
        "w in u + w (c - u), distilled into the student; 1 is none. Flux: what its network is told.",
        ge=0,
        le=MOST_GUIDANCE,
    )
    guidance_scale_min: float | None = setting(
        None, TEACHER, "Draw w per image from here ... and give it to the student.", ge=0, le=MOST_GUIDANCE
    )
    guidance_scale_max: float | None = setting(None, TEACHER, "... up to here.", ge=0, le=MOST_GUIDANCE)
    class_labels: tuple[Label, ...] = setting((), TEACHER, "Labels to distil; all if not given.")
    thresholding: Literal["teacher", "none", "static", "dynamic"] = setting(
        "teacher", TEACHER, "Thresholding of the guided prediction; 'teacher' does what its scheduler does."
    )
    threshold_limit: float = setting(1.0, TEACHER, "Largest magnitude, for static and dynamic.", gt=0, le=1000)
    threshold_ratio: float = setting(0.995, TEACHER, "Quantile, for dynamic.", gt=0, le=1)
    base_student: Path | None = setting(
        None,
        TEACHER,
        "Run or exported pipeline of the earlier stage's student, which draws what a super-resolution teacher enlarges.",
        may_change=True,  # its weights are compared themselves
    )
    noise_level: int | None = setting(
        None,
        TEACHER,
        "Noise mixed into those pictures, of 1000; what the pipeline does (250) if not given.",
        ge=0,
        le=1000,
    )

    @model_validator(mode="after")
    def _guidance_is_fixed_or_drawn(self) -> Self:
        low, high = self.guidance_scale_min, self.guidance_scale_max
        if (low is None) != (high is None):
            raise SettingError(("guidance_scale_min", "guidance_scale_max"), why="are given together or not at all")
        if low is None or high is None:
            return self
        if low >= high:
            raise SettingError("guidance_scale_min", low, f"must be below {named('guidance_scale_max')}, {high:g}")
        if "guidance_scale" in self.model_fields_set and self.guidance_scale != 1:
            drawn = f"{named('guidance_scale_min')} and {named('guidance_scale_max')} draw it"
            raise SettingError("guidance_scale", self.guidance_scale, f"fixes w, and {drawn}", "give one or the other")
        return self

    @classmethod
    def overruled(cls, values: Mapping[str, Any], read: Mapping[str, Any]) -> set[str]:
        """Guidance of one kind excludes the other's."""
        fixed, drawn = {"guidance_scale"}, {"guidance_scale_min", "guidance_scale_max"}
        given = {name for name, value in values.items() if value is not None}
        out = (fixed if drawn & given else set()) | (drawn if fixed & given else set())
        return super().overruled(values, read) | out

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Range that w is drawn from, or None if it is fixed."""
        low, high = self.guidance_scale_min, self.guidance_scale_max
        return None if low is None or high is None else (low, high)
