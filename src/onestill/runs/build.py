"""What a run is made of, with every setting checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onestill.data.cascade import FirstStage, find_first_stage, with_first_stage
from onestill.data.cascade import messages as cascade_messages
from onestill.data.conditions import Conditions, LabelConditions, check_labels
from onestill.data.prompt_cache import default_cache_dir
from onestill.data.prompt_pool import PromptPlan, check_longer, plan_prompts, refuse_prompts
from onestill.data.prompts import PromptFile
from onestill.runs.checks import (
    check_device,
    check_output_dir,
    check_start,
    check_times,
    check_tracker,
    check_writable,
    find_resume,
)
from onestill.runs.resume import made_longer
from onestill.students.lora import Lora
from onestill.students.mark import refuse_student
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import guided
from onestill.teachers.load import EMBEDDED, load_teacher
from onestill.teachers.settings import CALL_ARGUMENTS
from onestill.teachers.teacher_spec import Threshold
from onestill.training.checkpoint import Checkpoint
from onestill.training.config import DistillConfig, make_config

PYTHON_OBJECT = "python object"


@dataclass(frozen=True)
class Prepared:
    """A run whose every setting has been checked, before anything is written."""

    config: DistillConfig
    base: Teacher
    teacher: Teacher
    conditions: Conditions
    student: Student
    fingerprint: str
    resume: tuple[Path, Checkpoint] | None
    messages: tuple[str, ...]
    prompts: PromptPlan | None = None
    base_student: FirstStage | None = None


def configure(
    teacher: str | Path | Teacher, given: Mapping[str, Any], config_file: Path | None = None
) -> DistillConfig:
    """Return the configuration of a run of a teacher, which is named or given.

    Args:
        teacher: A pipeline folder, a hub id, an embedded teacher's name, or a teacher object.
        given: Settings, which win over the file's.
        config_file: YAML file of settings.

    Raises:
        ValueError: If a setting is unknown or unusable, or does not fit a teacher object.
    """
    if isinstance(teacher, Teacher):
        return make_config({**given, **_facts_of(teacher, given)}, config_file)
    return make_config({**given, "teacher": _absolute(str(teacher))}, config_file)


def _facts_of(teacher: Teacher, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the run's configuration must say of a teacher object, so that it can be opened again.

    Raises:
        ValueError: If the settings name another null class than the object has, or other arguments of its call.
    """
    spec = teacher.spec
    if given.get("null_class") not in (None, spec.null_class):
        raise ValueError(
            f"--null_class {given['null_class']} was given with a teacher object whose null class is {spec.null_class}; "
            "name it where the object is made: load_teacher or module_teacher"
        )
    asked = teacher.arguments
    for name in CALL_ARGUMENTS:
        if given.get(name) not in (None, asked.get(name)):
            raise ValueError(
                f"--{name} {given[name]} was given with a teacher object; name it where the object is made: "
                "load_teacher(..., arguments={...})"
            )
    if others := sorted(set(asked) - set(CALL_ARGUMENTS)):
        raise ValueError(
            f"the teacher object was loaded with the argument {others[0]} = {asked[others[0]]}, which a run cannot record, so "
            f"that it could not be opened again; it records {', '.join(CALL_ARGUMENTS)}"
        )
    t_max = spec.t_max if given.get("t_max") is None else given["t_max"]
    facts = {"teacher": spec.source or PYTHON_OBJECT, "null_class": spec.null_class, "t_max": t_max}
    return {**facts, **{name: asked.get(name) for name in CALL_ARGUMENTS}}


def _from_anywhere(config: DistillConfig) -> DistillConfig:
    """Return the configuration with absolute paths, so that its run opens from anywhere; names and hub ids stay."""
    found: dict[str, Any] = {
        name: path.expanduser().absolute()
        for name in ("prompt_file", "prompt_cache_dir", "cache_dir")
        if (path := getattr(config, name)) is not None
    }
    return config.model_copy(update={**found, "teacher": _absolute(config.teacher)})


def _absolute(teacher: str) -> str:
    """Return a folder's absolute path; names and hub ids as they are."""
    folder = Path(teacher).expanduser()
    return str(folder.resolve()) if teacher not in EMBEDDED and folder.is_dir() else teacher


def configured_teacher(config: DistillConfig, *, device: str = "cpu", local_files_only: bool = False) -> Teacher:
    """Return the teacher that a configuration names, loaded as it says; ValueError if it cannot be."""
    return load_teacher(
        config.teacher,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        local_files_only=config.local_files_only or local_files_only,
        null_class=config.null_class,
        t_max=config.t_max,
        arguments=config.call_arguments,
        device=device,
    )


