"""`serve`: a page to play with a student on, on this machine."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from onestill.core.arguments import checked
from onestill.core.devices import resolve_device
from onestill.core.errors import FoundWarning, SettingError, SettingErrors, named
from onestill.core.settings import make
from onestill.data.prompts import PromptFile
from onestill.evaluation.config import EvaluateConfig
from onestill.pages.config import Asked, ServeConfig
from onestill.pages.player import Played, draw
from onestill.pages.playground import playground
from onestill.pages.server import Server, is_own, listening, serve_page
from onestill.runs.build import guided_as
from onestill.runs.evaluate import teacher_beside
from onestill.runs.folder import PIPELINE_FOLDER
from onestill.runs.load import LoadedStudent, check_folder, load_student
from onestill.runs.memory import enough_for_images
from onestill.sampling.samplers.base import Sampler
from onestill.sampling.samplers.network import StudentSampler, TeacherSampler
from onestill.students import model_card
from onestill.teachers.base import Teacher
from onestill.teachers.pipelines.folder import INDEX

MISSING = "serve needs gradio; pip install 'onestill[serve]' brings it"


@checked(ServeConfig)
def serve(
    student: str | Path,
    *,
    config_file: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> None:
    """Serve a page to play with a student on until Ctrl-C, which is a KeyboardInterrupt.

    Args:
        student: A run's folder, a checkpoint-N folder, or an exported pipeline.
        config_file: A YAML file of settings; those given here win.
        say: Called with a line when the page can be opened: its address.
        **settings: Fields of `onestill.ServeConfig`; an unknown name is refused.

    Raises:
        ValueError: If the student cannot be drawn with, the address is none of this machine, or gradio is missing;
            nothing is served then.
    """
    server = open_server(make(ServeConfig, {**settings, "student": str(student)}, config_file))
    say(server.address)
    server.run()


def open_server(config: ServeConfig) -> Server:
    """Return the server that settings describe, which listens and has drawn a first picture; all are checked before."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(MISSING)
    device = resolve_device(config.device)
    check_folder(config.student)
    place = listening(config.host, config.port)
    try:
        if not is_own(place):
            others = (
                "whoever reaches this machine over its network can draw with this student, and no password is asked"
            )
            said = f"{named('host')} {config.host}: {others}; {named('host')} 127.0.0.1 is for this machine alone"
            warnings.warn(said, FoundWarning, stacklevel=2)
        with enough_for_images(1, "opening what draws"):
            played = _played(config, device)
        return serve_page(playground(played), played, place, host=config.host, queue_size=config.queue_size)
    except BaseException:
        place.close()
        raise


def _played(config: ServeConfig, device: torch.device) -> Played:
    """Return the student with its teacher, after a first picture: what cannot be shown is refused."""
    found = _opened(config, device)
    found.sampler.name = "this student"  # its own name is a path of this machine
    w = _scale(config, found)
    sampler = found.sampler.at(guidance_scale=w) if _takes_scale(found.sampler) else found.sampler
    teacher_scale = w if config.guidance_scale is None else config.guidance_scale
    beside = _beside(config, found, device, teacher_scale)
    if config.guidance_scale is not None and beside is None and not _takes_scale(found.sampler):
        why = "one is distilled into this student, and no teacher stands beside it"
        raise SettingError("guidance_scale", config.guidance_scale, why, "leave it out")
    played = Played(sampler, _name(Path(config.student)), device, w, _prompt(config, found), config.seed)
    if beside is not None:
        teacher, at = beside
        name = _name(Path(teacher.spec.source))
        played = replace(played, teacher=at, teacher_name=name, teacher_scale=teacher_scale)
    labels, text = sampler.labels, sampler.takes_text
    asked = Asked(class_label=labels[0] if labels else None, prompt=(played.prompt or "one") if text else None)
    try:
        draw(played, asked)
    except (SettingError, SettingErrors):
        raise
    except ValueError as error:
        raise SettingError("student", config.student, f"cannot be shown on a page: {error}") from error
    return played


def _opened(config: ServeConfig, device: torch.device) -> LoadedStudent:
    """Return the student: with a run's own weights, which go to any target time, or, without its teacher, its export."""
    path = Path(config.student)
    load = functools.partial(
        load_student,
        path,
        device=device,
        local_files_only=config.local_files_only,
        base_student=config.base_student,
    )
    try:
        return load(prefers_weights=True)
    except ValueError as error:
        if (path / INDEX).is_file() or not (path / PIPELINE_FOLDER / INDEX).is_file():
            raise
        found = load()
        why = f"{error}; so its exported pipeline is what draws, with one target time and no teacher"
        warnings.warn(why, FoundWarning, stacklevel=2)
        return found


def _takes_scale(sampler: Sampler) -> bool:
    return isinstance(sampler, StudentSampler) and sampler.student.guidance_range is not None


def _scale(config: ServeConfig, found: LoadedStudent) -> float | None:
    """Return w of the student: what it begins at, or what is distilled into it; None if that is none or not known."""
    if isinstance(found.sampler, StudentSampler):
        chosen = found.sampler.student.chosen_scale(config.guidance_scale)
        return found.sampler.distilled.guidance_scale if chosen is None else chosen
    return model_card.distilled(found.pipeline).guidance_scale


def _beside(
    config: ServeConfig, found: LoadedStudent, device: torch.device, scale: float | None
) -> tuple[Teacher, Callable[[float | None], Sampler]] | None:
    """Return the teacher, and its sampler at a guidance scale; None where an exported student is alone."""
    sampler, run = found.sampler, found.config
    if config.teacher is None and not isinstance(sampler, StudentSampler):
        return None
    if config.teacher is not None:
        given = {name: getattr(config, name) for name in ("student", "teacher", "base_student", "local_files_only")}
        given |= {"guidance_scale": scale, "device": str(device)}
        teacher = teacher_beside(found, make(EvaluateConfig, given), device)
    else:
        assert isinstance(sampler, StudentSampler) and run is not None
        teacher = guided_as(sampler.student.teacher, run, scale)

    def at(w: float | None) -> Sampler:
        own = teacher if w is None or run is None else guided_as(teacher, run, w)
        made = TeacherSampler(
            own, num_steps=config.num_teacher_steps, device=device, first_stage=found.sampler.first_stage
        )
        made.name = "the teacher"
        return made

    return teacher, at


def _name(path: Path) -> str:
    """Return what a folder is called on a page: its name, and that of the run where it lies in one."""
    whole = path.resolve() if path.exists() else path
    inside = whole.name == PIPELINE_FOLDER or whole.name.startswith("checkpoint-")
    return f"{whole.parent.name}/{whole.name}" if inside and whole.parent.name else whole.name


def _prompt(config: ServeConfig, found: LoadedStudent) -> str:
    """Return what a page shows at first: the prompt that is given, or the first of the run's; "" if none is known."""
    if not found.sampler.takes_text:
        if config.prompt is not None:
            raise SettingError("prompt", config.prompt, "this student takes no text", "leave it out")
        return ""
    if config.prompt is not None or found.config is None or found.config.prompt_file is None:
        return config.prompt or ""
    try:
        return str(PromptFile(found.config.prompt_file, found.config.prompt_field)[0])
    except ValueError:
        return ""  # it has gone, which is nothing to a page
