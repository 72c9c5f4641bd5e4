"""What answers a page: requests become pictures, by a student or by the teacher beside it, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onestill.core.devices import seconds_of
from onestill.core.errors import NOT_GIVEN, SettingError, SettingErrors, as_arguments
from onestill.core.memory import enough_memory
from onestill.core.tensors import noise
from onestill.evaluation.report import package_versions
from onestill.pages.config import Asked
from onestill.sampling.explore import slerp
from onestill.sampling.generate import Rows
from onestill.sampling.png import png_of
from onestill.sampling.samplers.base import Sampler
from onestill.sampling.samplers.network import StudentSampler
from onestill.students.settings import FEW_STEPS

SOFTWARE = "Software"
"""The PNG standard's own name of the text that says what has made a picture."""
TeacherAt = Callable[[float | None], Sampler]
"""The teacher's sampler at a guidance scale; at that of the student if None."""


@dataclass(frozen=True)
class Played:
    """A student that is played with, and what is known of it.

    Attributes:
        sampler: Its one step, or its few.
        name: What it is called on the page: no path of the machine.
        device: Where it draws.
        guidance_scale: w that is distilled into it, or that it begins at; None if there is none, or none is known.
        prompt: A prompt that the page begins with.
        seed: The first of its seeds.
        teacher: The teacher beside it; None if there is none.
        teacher_name: What that is called.
        teacher_scale: w of the teacher where a request names none; None if there is none, or none is known.
    """

    sampler: Sampler
    name: str
    device: torch.device
    guidance_scale: float | None = None
    prompt: str = ""
    seed: int = 0
    teacher: TeacherAt | None = None
    teacher_name: str = ""
    teacher_scale: float | None = None

    @property
    def steps(self) -> tuple[int, int]:
        """The fewest and the most steps that it takes."""
        own = self.sampler.num_steps
        return (1, FEW_STEPS) if isinstance(self.sampler, StudentSampler) and self.sampler.is_map else (own, own)

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The scales that it takes; None if one is distilled in."""
        return self.sampler.student.guidance_range if isinstance(self.sampler, StudentSampler) else None

    @property
    def times(self) -> tuple[float, float] | None:
        """The cleanest target time and the noisiest, t_min and t_max; None if one is baked in."""
        if not isinstance(self.sampler, StudentSampler):
            return None
        return self.sampler.t_min, self.sampler.student.spec.t_max

    @property
    def glides(self) -> bool:
        """Whether it draws what lies between two seeds: not where an earlier stage decides what is seen."""
        return self.sampler.first_stage is None


@dataclass(frozen=True)
class Picture:
    """A picture: its PNG, with the settings inside, and its seed, the place between two after the point."""

    png: bytes
    seed: float


@dataclass(frozen=True)
class Drawn:
    """The answer to a request: pictures, the milliseconds that all of them took, the steps, and lines about the prompt."""

    pictures: tuple[Picture, ...]
    milliseconds: float
    num_steps: int
    warnings: tuple[str, ...] = ()


def draw(played: Played, asked: Asked) -> Drawn:
    """Return what a request asks for; SettingError if the student, or the teacher, cannot draw it."""
    sampler = _sampler(played, asked)
    rows = _rows(sampler, asked)
    seeds = list(range(asked.seed, asked.seed + asked.num_images))
    start: list[int] | Tensor = seeds
    if asked.between:
        if not played.glides:
            raise SettingError("between", asked.between, "there is nothing between two seeds of an earlier stage")
        ends = noise([*seeds, seeds[-1] + 1], sampler.sample_shape)
        u = torch.tensor([asked.between])
        start = torch.cat([slerp(ends[i], ends[i + 1], u) for i in range(len(seeds))])
    found: list[Tensor] = []
    many = f"{asked.num_images} picture{'s' if asked.num_images > 1 else ''} at once"
    with enough_memory(many, "ask for fewer" if asked.num_images > 1 else "end what else takes it"):
        seconds = seconds_of(lambda: found.append(sampler.images(start, rows)), played.device)
    said = [dict(each) for each in _said(played, asked, sampler, rows)]
    pictures = tuple(
        Picture(png_of(image, each), seed + asked.between)
        for image, each, seed in zip(found[0], said, seeds, strict=True)
    )
    prompts = () if asked.prompt is None else (asked.prompt,)
    warnings = tuple(as_arguments(line).removeprefix("warning: ") for line in sampler.warnings(prompts))
    return Drawn(pictures, 1e3 * seconds, sampler.num_steps, warnings)


def _sampler(played: Played, asked: Asked) -> Sampler:
    """Return what draws a request, at the scale, the time and the number of steps that it says."""
    w = asked.guidance_scale
    if not asked.by_teacher:
        times = played.times
        is_finished = asked.target_time == 0 or (times is not None and asked.target_time < times[0])
        t = None if is_finished else asked.target_time  # which means t_min, the cleanest that is trained
        num = asked.num_inference_steps
        if w is t is num is None:
            return played.sampler
        return played.sampler.at(guidance_scale=w, target_time=t, num_inference_steps=num)
    if played.teacher is None:
        raise SettingError("by_teacher", True, "there is no teacher beside this student")
    for name, value in (("num_inference_steps", asked.num_inference_steps), ("target_time", asked.target_time or None)):
        if value is not None:
            raise SettingError(name, value, "is the student's; the teacher has its own steps to the finished image")
    if w is not None and played.guidance_range is None:
        why = "one scale is distilled into this student, and the teacher beside it was opened at one"
        raise SettingError("guidance_scale", w, why)
    return played.teacher(w)


def _rows(sampler: Sampler, asked: Asked) -> Rows:
    labels = () if asked.class_label is None else (asked.class_label,)
    prompts = () if asked.prompt is None else (asked.prompt,)
    if sampler.takes_text and not prompts:
        raise SettingError("prompt", NOT_GIVEN, f"{sampler.name} takes text", "say what to draw")
    try:
        return sampler.conditions(asked.num_images, labels, prompts, seed=asked.seed)
    except SettingError as error:
        one = error.settings[0].removesuffix("s")  # as a request has one label, or one prompt
        raise error.about(one, getattr(asked, one)) from None


def _said(played: Played, asked: Asked, sampler: Sampler, rows: Rows) -> Iterator[dict[str, object]]:
    """Yield the settings that each picture is drawn by, as they stand inside it."""
    usual = played.teacher_scale if asked.by_teacher else played.guidance_scale
    w = usual if asked.guidance_scale is None else asked.guidance_scale
    by = f"{played.teacher_name} (the teacher)" if asked.by_teacher else played.name
    for i in range(asked.num_images):
        said: dict[str, object] = {"student": played.name, "drawn_by": by}
        said |= {"prompt": rows["prompt"][i]} if "prompt" in rows else {}
        said |= {"class_label": int(rows["class_labels"][i])} if "class_labels" in rows else {}
        said |= {"seed": asked.seed + i} | ({"between": asked.between} if asked.between else {})
        said[SOFTWARE] = f"onestill {_version()}"
        said |= {"num_inference_steps": sampler.num_steps} | ({} if w is None else {"guidance_scale": w})
        yield said | ({} if asked.by_teacher else {"target_time": asked.target_time})


@functools.cache
def _version() -> str:
    return package_versions(["onestill"])["onestill"]


def messages(error: SettingError | SettingErrors) -> str:
    """Return what is wrong with a request, as people say it: without the names of settings that they did not type."""
    errors = error.errors if isinstance(error, SettingErrors) else (error,)
    return "; ".join(_message(each) for each in errors)


def _message(error: SettingError) -> str:
    if not error.why:  # of a name that is unknown
        return str(error)
    words = " and ".join(name.replace("_", " ") for name in error.settings)
    todo = f"; {error.todo}" if error.todo else ""
    return as_arguments(f"{words}: {error.why}{todo}")