def prepare(config: DistillConfig, teacher: Teacher | None = None, network: nn.Module | None = None) -> Prepared:
    """Check every setting against the machine, the teacher and the output folder; write nothing.

    Raises:
        ValueError: If anything does not fit, saying what and which flag.
    """
    config = with_embedded_prompts(config)
    check_device(config.device)
    check_tracker(config.report_to)
    check_output_dir(config.output_dir, resuming=config.resume_from_checkpoint is not None)
    # Before a teacher is loaded, which may take minutes.
    prompt_file = open_prompts(config)
    if config.base_student is not None:
        find_first_stage(config.base_student)
    # Its null condition and its pictures may be replaced here, and the caller's stay.
    base = teacher if teacher is not None else configured_teacher(config)
    if teacher is not None and config.t_max not in (None, teacher.spec.t_max):
        base = base.with_t_max(config.t_max)
    refuse_student(base)
    base, base_student = with_first_stage(base, config.base_student, config.noise_level)
    if base_student is not None:
        config = _with_picture(config, base)
    check_times(config, base)
    check_start(base)
    config = with_usual_guidance(config, base)
    acts = config.guidance_scale != 1 or config.guidance_range is not None
    base = base.with_negative_prompt(config.negative_prompt, acts=acts)
    fitted = fit_teacher(base, config)
    labels = check_labels(config.class_labels, base.spec)
    prompts = choose_prompts(config, base, prompt_file, base_student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the new layers start from random numbers too
        student = make_student(base, config, network)
    if config.gradient_checkpointing and not hasattr(student.network, "enable_gradient_checkpointing"):
        raise ValueError(f"--gradient_checkpointing: {type(student.network).__name__} has no support for it")
    fingerprint = base.fingerprint()
    resume, messages = find_resume(config, fingerprint, prompts.fingerprint if prompts else "")
    if resume is not None:
        begun = resume[1].values["config"]
        config = made_longer(config, begun)
        if prompts is not None:
            check_longer(prompts, config, begun["max_train_steps"], _num_processes())
    if config.lora_rank is not None and not base.takes_lora_files:
        messages += (
            "--lora_rank: the teacher's pipeline takes no LoRA files, so the merged student alone is exported",
        )
    config = _from_anywhere(config)
    if prompts is None:
        labelled = LabelConditions(labels, config.guidance_range)
        return Prepared(config, base, fitted, labelled, student, fingerprint, resume, messages)
    said = (*messages, *prompts.messages, *(() if base_student is None else cascade_messages(base_student, base)))
    return Prepared(config, base, fitted, prompts.conditions, student, fingerprint, resume, said, prompts, base_student)


def open_prompts(config: DistillConfig) -> PromptFile | None:
    """Return the prompts in the file that a configuration names, all read once; None if it names none."""
    if config.prompt_file is None:
        return None
    return PromptFile(config.prompt_file.expanduser(), config.prompt_field)


def with_embedded_prompts(config: DistillConfig) -> DistillConfig:
    """Return the configuration with an embedded text teacher's own prompts, where none are named."""
    embedded = EMBEDDED.get(config.teacher)
    if embedded is None or embedded.prompts is None or config.prompt_file is not None:
        return config
    return config.model_copy(update={"prompt_file": embedded.prompts})


def with_usual_guidance(config: DistillConfig, teacher: Teacher) -> DistillConfig:
    """Return the configuration with the scale that the teacher's network is told, where it is told one and none is named."""
    if (
        teacher.guidance_input is None
        or config.guidance_range is not None
        or "guidance_scale" in config.model_fields_set
    ):
        return config
    return config.model_copy(update={"guidance_scale": teacher.usual_guidance})


def _with_picture(config: DistillConfig, teacher: Teacher) -> DistillConfig:
    """Return the configuration with the noise level of the pictures, and their student's path from anywhere."""
    assert teacher.image_condition is not None and config.base_student is not None
    where = config.base_student.expanduser().resolve()
    return config.model_copy(update={"base_student": where, "noise_level": teacher.image_condition.level})


def choose_prompts(
    config: DistillConfig,
    teacher: Teacher,
    prompt_file: PromptFile | None,
    base_student: FirstStage | None = None,
) -> PromptPlan | None:
    """Return the prompts of a run, or None for a teacher that takes no text, whose run must not name any."""
    if not teacher.spec.text:
        refuse_prompts(config)
        return None
    if config.prompt_cache_dir is not None and config.prompt_cache_dir.is_file():
        raise ValueError(f"--prompt_cache_dir {config.prompt_cache_dir} is a file")
    check_writable((config.prompt_cache_dir or default_cache_dir()).expanduser(), "prompt_cache_dir")
    if prompt_file is None:
        raise ValueError("this teacher takes prompts: give a file of them with --prompt_file (.txt, .jsonl or .csv)")
    return plan_prompts(config, teacher, prompt_file, _num_processes(), base_student)


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def make_student(base: Teacher, config: DistillConfig, network: nn.Module | None = None) -> Student:
    """Return the untrained student that the configuration says."""
    lora = None
    if config.lora_rank is not None:
        lora = Lora(config.lora_rank, config.lora_alpha, config.lora_target_modules)
    return Student(base, guidance_range=config.guidance_range, network=network, lora=lora)


def chosen_threshold(config: DistillConfig) -> Threshold | None:
    """Return what a run does to the teacher's x_0; None for what the teacher's own scheduler does."""
    if config.thresholding == "teacher":
        return None
    return Threshold(config.thresholding, config.threshold_limit, config.threshold_ratio)


def fit_teacher(base: Teacher, config: DistillConfig, guidance_scale: float | None = None) -> Teacher:
    """Return the teacher guided and thresholded as the configuration says, or at another fixed guidance scale."""
    drawn = guidance_scale is None and config.guidance_range is not None
    scale = config.guidance_scale if guidance_scale is None else guidance_scale
    return guided(base, scale, drawn=drawn, threshold=chosen_threshold(config))
