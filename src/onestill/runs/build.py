"""What a run is made of, with every setting checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onestill.core.devices import resolve_device
from onestill.core.errors import SettingError, named
from onestill.core.files import check_writable
from onestill.core.settings import plain_value, read_yaml
from onestill.data import cascade
from onestill.data.cascade import FirstStage
from onestill.data.conditions import Conditions, LabelConditions, check_labels
from onestill.data.prompt_cache import default_cache_dir
from onestill.data.prompt_pool import PromptPool, make_prompt_pool, refuse_prompts
from onestill.data.prompts import PromptFile
from onestill.objectives.boot import Boot
from onestill.objectives.flow_map import FlowMap
from onestill.objectives.registry import objectives_of, rows_of
from onestill.runs.folder import check_output_dir
from onestill.runs.resume import find_resume, made_longer
from onestill.students.lora import Lora
from onestill.students.mark import refuse_student
from onestill.students.student import Student
from onestill.teachers.base import Teacher
from onestill.teachers.guidance import guided
from onestill.teachers.load import EMBEDDED, load_teacher
from onestill.teachers.module import own_network
from onestill.teachers.probe import doubts, look
from onestill.teachers.settings import CALL_ARGUMENTS
from onestill.teachers.teacher_spec import Threshold
from onestill.training.averages import check_widths
from onestill.training.checkpoint import Checkpoint
from onestill.training.config import LEAST_CORRECTED, DistillConfig, make_config, num_processes, usual_learning_rate
from onestill.training.trainer import Fingerprints

PYTHON_OBJECT = "python object"


@dataclass(frozen=True)
class Run:
    """A run whose every setting has been checked, before anything is written.

    Attributes:
        config: Its settings, resolved: paths from anywhere, guidance and noise level as they are used.
        teacher: The teacher, guided and thresholded.
        student: The untrained student.
        conditions: Where conditions are drawn from.
        fingerprints: Hashes of what it is made of.
        resume: The checkpoint that it goes on from, with its folder.
        messages: What should be said before it starts; may mention settings by `named`.
        prompts: Its prompts, for a text teacher.
        first_stage: The student that draws the pictures that the teacher enlarges, if it does.
        budget: The time that its length was planned for, if it was.
    """

    config: DistillConfig
    teacher: Teacher
    student: Student
    conditions: Conditions
    fingerprints: Fingerprints
    resume: tuple[Path, Checkpoint] | None = None
    messages: tuple[str, ...] = ()
    prompts: PromptPool | None = None
    first_stage: FirstStage | None = None
    budget: str | None = None


def build_run(config: DistillConfig, teacher: Teacher | None = None, network: nn.Module | None = None) -> Run:
    """Check every setting against the machine, the teacher and the output folder; write nothing.

    The teacher is loaded as the configuration says where it is no object; `network` is a module to train as the
    student, for teachers that are plain callables.
    """
    check_tracker(config.report_to)
    check_widths(config)
    check_output_dir(config.output_dir, resuming=config.resume_from_checkpoint is not None)
    config, teacher, first_stage, prompt_file = open_teacher(config, teacher)
    labels = check_labels(config.class_labels, teacher.spec)
    doubt = doubts_about(teacher, config, network)
    prompts = _prompt_pool(config, teacher, prompt_file, first_stage)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the new layers start from random numbers too
        student = make_student(teacher, config, network)
    if config.gradient_checkpointing and not hasattr(student.network, "enable_gradient_checkpointing"):
        raise SettingError("gradient_checkpointing", True, f"{type(student.network).__name__} has no support for it")
    config = with_usual_rate(config, student)
    hashes = (prompts.fingerprint, prompts.drawn_fingerprint) if prompts else ("", "")
    fingerprints = Fingerprints(teacher.fingerprint(), *hashes)
    resume, messages = find_resume(config, fingerprints)
    messages = (f"warning: {doubt}", *messages) if doubt else messages
    if resume is not None:
        begun = resume[1].values["config"]
        config = made_longer(config, begun)
        if prompts is not None:
            _check_longer(prompts, config, begun["max_train_steps"])
    if config.train_batch_size < LEAST_CORRECTED and config.recipe == "default" and config.corrector_fraction == 0:
        size = f"{named('train_batch_size')} {config.train_batch_size}"
        messages += (f"{size} leaves no rows for a corrector, so there is none; {LEAST_CORRECTED} would",)
    if unread := unread_settings(config):
        given = ", ".join(f"{named(name)} {getattr(config, name)}" for name in unread)
        messages += (
            f"{given}: of the bootstrap, which has no rows in this run; {named('anchor_fraction')} below 1 gives it some",
        )
    if config.lora_rank is not None and not teacher.takes_lora_files:
        why = "the teacher's pipeline takes no LoRA files, so the merged student alone is exported"
        messages += (f"{named('lora_rank')}: {why}",)
    conditions: Conditions = LabelConditions(labels, config.guidance_range)
    if prompts is not None:
        conditions, messages = prompts.conditions, (*messages, *prompts.messages)
    if first_stage is not None:
        messages += cascade.messages(first_stage, teacher)
    config = _from_anywhere(config)
    return Run(config, teacher, student, conditions, fingerprints, resume, messages, prompts, first_stage)


def open_teacher(
    config: DistillConfig, teacher: Teacher | None = None, *, needs_first_stage: bool = True
) -> tuple[DistillConfig, Teacher, FirstStage | None, PromptFile | None]:
    """Return the teacher of a run, loaded if it is no object, guided and thresholded, with what is known then.

    Without `needs_first_stage` a teacher that enlarges pictures may lack the student that draws them.

    Returns:
        (the settings with what the teacher decides, the teacher, the first stage or None, the prompts' file or None).
    """
    resolve_device(config.device)
    config = with_embedded_prompts(config)
    # Before a teacher is loaded, which may take minutes.
    prompt_file = None
    if config.prompt_file is not None:
        prompt_file = PromptFile(config.prompt_file.expanduser(), config.prompt_field)
    if config.base_student is not None:
        cascade.find_first_stage(config.base_student)
    if teacher is None:
        teacher = configured_teacher(config)
    elif config.t_max not in (None, teacher.spec.t_max):
        teacher = teacher.with_t_max(config.t_max)
    refuse_student(teacher)
    first_stage = None
    if needs_first_stage or config.base_student is not None or config.noise_level is not None:
        teacher, first_stage = cascade.with_first_stage(teacher, config.base_student, config.noise_level)
    if first_stage is not None:
        assert teacher.image_condition is not None and config.base_student is not None
        where = config.base_student.expanduser().resolve()
        config = config.model_copy(update={"base_student": where, "noise_level": teacher.image_condition.level})
    _check_times(config, teacher)
    teacher.check_start()
    config = _with_usual_guidance(config, teacher)
    acts = config.guidance_scale != 1 or config.guidance_range is not None
    config.check_interval(acts=acts)
    teacher = guided_as(teacher.with_negative_prompt(config.negative_prompt, acts=acts), config)
    for objective in rows_of(config, config.train_batch_size):
        objective.check(config, teacher)
    if not teacher.spec.text:
        refuse_prompts(config, config.validation_prompt)
    return config, teacher, first_stage, prompt_file


def configure(
    teacher: str | Path | Teacher, given: Mapping[str, Any], config_file: str | Path | None = None
) -> DistillConfig:
    """Return the configuration of a run of a teacher, which is named or an object; `given` wins over the file."""
    if isinstance(teacher, Teacher):
        read = read_yaml(config_file) if config_file is not None else {}
        return make_config({**given, **_facts_of(teacher, {**read, **given})}, config_file)
    if not isinstance(teacher, (str, Path)):
        todo = "wrap a network of your own with onestill.module_teacher"
        raise SettingError("teacher", why=f"a {type(teacher).__name__} is no teacher", todo=todo)
    return make_config({**given, "teacher": _absolute(str(teacher))}, config_file)


def _facts_of(teacher: Teacher, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the run's configuration must say of a teacher object, so that it can be opened again."""
    spec, arguments, own = teacher.spec, teacher.arguments, refuse_other_facts(teacher, given)
    if others := sorted(set(arguments) - set(CALL_ARGUMENTS)):
        argument = f"the argument {others[0]} = {arguments[others[0]]}, which a run cannot record"
        records = f"so that it could not be opened again; it records {', '.join(CALL_ARGUMENTS)}"
        raise ValueError(f"the teacher object was loaded with {argument}, {records}")
    t_max = spec.t_max if given.get("t_max") is None else given["t_max"]
    return {"teacher": spec.source or PYTHON_OBJECT, "t_max": t_max, **own}


def refuse_other_facts(teacher: Teacher, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a teacher object's null class and arguments of its call; SettingError if others are given beside it."""
    own = {"null_class": teacher.spec.null_class, **{name: teacher.arguments.get(name) for name in CALL_ARGUMENTS}}
    for name in ("revision", "variant", "original_config", "cache_dir"):
        if given.get(name) is not None:
            why = "says how a teacher that is named is loaded, and this one is an object already"
            raise SettingError(name, given[name], why, "give it to load_teacher, or leave it out")
    for name, value in own.items():
        if plain_value(given.get(name)) not in (None, value):
            why = f"was given with a teacher object that has {'none' if value is None else value}"
            todo = "name it where the object is made: load_teacher or module_teacher"
            raise SettingError(name, given[name], why, todo)
    return own


def doubts_about(teacher: Teacher, config: DistillConfig, network: nn.Module | None = None) -> str:
    """Return what speaks against a teacher's network being a denoiser, by one call of it; "" if nothing does.

    SettingError if it, or the module that is to be trained in its place, cannot be called as the teacher's.
    """
    device = resolve_device(config.device)
    if network is not None:
        look(teacher, device, own_network(network))
    return "" if teacher.network is None else doubts(look(teacher, device), teacher.spec)


def configured_teacher(config: DistillConfig, *, device: str = "cpu", local_files_only: bool = False) -> Teacher:
    """Return the teacher that a configuration names, loaded as it says; SettingError if it cannot be."""
    names = ("revision", "variant", "original_config", "cache_dir", "null_class", "t_max")
    own = {name: getattr(config, name) for name in names}
    offline = config.local_files_only or local_files_only
    return load_teacher(config.teacher, local_files_only=offline, arguments=config.call_arguments, device=device, **own)


def guided_as(
    teacher: Teacher,
    config: DistillConfig,
    guidance_scale: float | None = None,
    interval: tuple[float, float] | None = None,
) -> Teacher:
    """Return the teacher guided and thresholded as the configuration says; at another fixed scale or interval, if given."""
    drawn = guidance_scale is None and config.guidance_range is not None
    scale = config.guidance_scale if guidance_scale is None else guidance_scale
    interval = config.guidance_interval if interval is None else interval
    return guided(teacher, scale, drawn=drawn, threshold=chosen_threshold(config), interval=interval)


def chosen_threshold(config: DistillConfig) -> Threshold | None:
    """Return what a run does to the teacher's x_0; None for what the teacher's own scheduler does."""
    if config.thresholding == "teacher":
        return None
    return Threshold(config.thresholding, config.threshold_limit, config.threshold_ratio)


def make_student(teacher: Teacher, config: DistillConfig, network: nn.Module | None = None) -> Student:
    """Return the untrained student that the configuration says."""
    rank = config.lora_rank
    lora = None if rank is None else Lora(rank, config.lora_alpha, config.lora_target_modules)
    return Student(teacher, guidance_range=config.guidance_range, network=network, lora=lora)


def unread_settings(config: DistillConfig) -> list[str]:
    """Return the settings that are not as usual and that nothing reads, since their rows are none of this run's."""
    kinds, fields = objectives_of(config, config.train_batch_size), DistillConfig.model_fields
    read_by: dict[str, set[Any]] = {
        "time_sampling": {Boot},
        "delta": {Boot},
        "solver": {Boot, FlowMap},
        "ema_target_decay": {Boot, FlowMap},
    }
    return [
        name
        for name, readers in read_by.items()
        if readers.isdisjoint(kinds) and getattr(config, name) != fields[name].default
    ]


def with_usual_rate(config: DistillConfig, student: Student) -> DistillConfig:
    """Return the configuration with the learning rate that is usual for such a student, where none is named."""
    if config.learning_rate is not None:
        return config
    num = sum(weights.numel() for weights in student.parameters() if weights.requires_grad)
    return config.model_copy(update={"learning_rate": usual_learning_rate(num)})


def with_embedded_prompts(config: DistillConfig) -> DistillConfig:
    """Return the configuration with an embedded text teacher's own prompts, where none are named."""
    embedded = EMBEDDED.get(config.teacher)
    if embedded is None or embedded.prompts is None or config.prompt_file is not None:
        return config
    return config.model_copy(update={"prompt_file": embedded.prompts})


def num_draws(config: DistillConfig, steps: int | None = None) -> int:
    """Return how many prompts a run of so many steps draws in all; of its own steps if None."""
    images = config.train_batch_size * config.gradient_accumulation_steps
    return (config.max_train_steps if steps is None else steps) * images * num_processes()


def check_tracker(name: str | None) -> None:
    """Raise SettingError if the tracker is unknown to accelerate or not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name is None or name in [str(getattr(t, "value", t)) for t in get_available_trackers()]:
        return
    if name in LOGGER_TYPE_TO_CLASS:
        raise SettingError("report_to", name, "is not installed", f"pip install {name}")
    raise SettingError("report_to", name, "is unknown", f"accelerate has {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")


def _from_anywhere(config: DistillConfig) -> DistillConfig:
    """Return the configuration with absolute paths, so that its run opens from anywhere; names and hub ids stay."""
    paths = {name: getattr(config, name) for name in ("prompt_file", "prompt_cache_dir", "cache_dir")}
    found: dict[str, Any] = {name: path.expanduser().absolute() for name, path in paths.items() if path is not None}
    original = None if config.original_config is None else _absolute(config.original_config)
    return config.model_copy(update={**found, "teacher": _absolute(config.teacher), "original_config": original})


def _absolute(teacher: str) -> str:
    """Return the absolute path of a folder or file; names and hub ids as they are."""
    try:
        path = Path(teacher).expanduser()
        there = teacher not in ("", *EMBEDDED) and (path.is_dir() or path.is_file())
        return str(path.resolve()) if there else teacher
    except (OSError, ValueError, RuntimeError):
        return teacher  # which is refused by who loads it


def _with_usual_guidance(config: DistillConfig, teacher: Teacher) -> DistillConfig:
    """Return the configuration with the scale that the teacher's network is told, if it is and none is named."""
    is_named = config.guidance_range is not None or "guidance_scale" in config.model_fields_set
    is_told = teacher.guidance_input is not None and not is_named
    return config.model_copy(update={"guidance_scale": teacher.usual_guidance}) if is_told else config


def _check_times(config: DistillConfig, teacher: Teacher) -> None:
    """Raise SettingError if the step size or the cleanest time does not fit the teacher's start level."""
    t_max, smallest = teacher.spec.t_max, teacher.spec.process.t_min
    if config.t_min >= t_max:
        raise SettingError("t_min", config.t_min, f"must be below the teacher's start level t_max = {t_max:.4g}")
    for name in config.steps_in_t():
        if (step := getattr(config, name)) >= t_max - config.t_min:
            raise SettingError(name, step, f"must be below t_max - t_min = {t_max - config.t_min:.4g}")
        if step < smallest:
            raise SettingError(name, step, f"is below {smallest:g}, one time step of the teacher")


def _prompt_pool(
    config: DistillConfig, teacher: Teacher, prompt_file: PromptFile | None, first_stage: FirstStage | None
) -> PromptPool | None:
    """Return the prompts of a run, or None for a teacher that takes no text."""
    if not teacher.spec.text:
        return None
    if config.prompt_cache_dir is not None and config.prompt_cache_dir.is_file():
        raise SettingError("prompt_cache_dir", config.prompt_cache_dir, "is a file")
    check_writable((config.prompt_cache_dir or default_cache_dir()).expanduser(), "prompt_cache_dir")
    if prompt_file is None:
        raise SettingError("prompt_file", why="this teacher takes prompts: give a file of them (.txt, .jsonl or .csv)")
    return make_prompt_pool(
        config,
        teacher,
        prompt_file,
        num_draws=num_draws(config),
        seed=config.seed,
        shown=config.validation_prompt,
        num_shown=config.num_validation_images,
        guidance_range=config.guidance_range,
        first_stage=first_stage,
    )


def _check_longer(pool: PromptPool, config: DistillConfig, begun_with: int) -> None:
    """Raise SettingError if a run that was begun with so many steps draws from other prompts now that it has more."""
    drew = min(len(pool.prompts), config.num_prompts or num_draws(config, begun_with))
    if drew != len(pool.drawn):
        draws = f"draws from {drew:,} of the {len(pool.prompts):,} prompts; a longer one draws from {len(pool.drawn):,}"
        why = f"the run was begun with {begun_with}, and {draws}, so it is another run"
        todo = f"name a new {named('output_dir')}; with {named('num_prompts')} from the start a run can be made longer"
        raise SettingError("max_train_steps", config.max_train_steps, why, todo)
